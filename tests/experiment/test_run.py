"""Whole runs on the tiny model: arms, results, data reports, and every part of the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Settings
from fedtune.experiment.arms import derive
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.io import read_json, read_lines
from fedtune.results.schema import Result
from fedtune.types import DataError
from tests.conftest import ASK, write_jsonl

# one worker makes the long run, once
pytestmark = pytest.mark.xdist_group("whole-run")


class Recorder(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = self.rounds = self.closed = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, client: int, tokens: int, loss: float) -> None:
        self.steps += 1

    def round(self, record: Any) -> None:
        self.rounds += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def done(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Recorder]:
    watch = Recorder()
    made = settings(
        eval={"base": True, "modes": ["likelihood", "official"], "official_limit": 4, "limit": 12, "every": 2}
    )
    out = tmp_path_factory.mktemp("runs") / "all"
    path, result = run(made, out, extra_arms=["federated", "local-only", "centralised"], reporter=watch)
    return path, result, watch


def test_the_run_folder_has_everything_a_reader_needs(done: tuple[Path, Result, Recorder]) -> None:
    path, result, _ = done
    names = {p.name for p in path.iterdir()}
    assert {
        "config.toml",
        "manifest.json",
        "rounds.jsonl",
        "timings.jsonl",
        "result.json",
        "data.json",
        "adapter",
    } <= names
    manifest = read_json(path / "manifest.json")
    assert manifest["status"] == "complete"
    assert manifest["config_sha256"] == result.config_sha256
    assert manifest["data"]["sha256"] == manifest["identity"]["data"]
    assert {"training", "evaluation"} <= set(manifest["seconds"])
    assert manifest["peak_memory_bytes"] > 0
    assert manifest["versions"]["torch"]
    assert Result.model_validate(read_json(path / "result.json")) == result
    curve = read_lines(path / "curve.jsonl")
    assert [(line["round"], line["mode"]) for line in curve] == [(2, "likelihood"), (2, "official")]


def test_bytes_counted_are_bytes_predicted(done: tuple[Path, Result, Recorder]) -> None:
    _, result, _ = done
    assert result.bytes_down + result.bytes_up == result.bytes_predicted


def test_every_arm_is_matched_by_steps(done: tuple[Path, Result, Recorder]) -> None:
    _, result, watch = done
    arms = {a.name: a for a in result.arms}
    assert list(arms) == ["base", "federated", "local-only", "centralised"]
    assert arms["federated"].steps == arms["local-only"].steps == arms["centralised"].steps == 3 * 4 * 2
    assert watch.steps == 3 * 24
    assert watch.closed == 1
    spread = arms["local-only"].per_client["fpb/likelihood"]
    assert len(spread) == 4
    mean = next(s.score for s in arms["local-only"].scores if s.mode == "likelihood")
    assert mean == pytest.approx(sum(v for v in spread if v is not None) / 4)


def test_scores_come_with_what_is_needed_to_doubt_them(done: tuple[Path, Result, Recorder]) -> None:
    _, result, _ = done
    for arm in result.arms:
        by_mode = {s.mode: s for s in arm.scores}
        assert (by_mode["likelihood"].n, by_mode["official"].n) == (12, 4)
        assert set(by_mode["likelihood"].trivial) == {
            "majority",
            "always-negative",
            "always-neutral",
            "always-positive",
        }
        assert by_mode["official"].valid_rate is not None
        score, interval = by_mode["likelihood"].score, by_mode["likelihood"].interval
        assert score is not None
        assert interval is not None
        assert interval[0] <= score <= interval[1]


def test_the_adapter_loads_with_peft_alone(done: tuple[Path, Result, Recorder], tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, _, _ = done
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain = base(input_ids=torch.tensor([[5, 6, 7]])).logits.detach().clone()
    tuned = PeftModel.from_pretrained(base, path / "adapter").eval()
    assert not torch.allclose(tuned(input_ids=torch.tensor([[5, 6, 7]])).logits, plain)


def test_a_run_is_the_same_twice(settings: Callable[..., Settings], tmp_path: Path) -> None:
    one, _ = run(settings(), tmp_path / "one")
    two, _ = run(settings(), tmp_path / "two")
    for name in (
        "adapter/adapter_model.safetensors",
        "rounds.jsonl",
        "result.json",
        "evals/federated/fpb.likelihood.jsonl",
    ):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_training_lowers_the_loss(settings: Callable[..., Settings], tmp_path: Path) -> None:
    train = {"max_steps": 10, "learning_rate_max": 3e-2, "learning_rate_min": 1e-2}
    made = settings(train=train, federation={"rounds": 4}, lora={"r": 8, "target_modules": ["all-linear"]})
    path, _ = run(made, tmp_path / "r")
    losses = [line["loss"] for line in read_lines(path / "rounds.jsonl")]
    assert losses[-1] < losses[0] - 0.03


def test_centralised_is_one_client_with_a_cohorts_steps(settings: Callable[..., Settings]) -> None:
    config = settings(federation={"clients": 10, "fraction": 0.5}, train={"max_steps": 3}).config
    central = derive(config, "centralised")
    assert (central.federation.clients, central.train.max_steps, central.data.partition) == (1, 15, "iid")
    assert derive(config, "local-only").train == config.train


def test_bad_rows_are_reported_in_the_folder_and_never_train(
    settings: Callable[..., Settings], data_folder: Path, tmp_path: Path
) -> None:
    import shutil

    root = Path(shutil.copytree(data_folder, tmp_path / "data"))
    good = [{"instruction": ASK, "input": f"Row {i} .", "output": "neutral"} for i in range(12)]
    bad = [{"instruction": ASK, "output": ""}, {"instruction": "x " * 400, "input": "", "output": "unreachable"}]
    write_jsonl(root / "train/finance_toy.jsonl", good + bad)
    watch = Recorder()
    made = settings(data={"path": str(root)}, federation={"clients": 2, "rounds": 1})
    path, _ = run(made, tmp_path / "run", reporter=watch)
    report = read_json(path / "data.json")
    assert report["counts"] == {"empty_answer": 1}
    assert report["problems"][0] == {"row": 12, "kind": "empty_answer", "detail": "'output'", "action": "dropped"}
    assert len(report["masked_rows"]) == 1
    assert "1 with an empty answer, 1 without a label (the answer was cut off or not found)" in watch.notes[0]


def test_a_set_without_labels_is_refused_before_training(settings: Callable[..., Settings], tmp_path: Path) -> None:
    made = settings(prompt={"template": "[INST] {instruction} [/INST]{response}"}, train={"labels": "template-tokens"})
    with pytest.raises(DataError, match="none of 48 rows has a label left"):
        run(made, tmp_path / "run")


def test_a_missing_evaluation_set_is_known_before_training(settings: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tfns_validation"):
        run(settings(eval={"tasks": ["fpb", "tfns"]}), tmp_path / "run")
    assert not (tmp_path / "run/manifest.json").exists()


@pytest.mark.parametrize("clients", [48, 60])
def test_tiny_and_empty_shards_are_survived(settings: Callable[..., Settings], tmp_path: Path, clients: int) -> None:
    watch = Recorder()
    made = settings(federation={"clients": clients, "rounds": 1, "fraction": 0.1}, eval={"limit": 2})
    _, result = run(made, tmp_path / "run", reporter=watch)
    assert result.lost_clients == 0
    assert any("without examples, never asked" in n for n in watch.notes) is (clients == 60)


@pytest.mark.parametrize("lora", [{"dora": True}, {"rslora": True, "dropout": 0.1}, {"target_modules": ["all-linear"]}])
def test_every_kind_of_adapter_runs(settings: Callable[..., Settings], tmp_path: Path, lora: dict[str, Any]) -> None:
    made = settings(lora=lora, drift={"proximal_mu": 0.1}, federation={"rounds": 2}, eval={"limit": 2})
    _, result = run(made, tmp_path / "run")
    assert result.rounds == 2
    assert result.bytes_down + result.bytes_up == result.bytes_predicted


@pytest.mark.parametrize("arm", ["local-only", "centralised"])
def test_an_arm_can_be_the_run(settings: Callable[..., Settings], tmp_path: Path, arm: str) -> None:
    path, result = run(settings(arm=arm, federation={"clients": 2, "rounds": 1}, eval={"limit": 4}), tmp_path / "run")
    assert [a.name for a in result.arms] == [arm]
    where = path / "arms/local-only/client-0001" if arm == "local-only" else path
    assert (where / "adapter/adapter_model.safetensors").exists()
