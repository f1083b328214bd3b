"""The command line as its users meet it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

from fedtune.config import Settings
from fedtune.experiment.run import run
from fedtune.types import ConfigError


def fedtune(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedtune", *words], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def two_runs(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    short = {"federation": {"clients": 2, "rounds": 1}}
    return [run(settings(seed=s, **short), root / f"seed{s}")[0] for s in (1, 2)]


LIGHT = [["--help"], ["--version"], ["ls", "models"], ["ls", "methods", "--json"], ["ls", "protocols"], ["doctor"]]


@pytest.mark.parametrize("words", [*LIGHT, ["score", "--help"], ["run", "--help"], ["ls", "tasks"]])
def test_what_only_lists_starts_without_torch(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['fedtune', *{words!r}]\nfrom fedtune.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = [m for m in ('torch', 'transformers', 'flwr', 'datasets', 'numpy.linalg') if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.strip().splitlines()[-1]
    assert last in ("HEAVY []", "HEAVY ['numpy.linalg']"), done.stdout


def test_mistakes_exit_2_with_the_remedy_and_no_traceback() -> None:
    done = fedtune("run", "finanse", "--method", "fedpox", "-s", "lora.rr=3")
    assert done.returncode == ConfigError.exit_code == 2
    assert 'lora.rr: unknown key; did you mean "r"?' in done.stderr
    assert "Traceback" not in done.stderr
    assert 'did you mean "finance"?' in done.stderr
    assert 'did you mean "fedprox"?' in done.stderr
    assert 'did you mean "models"?' in fedtune("ls", "modles").stderr
    assert "unknown baseline" in fedtune("run", "finance", "--arms", "locl").stderr
    assert "no such folder" in fedtune("run", "finance", "--data", "/nowhere").stderr
    done = fedtune("eval", "packaged/smollm2-135m-instruct", "--domain", "finance", "-s", "train.max_steps=3")
    assert "--set train.max_steps: has no effect on an evaluation" in done.stderr


def test_print_config_is_toml_that_gives_the_same_run(tmp_path: Path) -> None:
    first = fedtune("run", "medical", "--protocol", "corrected", "--rounds", "7", "-s", "lora.r=8", "--print-config")
    assert first.returncode == 0, first.stderr
    file = tmp_path / "again.toml"
    file.write_text(first.stdout)
    assert fedtune("run", "--config", str(file), "--print-config").stdout == first.stdout
    assert "# config sha256 " in first.stdout
    unranked = fedtune("run", "medical", "--protocol", "corrected", "--clients", "3", "--print-config").stdout
    assert "# unranked: federation.clients is 3, locked at 20 by corrected" in unranked


def test_a_run_from_the_command_line_ends_with_table_and_folder(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    made = settings(federation={"clients": 2, "rounds": 1}, eval={"base": True, "limit": 8})
    file.write_bytes(tomli_w.dumps(made.config.plain()).encode())
    done = fedtune("run", "-c", str(file), "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "data: finance_toy, 48 rows",
        "federated round 1/1: ok, 2/2 clients",
        "always-majority",
        "run folder:",
    ):
        assert said in done.stdout
    assert str(tmp_path / "here") in done.stdout
    as_json = fedtune("run", "-c", str(file), "--out", "there", "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["arms"][1]["name"] == "federated"


def test_eval_of_an_adapter_does_only_what_is_missing(two_runs: list[Path], data_folder: Path, tmp_path: Path) -> None:
    words = [str(two_runs[0] / "adapter"), "--domain", "finance", "--task", "fpb", "--data", str(data_folder)]
    first = fedtune("eval", *words, "--mode", "likelihood", "--out", str(tmp_path / "e"), "--json")
    assert first.returncode == 0, first.stderr
    scores = json.loads(first.stdout)
    assert [(s["task"], s["mode"], s["n"]) for s in scores] == [("fpb", "likelihood", 24)]
    log = tmp_path / "e/fpb.likelihood.jsonl"
    stamp = log.read_bytes()
    again = fedtune("eval", *words, "--mode", "likelihood", "--out", str(tmp_path / "e"), "--json")
    assert json.loads(again.stdout) == scores
    assert log.read_bytes() == stamp
    for line in ("{}", '{"i": null}'):
        log.write_bytes(stamp + line.encode() + b"\n")
        more = fedtune("eval", *words, "--mode", "likelihood", "--out", str(tmp_path / "e"), "--json")
        assert more.returncode == 1
        assert "line 26 is not the sample of an item" in more.stderr


def test_eval_refuses_a_pickled_adapter_before_loading_anything(two_runs: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_runs[0] / "adapter", tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    done = fedtune("eval", str(folder), "--domain", "finance")
    assert done.returncode == 1
    assert "is a pickle, which can run code and is not read" in done.stderr


def test_compare_pairs_the_same_items(two_runs: list[Path], tmp_path: Path) -> None:
    done = fedtune("compare", *map(str, two_runs), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fpb.likelihood"]
    assert found["n"] == 24
    assert found["interval"]["low"] <= found["difference"] <= found["interval"]["high"]
    itself = json.loads(fedtune("compare", str(two_runs[0]), str(two_runs[0]), "--json").stdout)["fpb.likelihood"]
    assert (itself["difference"], itself["p"]) == (0.0, 1.0)
    assert fedtune("compare", str(two_runs[0]), str(tmp_path)).returncode == 1
    # a log that has only begun, and one with a value that is none
    copy = Path(shutil.copytree(two_runs[0], tmp_path / "copy"))
    for log in (copy / "evals/federated").glob("*.jsonl"):
        log.write_bytes(log.read_bytes().split(b"\n", 1)[0] + b"\n")
    done = fedtune("compare", str(two_runs[0]), str(copy))
    assert (done.returncode, "have no evaluation" in done.stderr) == (1, True)


def test_data_shows_counts_a_client_as_table_and_plot(data_folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "split.svg"
    words = ["--partition", "dirichlet:0.3", "--clients", "3", "--data", str(data_folder), "--plot", str(plot)]
    done = fedtune("data", "finance", *words)
    assert done.returncode == 0, done.stderr
    assert "finance_toy: 48 rows, partition dirichlet:0.3" in done.stdout
    assert "negative" in done.stdout
    assert plot.read_text().lstrip().startswith("<?xml")


def test_progress_is_plain_lines_off_a_terminal_and_a_bar_on_one() -> None:
    import io

    from fedtune.experiment.progress import TerminalReporter, clock, size
    from fedtune.types import ClientStats, RoundRecord

    for terminal in (True, False):
        out = io.StringIO()
        watch = TerminalReporter(Console(file=out, force_terminal=terminal, width=100))
        watch._expected = 1  # so the step is the round's last, and still not of the next one
        watch.training("federated", 2, 0)
        watch.step(1, 100, 0.5)
        watch.round(RoundRecord(1, "ok", 0.1, (0,), (ClientStats(0, 8, 100, 1, 0.5),), (), 1024, 1024))
        watch.close()
        text = out.getvalue()
        assert "federated round 1/2: ok, 1/1 clients, loss 0.5000, 2.0 KiB" in text
        assert ("federated round 1/2  client 1  loss 0.500" in text) is terminal
        assert "round 2/2" not in text
        assert ("\x1b[" in text) is terminal
    assert (size(532), size(3 * 1024**2), clock(65), clock(3700)) == ("532 B", "3.0 MiB", "1:05", "1:01:40")
