"""Run every method on the same federation and table what it scores and costs.

    python benchmarks/methods.py [--seeds 42,43,44] [--methods fedit,flora] [--set key=value …]

The federation is the quickstart's (SmolLM2-135M-Instruct, packaged finance data, 4 clients), with as many rounds and
steps as the settings say. One JSON line for each method and seed goes to `benchmarks/results/methods.jsonl`; those
that are there already are not run again. The table in `benchmarks/results/methods.md` is made from them.

A method's score is the likelihood accuracy on held-out sentences, mean over seeds; the interval is Student's t over
seeds. Personalised methods score the mean of their clients' own models. The aggregation error of a round is
||M - effective|| / ||M||, with M the weighted mean of what the clients have trained; the largest of all rounds is
shown. Server time is that of the aggregation alone, the median over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import origin

from fedtune.config import parse_assignment
from fedtune.config.load import merge
from fedtune.experiment.aggregate import relative_error
from fedtune.experiment.run import run
from fedtune.io import append_lines, read_lines, write_bytes
from fedtune.methods import METHODS, Algorithm, ClientUpdate, RoundContext, ServerState
from fedtune.results.manifest import versions
from fedtune.results.stats import student
from fedtune.settings import load

RESULTS = Path(__file__).parent / "results"
LINES, TABLE = RESULTS / "methods.jsonl", RESULTS / "methods.md"


class Watched:
    """Wraps the server step of every algorithm: how long it took, and how far its result is from the ideal."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.errors: list[float] = []
        self._plain = Algorithm.server_step

    def __enter__(self) -> Watched:
        plain = self._plain

        def step(
            algorithm: Algorithm, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext
        ) -> ServerState:
            started = time.perf_counter()
            after = plain(algorithm, updates, state, context)
            self.milliseconds.append(1000 * (time.perf_counter() - started))
            if algorithm.method.updates != "opaque" and algorithm.method.models == "global":
                adapters = algorithm.method.adapters(updates, state, context.round)
                new = tuple(p for p in after.base if p.round == context.round)
                moved = ServerState(after.adapter, base=new)
                self.errors.append(relative_error(moved, adapters, [u.examples for u in updates]))
            return after

        Algorithm.server_step = step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Algorithm.server_step = self._plain  # type: ignore[method-assign]


def measure(name: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Run one method with one seed."""
    tree: dict[str, Any] = {"domain": "finance", "seed": seed, "method": {"name": name}}
    tree = merge(tree, {"eval": {"modes": ["likelihood"], "base": name == "fedit"}})
    for text in settings:
        for key, value in parse_assignment(text).items():
            for part in reversed(key.split(".")):
                value = {part: value}
            tree = merge(tree, value)
    with TemporaryDirectory() as folder, Watched() as watched:
        started = time.monotonic()
        _, result = run(load([tree]), Path(folder) / "run")
    arms = {arm.name: arm for arm in result.arms}
    return {
        "method": name,
        "seed": seed,
        "settings": settings,
        "score": arms["federated"].scores[0].score,
        "base": arms["base"].scores[0].score if "base" in arms else None,
        "n": arms["federated"].scores[0].n,
        "clients": next(iter(arms["federated"].per_client.values()), []),
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "rounds": result.rounds,
        "server_ms": statistics.mean(watched.milliseconds),
        "errors": watched.errors,
        "seconds": time.monotonic() - started,
        "config_sha256": result.config_sha256,
        "torch": versions()["torch"],
        "made": origin.here(),
    }


def interval(values: list[float]) -> str:
    """Return mean and the half width of its 95 % interval over seeds."""
    found = student(values)
    return f"{found['mean']:.3f}" + (f" ± {found['half']:.3f}" if found["half"] is not None else "")


def row(lines: list[dict[str, Any]], fedit: dict[str, Any]) -> str:
    """Return a method's line of the table."""
    kind = METHODS[lines[0]["method"]]
    errors = [e for line in lines for e in line["errors"]]
    shown = f"{max(errors):.1e}" if errors else "–"
    up, down = (statistics.mean(line[key] / fedit[key] for line in lines) for key in ("bytes_up", "bytes_down"))
    server = statistics.median(line["server_ms"] for line in lines)
    score = interval([line["score"] for line in lines]) + (" (own models)" if kind.models != "global" else "")
    return f"| `{kind.name}` | {score} | {len(lines)} | {up:.2f} | {down:.2f} | {server:.0f} | {shown} |"


def table(lines: list[dict[str, Any]], command: str) -> str:
    """Return the table in Markdown."""
    fedit = next((line for line in lines if line["method"] == "fedit"), None)
    if fedit is None:
        raise SystemExit("the bytes of all methods are relative to fedit's: measure it on this machine as well")
    bases = {line["seed"]: line["base"] for line in lines if line["base"] is not None}
    known = [[line for line in lines if line["method"] == name] for name in METHODS]
    head = [
        "# Every method on the quickstart federation",
        "",
        f"`{command}` ({origin.said(lines)})",
        "",
        f"{fedit['rounds']} rounds, {fedit['n']} test sentences, seeds {', '.join(map(str, sorted(bases)))}; the base",
        f"model scores {interval(list(bases.values()))}. Bytes are relative to `fedit`'s. ± is Student's 95 % interval",
        "over the seeds: with so few it is wide, and nothing here ranks methods whose intervals overlap.",
        "",
        "| method | accuracy | seeds | bytes up | bytes down | server, ms a round | largest aggregation error |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(found, fedit) for found in known if found), ""])


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    lines = read_lines(LINES) if LINES.exists() else []
    done = {(line["method"], line["seed"], tuple(line["settings"])) for line in lines}
    for seed in map(int, asked.seeds.split(",")):
        for name in asked.methods.split(","):
            if (name, seed, tuple(asked.settings)) not in done:
                found = measure(name, seed, asked.settings)
                append_lines(LINES, [found])
                print(
                    json.dumps({k: found[k] for k in ("method", "seed", "score", "server_ms", "seconds")}), flush=True
                )
    chosen = [line for line in read_lines(LINES) if line["settings"] == asked.settings]
    command = "python benchmarks/methods.py " + " ".join(f"--set {s}" for s in asked.settings)
    stamps = [
        origin.stamped([line], {"machine": line.get("machine"), "versions": {"torch": line.get("torch")}})[0]
        for line in chosen
    ]
    write_bytes(TABLE, "\n".join(table(own, command.strip()) for own in origin.together(stamps)).encode())
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
