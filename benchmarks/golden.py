"""Record what small runs end in, and compare two recordings: proof that a change of shape changes no number.

    python benchmarks/golden.py record before.json      (in the checkout before a change)
    python benchmarks/golden.py record after.json       (in the one after it, on the same machine)
    python benchmarks/golden.py compare before.json after.json

Every method is run plain and with each wrapper, with mixed ranks, DoRA, several clients in one pass, lost replies, and
killed and resumed; every domain is run and evaluated once. Recorded are digests of the adapter, of `rounds.jsonl`,
of the last checkpoint's tensors and of the evaluations, or the refusal. Only the command line is used, so that
checkouts of different shape can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORDS = (
    "train.max_steps=2 train.per_device_train_batch_size=2 train.max_length=96 data.limit=80 lora.r=4 lora.alpha=8 "
    "eval.limit=2 eval.modes=['likelihood'] federation.rounds=3 federation.fraction=0.75 engine.threads=1 "
    "engine.executor=sequential engine.max_tokens_per_forward=1024 engine.bucket=0 engine.gradient_checkpointing=false"
)
SETTINGS = _WORDS.split()
AROUND = {
    "plain": "",
    "fedprox": "drift.proximal_mu=0.1",
    "scaffold": "drift.scaffold=true train.optimizer=sgd",
    "fedavgm": "server.optimizer=fedavgm",
    "fedadam": "server.optimizer=fedadam server.convention=flower",
    "median-clip": "robust.clip_norm=median",
    "multi-krum": "robust.rule=multi-krum federation.fraction=1.0 federation.clients=5",
    "trimmed": "robust.rule=trimmed federation.fraction=1.0",
    "sign-flip": "attack.kind=sign-flip attack.clients=[1] attack.scale=2.0",
    "gauge": "attack.kind=gauge attack.clients=[1]",
    "mixed-ranks": "lora.ranks=[1,2,3,4]",
    "dora": "lora.dora=true",
    "rslora-dropout": "lora.rslora=true lora.dropout=0.1",
    "cohort": "engine.executor=cohort engine.cohort=3",
    "lost": "federation.faults.dropout=0.3 federation.faults.error=0.1",
    "fedprox-fedadam-dora": "drift.proximal_mu=0.1 server.optimizer=fedadam lora.dora=true",
    "local-only": "arm=local-only",
    "centralised": "arm=centralised",
}
DOMAINS = {"general": "", "finance": "", "medical": "", "code": "eval.tasks=['algorithms-solutions']"}
KILLED = ("fedit", "flora", "fedsa_lora", "fedalt", "fedrot_lora")


def cases() -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the arguments of every run."""
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "ls", "methods", "--json"], capture_output=True, text=True, check=True
    )
    methods = [row["method"] for row in json.loads(done.stdout)]
    for method in methods:
        for around, more in AROUND.items():
            yield f"{method}/{around}", ["finance", "--method", method, *_sets([*SETTINGS, *more.split()])]
    for domain, more in DOMAINS.items():
        wide = [s for s in SETTINGS if not s.startswith("eval.")] + ["eval.limit=3", *more.split()]
        yield f"domain/{domain}", [domain, *_sets(wide)]
    for method in KILLED:
        yield f"killed/{method}", ["finance", "--method", method, *_sets(SETTINGS)]


def _sets(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("-s", setting.replace("'", '"'))]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def outcome(folder: Path) -> dict[str, Any]:
    """Return the digests of what a run left."""
    found = {}
    kinds = ("**/*.safetensors", "**/rounds.jsonl", "evals/**/*.jsonl")
    for path in sorted({path for kind in kinds for path in folder.glob(kind)}):
        data = path.read_bytes()
        # the first line of an evaluation's log names the model's folder, which is another one each time
        found[str(path.relative_to(folder))] = _digest(data.partition(b"\n")[2] if "evals" in path.parts else data)
    result = json.loads((folder / "result.json").read_text())
    scores = [(arm.get("name"), arm.get("scores")) for arm in result["arms"]] if "arms" in result else []
    found["scores"] = _digest(json.dumps(scores, sort_keys=True).encode())
    return found


def _called(arguments: list[str]) -> str:
    """Run the command line in this process; return an empty string, or the last lines of what it refused with."""
    from fedtune.cli import main

    said = io.StringIO()
    sys.argv = ["fedtune", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        if end.code not in (0, None):
            return re.sub(r"\s+", " ", said.getvalue()).strip()[-300:]
    return ""


def _killed(arguments: list[str], folder: Path) -> str:
    """Run in a process that is killed in round 2, then continue in this one."""
    env = {**os.environ, "FEDTUNE_KILL_AT": "2:recorded"}
    subprocess.run([sys.executable, "-m", "fedtune", *arguments], env=env, capture_output=True, check=False)
    if not list(folder.glob("checkpoints/*")) or (folder / "result.json").is_file():
        return "was not killed"
    return _called(["run", "--resume", "--out", str(folder)])


def record(target: Path, only: str) -> None:
    """Run every case whose name matches, and write what it ends in."""
    scratch = Path(tempfile.mkdtemp(prefix="golden-"))
    model = scratch / "tiny-llama"
    subprocess.run([sys.executable, "-m", "tests.tiny", str(model)], check=True, capture_output=True)
    os.chdir(scratch)  # the model's path is in the settings, so it is the same for every checkout
    found: dict[str, Any] = {}
    for name, words in cases():
        if not re.search(only, name):
            continue
        started, folder = time.monotonic(), scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        arguments = ["run", *words, "--model", "tiny-llama", "--out", str(folder)]
        refused = _killed(arguments, folder) if name.startswith("killed/") else _called(arguments)
        found[name] = {"refused": refused.replace(str(scratch), "")} if refused else outcome(folder)
        print(f"{name}: {'refused' if refused else 'ok'} {time.monotonic() - started:.1f} s", flush=True)
        target.write_text(json.dumps(found, indent=1, sort_keys=True))
    shutil.rmtree(scratch)


def compare(before: Path, after: Path) -> int:
    """Print each case that ends otherwise, and return how many."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    names = sorted(old.keys() & new.keys())
    other = [name for name in names if _kind(old[name]) != _kind(new[name])]
    for name in other:
        was, now = old[name], new[name]
        files = [f for f in sorted(was.keys() | now.keys()) if was.get(f) != now.get(f)]
        print(f"{name}: {', '.join(files)}")
    missing = sorted(old.keys() ^ new.keys())
    print(f"{len(names) - len(other)} of {len(names)} end alike; {len(missing)} in one recording only")
    return len(other)


def _kind(found: dict[str, str]) -> Any:
    """A refusal may be worded otherwise; numbers may not."""
    return "refused" if "refused" in found else found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="a regular expression of case names")
    given = parser.parse_args()
    if given.what == "record":
        record(given.paths[0].absolute(), given.only)
    else:
        raise SystemExit(1 if compare(*given.paths) else 0)


if __name__ == "__main__":
    main()
