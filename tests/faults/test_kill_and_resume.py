"""A run killed at any instant continues as if nothing had happened, or says why it will not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtune.config import Settings
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.federation import checkpoint
from fedtune.io import read_json, read_lines
from fedtune.types import CorruptFileError, LockedError, ResumeError

PHASES = ["send", "screen", "aggregate", "half", "checkpoint", "renamed", "recorded", "measured"]


@pytest.fixture(scope="module")
def short(settings: Callable[..., Settings]) -> Settings:
    return settings(
        federation={"clients": 3, "rounds": 3},
        train={"max_steps": 1, "per_device_train_batch_size": 2},
        eval={"limit": 4, "every": 1},
    )


@pytest.fixture(scope="module")
def uninterrupted(short: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(short, tmp_path_factory.mktemp("runs") / "whole")[0]


def _command(settings: Settings, out: Path, *more: str) -> list[str]:
    file = out.with_suffix(".toml")
    file.write_bytes(tomli_w.dumps(settings.config.plain()).encode())
    return [sys.executable, "-m", "fedtune", "run", "--config", str(file), "--out", str(out), *more]


def _same(one: Path, two: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "rounds.jsonl", "curve.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert read_json(one / "result.json")["arms"] == read_json(two / "result.json")["arms"]
    assert [line["round"] for line in read_lines(one / "timings.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_of_a_round_it_ends_bit_identical(
    short: Settings, uninterrupted: Path, tmp_path: Path, phase: str
) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "FEDTUNE_KILL_AT": f"2:{phase}"}
    killed = subprocess.run(_command(short, out), env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_json(out / "manifest.json")["status"] == "running"
    path, _ = run(short, out, resume=True)
    _same(path, uninterrupted)
    assert read_json(out / "manifest.json")["status"] == "complete"


@pytest.mark.parametrize("damage", ["cut tensors", "cut state", "no state", "garbage rounds"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    short: Settings, uninterrupted: Path, tmp_path: Path, damage: str
) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    newest = sorted((out / "checkpoints").glob("round-*"))[-1]
    if damage == "cut tensors":
        whole = (newest / "state.safetensors").read_bytes()
        (newest / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "cut state":
        (newest / "state.json").write_text('{"run_id": ')
    elif damage == "no state":
        (newest / "state.json").unlink()
    else:
        with open(out / "rounds.jsonl", "a") as handle:
            handle.write('{"round": 4, "sta')
    shutil.rmtree(out / "adapter")
    path, _ = run(short, out, resume=True)
    _same(path, uninterrupted)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", ["cut off", "another run's", "deleted", "garbage before"])
def test_without_any_whole_checkpoint_it_refuses_and_changes_nothing(
    short: Settings, uninterrupted: Path, tmp_path: Path, how: str
) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    folders = list((out / "checkpoints").glob("round-*"))
    for folder in folders:
        if how == "cut off":
            (folder / "state.safetensors").write_bytes(b"")
        elif how == "another run's":
            document = {**read_json(folder / "state.json"), "run_id": "another"}
            (folder / "state.json").write_text(json.dumps(document))
        elif how == "deleted":
            shutil.rmtree(folder)
    if how == "garbage before":
        lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
        (out / "rounds.jsonl").write_text("".join(["{\n", *lines[1:]]))
    before = {n: x for n, x in _contents(out).items() if n.startswith(("checkpoints", "rounds", "timings"))}
    with pytest.raises(ResumeError, match=r"none of its checkpoints can be read(.|\n)*another --out"):
        run(short, out, resume=True)
    after = _contents(out)
    assert {n: after[n] for n in before} == before


class Listening(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_damaged_checkpoints_are_put_aside_and_told(short: Settings, uninterrupted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (out / "checkpoints/round-000003/state.json").write_text("{")
    tensors = (out / "checkpoints/round-000003/state.safetensors").read_bytes()
    watch = Listening()
    run(short, out, resume=True, reporter=watch)
    told = [n for n in watch.notes if "round-000003" in n]
    assert len(told) == 1
    assert "state.json: line 1" in told[0]
    assert "kept as damaged-round-000003; going on from round 2" in told[0]
    assert (out / "checkpoints/damaged-round-000003/state.safetensors").read_bytes() == tensors
    _same(out, uninterrupted)


def test_what_else_lies_among_the_checkpoints_is_left_alone(
    short: Settings, uninterrupted: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    shutil.copytree(out / "checkpoints/round-000002", out / "checkpoints/round-copy")
    shutil.copytree(out / "checkpoints/round-000003", out / "checkpoints/round-000009-of-mine")
    (out / "checkpoints/round-000008").write_text("a file")
    shutil.rmtree(out / "checkpoints/round-000003")
    run(short, out, resume=True)
    _same(out, uninterrupted)
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names >= {"round-copy", "round-000009-of-mine", "round-000008", "round-000002", "round-000003"}


def test_a_full_disk_while_checkpointing_keeps_the_one_before(
    short: Settings, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = checkpoint.write_json
    calls: list[Path] = []

    def full(path: Path, value: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run(short, out)
    assert read_json(out / "manifest.json")["status"] == "failed"
    assert "No space left" in read_json(out / "manifest.json")["reason"]
    assert [p.name for p in sorted((out / "checkpoints").glob("round-*"))] == ["round-000001"]
    monkeypatch.setattr(checkpoint, "write_json", real)
    path, _ = run(short, out, resume=True)
    _same(path, uninterrupted)


def test_resuming_with_other_settings_is_refused_with_the_difference(
    settings: Callable[..., Settings], uninterrupted: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    other = settings(
        federation={"clients": 3, "rounds": 4},
        train={"max_steps": 1, "per_device_train_batch_size": 2},
        eval={"limit": 4, "every": 1},
    )
    with pytest.raises(ResumeError, match=r"config\.federation\.rounds: 3 -> 4(.|\n)*--force-resume"):
        run(other, out, resume=True)
    _, result = run(other, out, resume=True, force=True)
    assert any("resumed although config.federation.rounds: 3 -> 4" in reason for reason in result.unranked)


@pytest.mark.parametrize("what", ["code", "data", "model_revision", "torch"])
def test_resuming_with_other_code_data_or_model_is_refused(
    short: Settings, uninterrupted: Path, tmp_path: Path, what: str
) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    manifest = read_json(out / "manifest.json")
    manifest["identity"][what] = "of yesterday"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResumeError, match=f"{what}: 'of yesterday' -> "):
        run(short, out, resume=True)


def test_resuming_with_another_tokenizer_is_refused_with_the_file_that_changed(
    settings: Callable[..., Settings], tiny_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    short = settings(
        model={"name": str(model)}, federation={"clients": 2, "rounds": 1}, train={"max_steps": 1}, eval={"limit": 2}
    )
    run(short, tmp_path / "run")
    with open(model / "tokenizer_config.json", "a") as file:
        file.write(" ")
    with pytest.raises(ResumeError, match=r"model_files\.tokenizer_config\.json: '\w+' -> '\w+'"):
        run(short, tmp_path / "run", resume=True)


def test_a_run_is_never_overwritten_unasked(short: Settings, uninterrupted: Path) -> None:
    before = (uninterrupted / "manifest.json").read_bytes()
    with pytest.raises(ResumeError, match="already holds a run; continue it with --resume"):
        run(short, uninterrupted)
    assert (uninterrupted / "manifest.json").read_bytes() == before


def test_a_corrupt_manifest_is_named(short: Settings, uninterrupted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (out / "manifest.json").write_text('{"run_id": "x", ')
    with pytest.raises(CorruptFileError, match=r"manifest\.json: line 1"):
        run(short, out, resume=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_checkpoint_and_exit_with_their_code(
    settings: Callable[..., Settings], tmp_path: Path, number: int, code: int
) -> None:
    many = settings(federation={"clients": 3, "rounds": 400}, eval={"limit": 4})
    out = tmp_path / "run"
    process = subprocess.Popen(_command(many, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_lines(out / "rounds.jsonl", torn_tail=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "continue with: fedtune run --resume" in err
    assert read_json(out / "manifest.json")["status"] == "cancelled"
    done = len(read_lines(out / "rounds.jsonl"))
    assert (out / f"checkpoints/round-{done:06d}/state.json").exists()


def test_two_processes_never_share_a_run_folder(short: Settings, tmp_path: Path) -> None:
    from fedtune.io import folder_lock

    with folder_lock(tmp_path / "run"):
        second = subprocess.run(_command(short, tmp_path / "run"), capture_output=True, text=True, check=False)
    assert second.returncode == LockedError.exit_code
    assert f"in use by pid {os.getpid()} on" in second.stderr


def test_resume_finds_the_last_unfinished_run(short: Settings, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "runs" / "mine"
    out.parent.mkdir()
    environment = {**os.environ, "FEDTUNE_KILL_AT": "2:screen"}
    subprocess.run(_command(short, out), env=environment, capture_output=True, check=False)
    again = [sys.executable, "-m", "fedtune", "run", "--resume"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing runs/mine\n" in done.stderr
    _same(out, uninterrupted)
    nothing = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert nothing.returncode == ResumeError.exit_code
    assert "no unfinished run" in nothing.stderr


def test_a_resumed_run_finishes_the_arms_it_was_started_with(short: Settings, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "FEDTUNE_KILL_AT": "2:screen"}
    subprocess.run(_command(short, out, "--arms", "centralised"), env=environment, capture_output=True, check=False)
    _, result = run(short, out, resume=True)
    assert [a.name for a in result.arms] == ["federated", "centralised"]
