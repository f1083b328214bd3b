"""Every method through whole runs on the tiny model: three rounds, its bytes, killed and resumed, mixed ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch

from fedtune.config import Settings
from fedtune.experiment.arms import Arm
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.io import read_json, read_lines
from fedtune.lora.state import PREFIX, LoraModule
from fedtune.methods import METHODS, ServerState
from fedtune.types import CancelledError


class Stops(Reporter):
    """Asks the run to stop after a round, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: Any) -> None:
        if record.round == self.after:
            raise CancelledError(2)


def _end(path: Path) -> dict[str, torch.Tensor]:
    newest = sorted((path / "checkpoints").glob("round-*"))[-1]
    return safetensors.torch.load_file(newest / "state.safetensors")


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_runs_three_rounds_and_resumes_bit_for_bit(
    settings: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    made = settings(method={"name": name}, federation={"clients": 2}, eval={"limit": 2})
    path, result = run(made, tmp_path / "whole")
    assert (result.rounds, result.skipped_rounds, result.lost_clients) == (3, 0, 0)
    if result.bytes_predicted is not None:
        assert result.bytes_down + result.bytes_up == result.bytes_predicted
    each = result.arms[-1].per_client
    assert bool(each) is (METHODS[name].models != "global")
    assert all(len(values) == 2 for values in each.values())
    assert (path / "adapter").exists() is (METHODS[name].models != "own")
    with pytest.raises(CancelledError):
        run(made, tmp_path / "cut", reporter=Stops(2))
    again, resumed = run(made, tmp_path / "cut", resume=True)
    one, two = _end(path), _end(again)
    assert set(one) == set(two)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert (path / "rounds.jsonl").read_bytes() == (again / "rounds.jsonl").read_bytes()
    assert resumed.arms == result.arms


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].mixed_ranks])
def test_clients_of_different_ranks(settings: Callable[..., Settings], tmp_path: Path, name: str) -> None:
    lora = {"r": 4, "ranks": [2, 4]}
    made = settings(method={"name": name}, lora=lora, federation={"clients": 2, "rounds": 2}, eval={"limit": 2})
    path, result = run(made, tmp_path / "run")
    assert (result.rounds, result.lost_clients) == (2, 0)
    assert read_json(path / "adapter/adapter_config.json")["r"] >= 4


def test_ranks_by_share(settings: Callable[..., Settings], tmp_path: Path) -> None:
    lora = {"r": 4, "ranks": {2: 0.5, 4: 0.5}}
    path, result = run(settings(method={"name": "flexlora"}, lora=lora, eval={"limit": 2}), tmp_path / "run")
    assert result.bytes_down + result.bytes_up == result.bytes_predicted
    with pytest.raises(CancelledError):
        run(settings(method={"name": "flexlora"}, lora=lora, eval={"limit": 2}), tmp_path / "cut", reporter=Stops(1))
    _, resumed = run(settings(method={"name": "flexlora"}, lora=lora, eval={"limit": 2}), tmp_path / "cut", resume=True)
    assert resumed.arms == result.arms
    assert path.exists()


@pytest.mark.parametrize(
    "around",
    [
        {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}},
        {"server": {"optimizer": "fedadam"}},
        {"server": {"optimizer": "fedyogi", "convention": "flower"}, "method": {"name": "ffa_lora"}},
        {
            "robust": {"rule": "trimmed"},
            "attack": {"kind": "boost", "clients": [1]},
            "method": {"name": "flexlora"},
        },
        {"robust": {"clip_norm": "median"}, "method": {"name": "flora"}},
        {"robust": {"clip_norm": 0.5}, "method": {"name": "ffa_lora"}},
        {"method": {"name": "ffa_lora"}, "lora": {"dora": True}},
        {"attack": {"kind": "label-flip", "clients": [0]}, "method": {"name": "flexlora"}, "lora": {"dora": True}},
        {"method": {"name": "fedsvd"}, "lora": {"dora": True}},
    ],
    ids=str,
)
def test_what_is_around_a_method_runs_and_resumes(
    settings: Callable[..., Settings], tmp_path: Path, around: dict[str, Any]
) -> None:
    made = settings(**around, federation={"clients": 3, "rounds": 2}, eval={"limit": 2})
    path, result = run(made, tmp_path / "whole")
    assert (result.rounds, result.lost_clients) == (2, 0)
    if result.bytes_predicted is not None:
        assert result.bytes_down + result.bytes_up == result.bytes_predicted
    with pytest.raises(CancelledError):
        run(made, tmp_path / "cut", reporter=Stops(1))
    again, _ = run(made, tmp_path / "cut", resume=True)
    one, two = _end(path), _end(again)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_flipped_labels_are_the_attackers_only(settings: Callable[..., Settings]) -> None:
    from fedtune.objectives import Example
    from fedtune.training.workload import EncodedShards, poisoned

    shard = (Example.labelled((1, 2, 7), 2), Example.labelled((1, 3, 8), 2), Example.labelled((1, 4, 7), 2))
    shards = EncodedShards((shard, shard), (), 0)
    config = settings(attack={"kind": "label-flip", "clients": [1]}).config
    changed = poisoned(shards, config).shards
    assert changed[0] == shard
    assert [text.ids for example in changed[1] for text in example.texts] == [(1, 2, 8), (1, 3, 7), (1, 4, 8)]
    assert poisoned(shards, settings().config) is shards


def test_a_client_lost_between_two_exchanges_is_out_of_the_round(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """FedASK: who sends the first sketch and not the second counts as lost; the others' round goes on."""
    faults = {"dropout": 0.3}
    made = settings(method={"name": "fedask"}, federation={"faults": faults, "rounds": 3}, eval={"limit": 2})
    path, result = run(made, tmp_path / "run")
    rounds = read_lines(path / "rounds.jsonl")
    assert result.lost_clients > 0
    assert all(len(r["clients"]) + len(r["rejected"]) == len(r["cohort"]) for r in rounds)


@pytest.mark.parametrize("name", ["fedsa_lora", "flora"])
def test_clients_come_and_go(settings: Callable[..., Settings], tmp_path: Path, name: str) -> None:
    """With half of the clients a round, kept tensors and side adapters are still each client's own and complete."""
    made = settings(
        method={"name": name}, federation={"fraction": 0.5, "rounds": 4, "clients": 4}, eval={"limit": 2, "every": 2}
    )
    path, result = run(made, tmp_path / "run")
    assert result.lost_clients == 0
    assert [line["round"] for line in read_lines(path / "curve.jsonl")] == [2]
    assert (path / "clients").exists()


def test_a_clients_own_model_after_a_round_has_nothing_of_later_ones(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """A run killed in round 3 has what its clients kept in that round; round 2 is measured without it."""
    made = settings(method={"name": "fedsa_lora"}, federation={"rounds": 5}).config
    start = {"q": LoraModule(torch.ones(2, 3), torch.zeros(4, 2), 1.0)}
    nobody = cast(Any, None)
    arm = Arm(made, nobody, nobody, start, "run", tmp_path, Reporter(), nobody)
    name = PREFIX + "q.lora_B.weight"
    for round_ in (1, 2, 3):
        arm.private.save(0, (round_, 1), {name: torch.full((4, 2), float(round_))})
    assert [float(arm.own_model(ServerState(start, 1), 0, n)[name][0, 0]) for n in (1, 2, 3, 5)] == [1, 2, 3, 3]
