"""The objective of docs/add-an-objective.md, as it stands there, through whole runs on the tiny model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune import objectives
from fedtune.config import Config, Settings
from fedtune.data.check import TrainRow
from fedtune.data.conversation import Turn
from fedtune.experiment.run import run
from fedtune.io import read_json, read_lines
from fedtune.objectives import Example, Objective
from fedtune.objectives.examples import encode, encode_once
from fedtune.settings import load
from fedtune.types import CancelledError, ConfigError
from tests.conftest import ASK, SENTENCES, write_jsonl
from tests.experiment.test_methods_run import Stops
from tests.tiny import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs/add-an-objective.md"
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def simpo() -> type[Objective[Any]]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "simpo"}
    exec(compile(code, str(PAGE), "exec"), names)
    found: type[Objective[Any]] = names["SimPO"]
    return found


@pytest.fixture
def known(simpo: type[Objective[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.OBJECTIVES.own, "simpo", simpo)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A folder whose rows have a wrong answer beside the right one; every third is a conversation."""
    root = tmp_path_factory.mktemp("pairs")
    labelled = [(label, text) for label, texts in SENTENCES.items() for text in texts]
    rows: list[dict[str, Any]] = []
    for number, (label, text) in enumerate(labelled * 4):
        wrong = next(other for other in SENTENCES if other != label)
        row: dict[str, Any] = {"instruction": ASK, "input": text, "output": label}
        if number % 3 == 0:
            said = ["Are you there?", "Yes.", f"{ASK} {text}", label]
            row = {
                "messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, said, strict=True)]
            }
        rows.append({**row, "rejected": wrong})
    rows.append({"instruction": ASK, "input": "No pair.", "output": "neutral"})
    write_jsonl(root / "train/finance_pairs.jsonl", rows)
    (root / "eval").symlink_to(data_folder / "eval")
    return root


@pytest.fixture
def preferring(known: None, settings: Callable[..., Settings], pairs: Path) -> Callable[..., Settings]:
    def build(**changes: Any) -> Settings:
        own = {"name": "simpo", **changes.pop("objective", {})}
        return settings(objective=own, data__path=str(pairs), train__max_length=256, **changes)

    return build


def test_both_answers_follow_one_question_and_only_they_are_labels(
    preferring: Callable[..., Settings], simpo: type[Objective[Any]]
) -> None:
    config = preferring().config
    objective = objectives.build(config)
    turns: tuple[Turn, ...] = (("Are you there?", "Yes."), ("Well?", "positive"))
    for row in (TrainRow("Well?", "", "positive"), TrainRow("", "", "", turns=turns)):
        found = encode([replace(row, columns={"rejected": "negative"})], objective, TOKENIZER, config)
        (example,) = found.examples
        chosen, rejected = example.texts
        assert [len(text.spans) for text in example.texts] == [1, 1]
        assert chosen.ids[: chosen.start] == rejected.ids[: rejected.start]
        assert TOKENIZER.decode(chosen.ids[chosen.start :]) == " positive<|im_end|>"
        assert TOKENIZER.decode(rejected.ids[rejected.start :]) == " negative<|im_end|>"


def test_a_pair_is_set_aside_whole_and_counts_as_cut_where_one_text_is(preferring: Callable[..., Settings]) -> None:
    config = preferring().config.model_copy(
        update={"train": preferring().config.train.model_copy(update={"max_length": 64})}
    )
    objective = objectives.build(config)
    rows = [
        TrainRow("a", "", "good", columns={"rejected": "bad"}),
        TrainRow("a", "", "good", columns={"rejected": "bad " * 80}),
        TrainRow("a " * 80, "", "good", columns={"rejected": "bad"}),
    ]
    found = encode(rows, objective, TOKENIZER, config)
    assert (found.kept, found.truncated, found.masked) == ((0, 1), (1,), (2,))
    assert all(len(text.ids) <= 64 for example in found.examples for text in example.texts)


def test_what_an_objective_encodes_by_code_of_its_own_is_not_kept(
    preferring: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    config = preferring().config
    rows = [TrainRow("a", "", "good", columns={"rejected": "bad"})]
    objective = objectives.build(config)
    assert encode_once(rows, objective, TOKENIZER, config) == encode(rows, objective, TOKENIZER, config)
    assert not (tmp_path / "tokens").exists()


def test_the_first_loss_is_worked_out_by_hand_and_exchanged_answers_change_its_side(
    simpo: type[Objective[Any]],
) -> None:
    objective = simpo(simpo.Parameters(beta=2.0, margin=0.5))
    example = Example.labelled((1, 2, 3), 1)
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])
    # 2 * (-2 + 4) - 0.5 = 3.5, and exchanged -4.5
    assert float(objective.loss([chosen, rejected], example)) == pytest.approx(0.0297503, rel=1e-5)
    assert float(objective.loss([rejected, chosen], example)) == pytest.approx(4.5110478, rel=1e-6)


def _end(path: Path) -> dict[str, torch.Tensor]:
    newest = sorted((path / "checkpoints").glob("round-*"))[-1]
    return safetensors.torch.load_file(newest / "state.safetensors")


def test_a_run_learns_the_preference_and_resumes_bit_for_bit(
    preferring: Callable[..., Settings], tmp_path: Path
) -> None:
    made = preferring(federation={"rounds": 3}, train={"max_steps": 3, "learning_rate_max": 5e-2}, eval={"limit": 2})
    path, _ = run(made, tmp_path / "whole")
    losses = [line["loss"] for line in read_lines(path / "rounds.jsonl")]
    assert losses[0] == pytest.approx(0.974, abs=0.05)  # softplus of the margin: no answer is ahead yet
    assert losses[-1] < losses[0] - 0.05
    report = read_json(path / "data.json")
    assert report["counts"] == {"missing_column": 1}
    with pytest.raises(CancelledError):
        run(made, tmp_path / "cut", reporter=Stops(1))
    again, _ = run(made, tmp_path / "cut", resume=True)
    one, two = _end(path), _end(again)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert (path / "rounds.jsonl").read_bytes() == (again / "rounds.jsonl").read_bytes()


@pytest.mark.parametrize(
    "around",
    [
        {"method": {"name": "fedkseed"}},
        {"method": {"name": "fedalt"}},
        {"engine": {"executor": "cohort", "cohort": 2}},
    ],
)
def test_methods_and_executors_train_by_it(
    preferring: Callable[..., Settings], tmp_path: Path, around: dict[str, Any]
) -> None:
    path, result = run(preferring(**around, federation={"rounds": 1}, eval={"limit": 2}), tmp_path / "run")
    assert (result.rounds, result.lost_clients) == (1, 0)
    lines = read_lines(path / "rounds.jsonl")
    assert all(line["loss"] > 0 and not line["notes"] for line in lines)


def test_a_run_by_another_objective_is_not_ranked(known: None) -> None:
    tree = {"domain": "finance", "protocol": "corrected"}
    assert load([tree], here=False).unranked == ()
    assert load([{**tree, "objective": {"name": "simpo"}}], here=False).unranked == (
        "it trains by the objective simpo, and cross-entropy is what is ranked",
    )


def _refused(build: Callable[..., Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    return str(caught.value)


def test_wrong_settings_are_refused_by_name(preferring: Callable[..., Any], settings: Callable[..., Any]) -> None:
    assert 'objective.name = "simp": unknown objective; did you mean "simpo"?' in _refused(
        settings, objective={"name": "simp"}
    )
    assert 'objective.betta: unknown key; did you mean "beta"?' in _refused(preferring, objective={"betta": 1.0})
    assert "objective.beta = -1.0" in _refused(preferring, objective={"beta": -1.0})
    assert "objective.beta: unknown key; cross-entropy has no such setting" in _refused(settings, objective__beta=1.0)
    assert "label-flip" in _refused(preferring, attack={"kind": "label-flip", "clients": [1]})


def test_a_problem_that_an_objective_has_with_other_settings_is_told(
    preferring: Callable[..., Any], simpo: type[Objective[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.types import Problem

    def problems(config: Config) -> Any:
        if config.train.batch == 4:
            yield Problem("train.per_device_train_batch_size", "is too small for it")

    monkeypatch.setattr(simpo, "problems", problems)
    assert "is too small for it" in _refused(preferring)
    preferring(train__per_device_train_batch_size=5)
