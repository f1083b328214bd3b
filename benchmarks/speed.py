"""Ours against the reference's procedure, on the same work, alternating, in one go.

    python benchmarks/speed.py [--full] [--only step,choice,…] [--repeats 3]

Measures one training step (finance and code, with an ablation of each lever), choice evaluation, official finance
evaluation, the overhead of a round beside Flower's Ray simulation, and a whole run of the finance quickstart from
process start to scores. Both sides hash the work they are given before anything is timed, and what they return is
compared: the ratio of two different results means nothing. `--full` makes the whole run as long as the quickstart
(half an hour more); without it, it has two steps a client and round and 32 items. The numbers go to
`benchmarks/results/speed.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import origin
from benchmarks.reference import Reference, answers, averaged, padded, sentiments

from fedtune import domains
from fedtune.config import Config
from fedtune.evaluation import items as item_sets
from fedtune.evaluation import official
from fedtune.evaluation.extract import official_label
from fedtune.io import digest, write_bytes, write_json
from fedtune.lora.state import to_tensors
from fedtune.models import adapter, measure
from fedtune.models import load as models
from fedtune.models.adapter import AdaptedModel
from fedtune.objectives import Example
from fedtune.settings import load
from fedtune.training import schedule, workload
from fedtune.training.loss import Part, joint_loss
from fedtune.types import derive_seed

RESULTS = Path(__file__).parent / "results" / "speed.json"
ROUNDS = 5
Row = dict[str, Any]


def configured(domain: str, **changes: Any) -> Config:
    """Return the quickstart's settings of a domain, in float32."""
    return load([{"domain": domain, "model": {"dtype": "float32"}, **changes}]).config


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return each side's seconds, from runs A-B-A-B…; the caller has run each once before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return times


def spread(times: Sequence[float]) -> str:
    """Return median and range."""
    digits = 2 if statistics.median(times) >= 0.1 else 4
    return f"{statistics.median(times):.{digits}f} s ({min(times):.{digits}f}–{max(times):.{digits}f})"


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Return the ratio of medians."""
    return statistics.median(times[slow]) / statistics.median(times[fast])


def left_padding(tokenizer: Any) -> Any:
    """Let both sides pad on the left: what `generate` makes of padding on the right depends on its release."""
    tokenizer.padding_side = "left"
    return tokenizer


def attached(config: Config) -> AdaptedModel:
    """Return the packaged model with the run's adapter."""
    return adapter.attach(models.load(config.model), config.lora, derive_seed(config.seed, "adapter"))


# one training step


def _flops(adapted: AdaptedModel, examples: Sequence[Example]) -> float:
    """Return the useful operations of a step: 4 P a token, the head where a label is; padding does not count."""
    head = adapted.base.model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in adapted.base.model.parameters()) - head
    lora = sum(p.numel() for p in adapted.slots.values())
    tokens, labels = sum(e.tokens for e in examples), sum(e.labels for e in examples)
    return (4.0 * body + 6.0 * lora) * tokens + 4.0 * head * labels


def _gemm(adapted: AdaptedModel, rows: int) -> float:
    """Return the rate of products in the model's own shapes at a step's size, weighed by their work."""
    shapes = [
        (p.shape[1], p.shape[0]) for n, p in adapted.base.model.named_parameters() if "layers.0." in n and p.dim() == 2
    ]
    rates = [measure.gemm_rate(rows, a, b, torch.float32, adapted.device, 0.2) for a, b in shapes if min(a, b) > 32]
    sizes = [a * b for a, b in shapes if min(a, b) > 32]
    return sum(sizes) / sum(size / rate for size, rate in zip(sizes, rates, strict=True))


def _unpacked(adapted: AdaptedModel, examples: Sequence[Example], *, responses: bool) -> float:
    """A padded step without recomputation, with the logits of every position or of the responses only."""
    batch = padded(examples, 2)
    inner = adapted.model.get_base_model()
    labels = batch["labels"][:, 1:]
    hidden = inner.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    rows = hidden[:, :-1]
    if responses:
        rows, labels = rows[labels != -100], labels[labels != -100]
    logits = inner.get_output_embeddings()(rows).float()
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    loss.backward()
    return loss.item()


def step(domain: str, repeats: int) -> list[Row]:
    """Measure one training step of a domain, lever by lever."""
    config = configured(domain)
    adapted = attached(config)
    examples = _shards(config, adapted).shards[0][: config.train.per_device_train_batch_size]
    reference = Reference(models.packaged_folder(config.model.name), config, resident=True)
    theirs = reference.model()
    theirs.train()
    share = 1.0 / sum(e.labels for e in examples)

    def ours(*, prefix: bool) -> float:
        adapted.model.train()
        loss, _ = joint_loss(adapted.model, [Part(examples, share)], share_prefix=prefix)
        loss.backward()
        return loss.item()

    def plain(*, responses: bool) -> float:
        adapted.model.train()
        return _unpacked(adapted, examples, responses=responses)

    sides: dict[str, Callable[[], float]] = {
        "reference: padded, recomputed, all logits": lambda: reference.step(theirs, examples),
        "+ activations kept, fused norms": lambda: plain(responses=False),
        "+ logits of the responses only": lambda: plain(responses=True),
        "+ no padding, loss in chunks": lambda: ours(prefix=False),
        "+ shared beginning computed once (ours)": lambda: ours(prefix=True),
    }
    losses = {name: work() for name, work in sides.items()}
    worst = max(abs(loss / next(iter(losses.values())) - 1) for loss in losses.values())
    assert worst < 1e-4, losses
    times = alternate(sides, repeats)
    tokens = sum(e.tokens for e in examples)
    names = list(sides)
    rate, useful = _gemm(adapted, tokens), _flops(adapted, examples)
    return [
        {
            "what": f"training step, {domain}" if name == names[-1] else f"  {domain}: {name}",
            "seconds": times[name],
            "ratio": ratio(times, names[0], name),
            "tokens_per_second": tokens / statistics.median(times[name]),
            "gemm_share": useful / statistics.median(times[name]) / rate,
            "gemm_gflops": rate / 1e9,
            "equal": f"losses to {worst:.0e}",
            "at_least": 2.5 if name == names[-1] else None,
        }
        for name in names
    ]


def _shards(config: Config, adapted: AdaptedModel) -> workload.EncodedShards:
    return workload.encode_shards(workload.load(config), adapted.base.tokenizer, config)


# evaluation


@contextlib.contextmanager
def _stock(config: Config) -> Iterator[Any]:
    """Yield the model as the reference's evaluation has it: loaded anew, its adapter unmerged."""
    yield Reference(models.packaged_folder(config.model.name), config, checkpointing=False).model()


def choice(repeats: int, count: int = 64) -> list[Row]:
    """Measure questions with one answer token, against one prompt at a time by `generate`."""
    config = configured("medical")
    adapted = attached(config)
    tokenizer = adapted.base.tokenizer
    task = next(t for t in domains.chosen_tasks(config) if t.kind == "choice")
    items = item_sets.load(task, config, count).items
    prompts = [official.wrap(item.prompt) for item in items]
    with _stock(config) as theirs:
        adapted.model.eval()
        found: dict[str, list[str]] = {}

        def one_by_one() -> None:
            found["reference"] = answers(theirs, tokenizer, prompts)

        def together() -> None:
            found["ours"] = [t for batch in official.choose(adapted.model, tokenizer, items) for t in batch]

        one_by_one(), together()
        times = alternate({"reference": one_by_one, "ours": together}, repeats)
    flips = _flips(adapted, items, found)
    return [
        {
            "what": f"choice evaluation, {count} questions",
            "seconds": times["ours"],
            "reference_seconds": times["reference"],
            "ratio": ratio(times, "reference", "ours"),
            "equal": f"{len(flips)} of {count} answers differ" + (f": {flips}" if flips else ""),
            "at_least": 1.8,
        }
    ]


def _flips(adapted: AdaptedModel, items: Sequence[Any], found: Mapping[str, list[str]]) -> list[Row]:
    """List items whose answers differ, with the margin between the two likeliest tokens of the plain pass."""
    flips = []
    for place, (one, other) in enumerate(zip(found["reference"], found["ours"], strict=True)):
        if one != other:
            ids = torch.tensor([adapted.base.tokenizer(official.wrap(items[place].prompt))["input_ids"]])
            with torch.inference_mode():
                best = adapted.model(input_ids=ids).logits[0, -1].topk(2).values
            flips.append({"item": place, "reference": one, "ours": other, "margin": float(best[0] - best[1])})
    return flips


def finance(count: int = 32) -> list[Row]:
    """Measure the official sentiment evaluation, against decoding every row to 512 tokens."""
    config = configured("finance")
    adapted = attached(config)
    tokenizer = left_padding(adapted.base.tokenizer)
    items = item_sets.load(domains.chosen_tasks(config)[0], config, count).items
    adapted.model.eval()
    prompts = [item.prompt for item in items]
    found: dict[str, list[str]] = {}
    with _stock(config) as theirs:

        def ours() -> None:
            found["ours"] = [t for batch in official.sentiment(adapted.model, tokenizer, items) for t in batch]

        def reference() -> None:
            found["reference"] = sentiments(theirs, tokenizer, prompts)

        def endless() -> None:
            found["endless"] = sentiments(theirs, tokenizer, prompts, endless=True)

        times = alternate({"endless": endless, "ours": ours, "reference": reference}, 1)
    labels = {name: [official_label(text) for text in texts] for name, texts in found.items()}

    def row(what: str, slow: str, least: float | None) -> Row:
        differ = sum(a != b for a, b in zip(labels[slow], labels["ours"], strict=True))
        return {
            "what": what,
            "seconds": times["ours"],
            "reference_seconds": times[slow],
            "ratio": ratio(times, slow, "ours"),
            "equal": f"{differ} of {count} labels differ",
            "at_least": least,
        }

    return [
        row(f"official finance evaluation, {count} sentences, decoded to 512 tokens", "endless", 20),
        row("  the same where every row of the batch ends by itself", "reference", None),
    ]


# a whole run


def _whole(full: bool) -> Config:
    train = {} if full else {"train": {"max_steps": 2}}
    limit = 64 if full else 32
    return configured(
        "finance",
        federation={"rounds": ROUNDS},
        eval={"modes": ["official"], "limit": 0, "official_limit": limit, "base": False},
        **train,
    )


def manifest(config: Config, adapted: AdaptedModel, shards: workload.EncodedShards) -> str:
    """Hash the work: the start, and of every step of every client and round its rate and its tokens."""
    steps = [
        [
            schedule.learning_rate(config.train, t, ROUNDS),
            [[shards.shards[c][i].texts[0].ids for i in rows] for rows in plan],
        ]
        for t in range(1, ROUNDS + 1)
        for c in range(config.federation.clients)
        if (plan := schedule.batches(config.train, len(shards.shards[c]), config.seed, c, t))
    ]
    return digest([steps, {n: t.flatten()[:8].tolist() for n, t in to_tensors(adapted.layout).items()}])


def reference_side(full: bool, resident: bool) -> Row:
    """Run everything as the reference does; called in a process of its own."""
    config = _whole(full)
    adapted = attached(config)
    shards = _shards(config, adapted)
    known, tokenizer = manifest(config, adapted, shards), left_padding(adapted.base.tokenizer)
    state = {n: t.clone() for n, t in to_tensors(adapted.layout).items()}
    del adapted
    side = Reference(models.packaged_folder(config.model.name), config, resident=resident)
    for round_ in range(1, ROUNDS + 1):
        rate, done, weights = schedule.learning_rate(config.train, round_, ROUNDS), [], []
        for client in range(config.federation.clients):
            shard = shards.shards[client]
            plan = schedule.batches(config.train, len(shard), config.seed, client, round_)
            done.append(side.fit(state, [[shard[i] for i in rows] for rows in plan], rate))
            weights.append(len({i for rows in plan for i in rows}))
        state = averaged(done, weights)
    from peft import set_peft_model_state_dict

    side.checkpointing, side._kept = False, None
    model = side.model()
    set_peft_model_state_dict(model, state)
    items = item_sets.load(domains.chosen_tasks(config)[0], config, config.eval.official_limit).items
    texts = sentiments(model, tokenizer, [item.prompt for item in items])
    return {"manifest": known, "labels": [official_label(t) for t in texts], "adapter": state}


def our_side(full: bool, folder: Path) -> Row:
    """Run everything as `fedtune run` does; called in a process of its own."""
    from dataclasses import replace

    from fedtune.config import Settings
    from fedtune.config.protocol import read_protocol
    from fedtune.experiment import run as experiment
    from fedtune.experiment.resident import Resident
    from fedtune.io import read_lines

    config = _whole(full)
    task = replace(domains.chosen_tasks(config)[0], max_new_tokens=0)  # to 512 tokens, as the reference does
    domains.chosen_tasks = lambda _: (task,)
    adapted = attached(config)
    known = manifest(config, adapted, _shards(config, adapted))
    left_padding(adapted.base.tokenizer)
    starts = {config.seed: adapted.state()}
    settings = Settings(config, read_protocol("quickstart"), ("a benchmark",))
    path, _ = experiment.run(settings, folder, resident=Resident(adapted.base, adapted, starts))
    import safetensors.torch

    rows = read_lines(path / f"evals/federated/{task.name}.official.jsonl")[1:]
    state = safetensors.torch.load_file(path / "adapter" / "adapter_model.safetensors")
    return {"manifest": known, "labels": [r["predicted"] for r in rows], "adapter": state}


def peak_mib() -> float:
    """Return this program's peak memory; `getrusage` would tell that of the process that started it, if larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _process(side: str, full: bool, folder: Path) -> tuple[float, Row]:
    """Return the seconds from process start to scores, and what came of it."""
    words = [sys.executable, __file__, "--side", side, "--out", str(folder / side), *(["--full"] if full else [])]
    started = time.perf_counter()
    subprocess.run(words, check=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"}, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    return seconds, torch.load(folder / f"{side}.pt", weights_only=True)


def whole(full: bool) -> list[Row]:
    """Measure five rounds of the finance quickstart, evaluation included, from process start to scores."""
    with TemporaryDirectory() as place:
        done = {side: _process(side, full, Path(place)) for side in ("reference", "resident", "ours")}
    (slow, theirs), (strong, other), (fast, mine) = (done[side] for side in ("reference", "resident", "ours"))
    most, more, least = (side["peak_mib"] for side in (theirs, other, mine))
    assert theirs["manifest"] == mine["manifest"], "the two sides were given different work"
    a, b = (torch.cat([s["adapter"][n].flatten() for n in sorted(s["adapter"])]) for s in (theirs, mine))
    differ = sum(x != y for x, y in zip(theirs["labels"], mine["labels"], strict=True))
    equal = f"adapters to {float((a - b).norm() / a.norm()):.0e}, {differ} of {len(mine['labels'])} labels differ"
    size = "" if full else " (2 steps, 32 items)"
    return [
        {
            "what": f"whole run, {ROUNDS} rounds of the finance quickstart{size}",
            "seconds": [fast],
            "reference_seconds": [slow],
            "ratio": slow / fast,
            "equal": f"{equal}; peak {least:.0f} against {most:.0f} MiB",
            "peak_mib": {"ours": least, "reference": most, "resident": more},
            "at_least": 3,
            "manifest": mine["manifest"],
        },
        {
            "what": "  the same against the reference with a resident model",
            "seconds": [fast],
            "reference_seconds": [strong],
            "ratio": strong / fast,
            "equal": equal,
            "at_least": None,
        },
    ]


# the engine


def engine(clients: int = 10, rounds: int = 5) -> list[Row]:
    """Measure a round of no-op clients in our grid and in Flower's Ray simulation."""
    try:
        from benchmarks import overhead
    except ImportError as err:
        return [{"what": "round overhead", "skipped": f"{err}; pip install 'fedtune[simulation]'"}]
    theirs, mine = overhead.ray_calls(clients, rounds), overhead.our_calls(clients, rounds)
    rounds_ray, flower = overhead.ray(clients, rounds), overhead.same_strategy(clients, rounds)
    own, saving = overhead.ours(clients, rounds)
    saved = [a + b for a, b in zip(own, saving, strict=True)]

    def row(what: str, ours: Sequence[float], ray: Sequence[float], least: float | None = None) -> Row:
        middle = statistics.median(ray) / statistics.median(ours)
        known = {"seconds": list(ours), "reference_seconds": list(ray), "ratio": middle}
        return {"what": what, **known, "equal": "all arrays equal", "at_least": least}

    return [
        row(f"round overhead, {clients} clients, 7.4 MB each: messages there and back", mine, theirs, 8),
        row("  a round of Flower's FedAvg on our grid", flower, rounds_ray),
        row("  a round of our loop, screening and aggregation included", own, rounds_ray),
        row("  the same with its checkpoint on disk", saved, rounds_ray),
    ]


def shown(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = ["| work | ours | reference | ratio | at least | same result |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['what']} | skipped: {row['skipped']} | | | | |")
            continue
        slow = spread(row["reference_seconds"]) if "reference_seconds" in row else ""
        share = (
            f"; {row['tokens_per_second']:.0f} tokens/s, {row['gemm_share']:.0%} of GEMM" if "gemm_share" in row else ""
        )
        least = f"{row['at_least']:g}×" if row["at_least"] else ""
        mine = f"{spread(row['seconds'])}{share}"
        lines.append(f"| {row['what']} | {mine} | {slow} | {row['ratio']:.2f}× | {least} | {row['equal']} |")
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    """Return the page with a table for each origin of rows."""
    head = [
        "# Ours against the reference's procedure",
        "",
        "`make bench`; each table is of one machine, one set of versions and one state of the code.",
        "Medians and ranges of runs that alternate; what ran once has no range. Tokens are real ones. GEMM is the rate",
        "of products in the model's own shapes, measured beside it; what a shared beginning saves counts as done. Both",
        "sides got work with one hash.",
        "",
    ]
    tables = [
        line for own in origin.together(rows) for line in (f"Measured on {origin.said(own)}:", "", shown(own), "")
    ]
    return "\n".join([*head, *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="step,choice,finance,engine,whole")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["reference", "resident", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        resident = asked.side == "resident"
        done = our_side(asked.full, asked.out) if asked.side == "ours" else reference_side(asked.full, resident)
        torch.save({**done, "peak_mib": peak_mib()}, asked.out.with_suffix(".pt"))
        return
    if "engine" in asked.only and importlib.util.find_spec("ray") is None:
        parser.error(
            "the part engine runs Flower's simulation: pip install -e '.[simulation]', or leave it out of --only"
        )
    started = time.perf_counter()
    parts: dict[str, Callable[[], list[Row]]] = {
        "step": lambda: [*step("finance", asked.repeats), *step("code", asked.repeats)],
        "choice": lambda: choice(asked.repeats),
        "finance": finance,
        "engine": engine,
        "whole": lambda: whole(asked.full),
    }
    rows: list[Row] = []
    for name in asked.only.split(","):
        rows += [{**row, "part": name} for row in parts[name]()]
        print(
            f"{name}: {time.perf_counter() - started:.0f} s so far, load {os.getloadavg()[0]:.1f}",
            file=sys.stderr,
            flush=True,
        )
    here = origin.here(torch.get_num_threads())
    rows = origin.stamped(rows, here)
    if RESULTS.exists():  # parts that were not measured now stay, with the origin they have
        old = json.loads(RESULTS.read_text())
        before = [row for row in old["rows"] if row["part"] not in asked.only.split(",")]
        rows = sorted(rows + origin.stamped(before, old), key=lambda row: list(parts).index(row["part"]))
    document = {**here, "load": os.getloadavg()[0], "seconds": time.perf_counter() - started, "rows": rows}
    write_json(RESULTS, json.loads(json.dumps(document)))
    write_bytes(RESULTS.with_suffix(".md"), page(rows).encode())
    print(shown(rows))


if __name__ == "__main__":
    main()
