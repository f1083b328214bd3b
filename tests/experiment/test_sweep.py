"""Sweeps: the runs are those of `fedtune run`, one by one or in one cohort; what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.config import Settings
from fedtune.experiment import sweep as module
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.experiment.sweep import Point, groups, points, sweep
from fedtune.io import read_json
from fedtune.training.cohort import Cohort
from fedtune.types import CancelledError, ConfigError, RunFailedError


def build(settings: Callable[..., Settings], **fixed: Any) -> Callable[[Mapping[str, Any]], Settings]:
    def made(where: Mapping[str, Any]) -> Settings:
        named = {"method__name" if k == "method" else k.replace(".", "__"): v for k, v in where.items()}
        return settings(**{**fixed, **named})

    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("engine", [{}, {"executor": "cohort", "cohort": 4}])
def test_a_sweep_gives_what_single_runs_give(
    settings: Callable[..., Settings], tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts: list[int] = []
    plain = Cohort._stacked
    monkeypatch.setattr(Cohort, "_stacked", lambda self, works: cohorts.append(len(works)) or plain(self, works))
    axes = {"method": ["fedit", "ffa_lora"], "seed": [1, 2]}
    make = build(settings, federation={"clients": 3, "rounds": 2}, engine=engine)
    chosen = points(axes, make, tmp_path / "sweep")
    rows = sweep(chosen, tmp_path / "sweep")
    assert [(row["where"]["method"], row["seeds"]) for row in rows] == [("fedit", [1, 2]), ("ffa_lora", [1, 2])]
    assert (max(cohorts) > 3) if engine else not cohorts, "clients of different runs share a pass"
    for point in chosen:
        alone, _ = run(make(point.where), tmp_path / "alone" / point.name)
        mine, theirs = weights(point.folder), weights(alone)
        assert all(torch.allclose(mine[n], theirs[n], atol=1e-5) for n in theirs)
        assert point.settings.config.hash == read_json(alone / "manifest.json")["config_sha256"]


class Noting(Reporter):
    def __init__(self, stop_at: str = "") -> None:
        self.notes: list[str] = []
        self._stop = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._stop and self._stop in text:
            raise CancelledError(2)


@pytest.mark.parametrize("engine", [{}, {"executor": "cohort", "cohort": 4}])
def test_a_sweep_that_was_cut_off_goes_on(
    settings: Callable[..., Settings], tmp_path: Path, engine: dict[str, Any]
) -> None:
    make = build(settings, federation={"clients": 2, "rounds": 2}, engine=engine)
    chosen = points({"seed": [1, 2, 3]}, make, tmp_path)
    with pytest.raises(CancelledError):
        sweep(chosen, tmp_path, Noting(f"{chosen[1].name}: round 1"))
    states = [read_json(p.folder / "manifest.json")["status"] for p in chosen if (p.folder / "manifest.json").exists()]
    assert "cancelled" in states
    assert "running" not in states
    watch = Noting()
    rows = sweep(chosen, tmp_path, watch)
    assert rows[0]["seeds"] == [1, 2, 3]
    again = Noting()
    assert sweep(chosen, tmp_path, again) == rows
    assert again.notes == ["3 of 3 runs are complete already"]


def test_one_run_that_fails_does_not_take_the_others_along(settings: Callable[..., Settings], tmp_path: Path) -> None:
    make = build(settings, federation={"clients": 2, "rounds": 2, "max_skipped_rounds": 1})
    good = points({"seed": [1]}, make, tmp_path)
    bad = make({"seed": 2, "federation.faults": {"error": 1.0}})
    chosen = [Point(bad, {"seed": 2}, tmp_path / "bad"), *good]
    with pytest.raises(RunFailedError, match="1 of 2 runs failed") as caught:
        sweep(chosen, tmp_path)
    assert "bad" in str(caught.value)
    assert [row["seeds"] for row in read_json(tmp_path / "sweep.json")["rows"]] == [[1]]


def test_runs_share_a_model_only_with_the_same_adapter(settings: Callable[..., Settings], tmp_path: Path) -> None:
    make = build(settings)
    chosen = points({"lora.r": [2, 4], "seed": [1, 2]}, make, tmp_path)
    assert [len(group) for group in groups(chosen)] == [2, 2]
    assert len({p.folder for p in chosen}) == 4


def test_the_command(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    words = ["sweep", "finance", "--model", str(tiny_folder), "--data", str(data_folder), "--seeds", "1,2"]
    fixed = ["federation.rounds=1", "federation.clients=2", "train.max_steps=1", "eval.tasks=['fpb']", "eval.limit=6"]
    more = [w for s in [*fixed, "eval.modes=['likelihood']", "eval.base=false"] for w in ("-s", s)]
    done = CliRunner().invoke(app, [*words, *more, "--grid", "lora.r=2;4", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["where"]["lora.r"] for row in rows] == ["2", "4"]
    assert all(row["scores"]["fpb/likelihood"]["half"] is not None for row in rows)
    wrong = CliRunner().invoke(app, [*words, "--grid", "lora.r", "--out", str(tmp_path)])
    assert wrong.exit_code != 0
    assert "key=value;value" in str(wrong.exception)


def test_a_run_out_of_memory_ends_alone_and_the_summary_is_written(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = points({"seed": [1, 2, 3]}, build(settings, federation={"clients": 2, "rounds": 1}), tmp_path)
    plain = module.steps

    def sometimes(made: Settings, folder: Path, **more: Any) -> Any:
        if made.config.seed == 2:
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        return plain(made, folder, **more)

    monkeypatch.setattr(module, "steps", sometimes)
    with pytest.raises(RunFailedError, match=r"1 of 3 runs failed:\n  .*: RuntimeError: CUDA out of memory\. Tried"):
        sweep(chosen, tmp_path)
    written = read_json(tmp_path / "sweep.json")
    assert list(written["failed"]) == [chosen[1].name]
    assert [row["seeds"] for row in written["rows"]] == [[1, 3]]
    monkeypatch.setattr(module, "steps", plain)
    assert [row["seeds"] for row in sweep(chosen, tmp_path)] == [[1, 2, 3]], "the same command does the rest"


def test_what_cannot_be_shared_or_read_costs_its_own_runs(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = build(settings, federation={"clients": 2, "rounds": 1})
    chosen = points({"lora.r": [2, 4], "seed": [1, 2]}, make, tmp_path)
    plain = module.Resident.of

    def of(config: Any, seeds: Any) -> Any:
        if config.lora.r == 2:
            raise MemoryError("no room for the model")
        return plain(config, seeds)

    monkeypatch.setattr(module.Resident, "of", of)
    with pytest.raises(RunFailedError, match="2 of 4 runs failed"):
        sweep(chosen, tmp_path)
    assert [row["where"] for row in read_json(tmp_path / "sweep.json")["rows"]] == [{"lora.r": 4}]
    (chosen[2].folder / "result.json").write_text('{"cut": ')
    (chosen[3].folder / "manifest.json").write_text("[]")
    monkeypatch.setattr(module.Resident, "of", plain)
    with pytest.raises(RunFailedError, match=r"2 of 4 runs failed(.|\n)*with other settings(.|\n)*line 1"):
        sweep(chosen, tmp_path)


def test_runs_with_other_settings_are_not_taken_for_these(settings: Callable[..., Settings], tmp_path: Path) -> None:
    short = {"clients": 2, "rounds": 1}
    sweep(points({"seed": [1]}, build(settings, federation=short), tmp_path), tmp_path)
    other = points({"seed": [1]}, build(settings, federation={**short, "rounds": 2}), tmp_path)
    with pytest.raises(RunFailedError, match="has a run with other settings; choose another --out"):
        sweep(other, tmp_path)


@pytest.mark.parametrize(("axes", "told"), [({"seed": []}, "seed: has no value"), ({"seed": [1, 1]}, "has 1 twice")])
def test_a_sweep_of_nothing_or_of_one_run_twice_is_refused(
    axes: dict[str, Any], told: str, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        points(axes, build(settings), tmp_path)


def test_a_sweep_over_arms_refuses_what_one_of_them_takes_no_notice_of(tmp_path: Path) -> None:
    words = ["sweep", "finance", "--out", str(tmp_path / "out"), "--methods", "fedit,flora"]
    done = CliRunner().invoke(app, [*words, "-g", "arm=federated;centralised"])
    assert isinstance(done.exception, ConfigError), done.output
    assert "method.name = 'flora': has no effect: with arm = \"centralised\"" in str(done.exception)
    assert not (tmp_path / "out").exists()
