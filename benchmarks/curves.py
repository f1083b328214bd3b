"""What a round costs as it grows: time and memory against clients, rank, sequence length and model size.

    python benchmarks/curves.py

Each point runs in a process of its own, so that its peak memory is its own. The model is a Llama with random weights in
SmolLM2-135M's shape unless its size is what varies; a client makes one step of four texts. Table, plot and numbers go
to `benchmarks/results/curves.{md,png,json}`; the exponent says how cost grows from the point before (1: in proportion).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv": 3}
SIZES: dict[str, dict[str, int]] = {
    "8M": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8, "heads": 4, "kv": 4},
    "23M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12, "heads": 4, "kv": 4},
    "53M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20, "heads": 6, "kv": 3},
    "135M": SMOL,
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "heads": 15, "kv": 5},
}
AXES: dict[str, list[Any]] = {
    "clients": [1, 2, 4, 8, 16],
    "rank": [1, 4, 16, 64, 256],
    "length": [32, 64, 128, 256, 512, 1024],
    "model": list(SIZES),
}
START = {"clients": 1, "rank": 16, "length": 128, "model": "135M"}


def peak() -> float:
    """Return the process's peak memory so far in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure(clients: int, rank: int, length: int, model: str) -> dict[str, float]:
    """Run two rounds and return the seconds of the second, split, and the growth of memory by training."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedtune.experiment import arms
    from fedtune.experiment.reporter import Reporter
    from fedtune.federation.pool import LocalPool, complete
    from fedtune.io import read_lines
    from fedtune.models import adapter
    from fedtune.models.load import LoadedModel
    from fedtune.models.proof import prove
    from fedtune.objectives import Example
    from fedtune.settings import load
    from fedtune.training.executor import Limits, Sequential
    from fedtune.training.workload import EncodedShards

    train = {"max_steps": 1, "per_device_train_batch_size": 4}
    lora = {"r": rank, "alpha": 2.0 * rank, "target_modules": ["q_proj", "v_proj"]}
    federation = {"clients": clients, "rounds": 2}
    tree = {"domain": "finance", "train": train, "lora": lora, "federation": federation}
    config = load([tree]).config
    shape = dict(SIZES[model])
    heads, kv = shape.pop("heads"), shape.pop("kv")
    known = LlamaConfig(
        vocab_size=49152, num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, **shape
    )
    base = AutoModelForCausalLM.from_config(known)
    base.requires_grad_(False).eval()
    prove(base, fuse=True)
    adapted = adapter.attach(LoadedModel(base, None, model, "random"), config.lora, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 49152, (4, length), generator=generator).tolist()
    texts = tuple(Example.labelled(ids, length // 2) for ids in drawn)
    before = peak()
    with TemporaryDirectory() as folder:
        shards = EncodedShards((texts,) * clients, (), 0)
        pool = LocalPool(Sequential(adapted, Limits(4096)))
        arm = arms.Arm(config, adapted, shards, adapted.state(), "r", Path(folder), Reporter(), pool)
        started = time.perf_counter()
        complete(arms.train(arm))
        whole = time.perf_counter() - started
        lines = read_lines(Path(folder) / "timings.jsonl")[1:]
    return {
        "round": statistics.fmean(line["train_seconds"] + line["server_seconds"] for line in lines),
        "server": statistics.fmean(line["server_seconds"] for line in lines),
        "run": whole,
        "training_bytes": peak() - before,
        "peak_bytes": peak(),
        "parameters": float(sum(p.numel() for p in base.parameters())),
    }


def point(axis: str, value: Any) -> dict[str, Any]:
    """Measure one point in a process of its own."""
    asked = {**START, axis: value}
    words = [sys.executable, __file__, "--point", json.dumps(asked)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return {"axis": axis, "value": value, **json.loads(done.stdout.splitlines()[-1])}


def place(row: dict[str, Any]) -> float:
    """Return where a point stands on its axis."""
    return float(row["parameters"]) if row["axis"] == "model" else float(row["value"])


def exponent(before: dict[str, Any] | None, row: dict[str, Any], key: str) -> str:
    """Return the exponent by which a cost grew from the point before."""
    if before is None or before[key] <= 0 or row[key] <= 0:
        return ""
    return f"{math.log(row[key] / before[key]) / math.log(place(row) / place(before)):.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = []
    for axis in AXES:
        own = [r for r in rows if r["axis"] == axis]
        lines += [
            f"| {axis} | s a round | exponent | server, s | training memory, MiB | exponent |",
            "|---|---|---|---|---|---|",
        ]
        for before, row in zip([None, *own], own, strict=False):
            memory = row["training_bytes"] / 2**20
            time_, size = exponent(before, row, "round"), exponent(before, row, "training_bytes")
            cells = [row["value"], f"{row['round']:.2f}", time_, f"{row['server']:.3f}", f"{memory:.0f}", size]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw time and memory against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(AXES), figsize=(14, 6), constrained_layout=True)
    for column, axis in enumerate(AXES):
        own = [r for r in rows if r["axis"] == axis]
        xs = [place(r) for r in own]
        for line, (key, label, scale) in enumerate(
            (("round", "seconds a round", 1.0), ("training_bytes", "training memory, MiB", 2**20))
        ):
            panel = panels[line][column]
            ys = [r[key] / scale for r in own]
            panel.loglog(xs, ys, marker="o", color="#2a6f97")
            # at least a decade and a half, or noise looks like a slope
            panel.set_ylim(min(ys) / 2, max(2 * max(ys), 30 * min(ys)))
            panel.set_xticks(xs, [str(r["value"]) for r in own])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_xlabel("parameters" if axis == "model" else axis)
            panel.set_ylabel(label if column == 0 else "")
    figure.savefig(RESULTS / "curves.png", dpi=110)


WHY = """
Where a curve bends, and why:

- **clients**: time grows in proportion from the first client on; memory does not grow, because updates are added up as
  they come.
- **rank**: flat until the adapter's own products (6 p a token) and its messages are no longer small beside the frozen
  weights' (4 P a token); then it bends towards proportion. Memory likewise, with the adapter, its gradient and the
  optimiser's two moments.
- **length**: short texts leave the products too few rows to be fast, so at first time grows slower than in proportion;
  with long ones attention, which grows with the square, begins to show.
- **model**: small models wait for Python and for memory, not for products; the exponent comes near 1 where products
  dominate. Training memory grows slower than the weights: activations grow with width times depth, weights with width
  squared times depth.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(measure(**asked.point)))
        return
    from fedtune.io import write_bytes, write_json
    from fedtune.results.manifest import machine, versions

    rows = []
    for axis, values in AXES.items():
        for value in values:
            rows.append(point(axis, value))
            print(axis, value, f"{rows[-1]['round']:.2f} s", flush=True)
    here = {**machine(), "system": "Linux"}
    write_json(
        RESULTS / "curves.json",
        {"date": time.strftime("%Y-%m-%d"), "machine": here, "versions": versions(), "rows": rows},
    )
    others = "; the others are " + ", ".join(f"{k} {v}" for k, v in START.items())
    head = [
        "# Cost curves",
        "",
        f"`python benchmarks/curves.py` ({here['processor']}, {here['cpus']} cores, CPU, float32).",
        f"Each axis alone varies{others}.",
        "",
        "![curves](curves.png)",
        "",
    ]
    write_bytes(RESULTS / "curves.md", ("\n".join([*head, ""]) + table(rows) + WHY).encode())
    plot(rows)


if __name__ == "__main__":
    main()
