"""Whole runs in each space: bytes, killed and resumed, in cohorts, saved, evaluated from the folder, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune import methods, spaces
from fedtune.config import Config, Settings
from fedtune.config.load import unranked_reasons
from fedtune.config.protocol import read_protocol
from fedtune.experiment.evaluate import evaluate
from fedtune.experiment.run import run
from fedtune.federation.checkpoint import rounds_of
from fedtune.io import read_json
from fedtune.lora.state import Plain
from fedtune.methods import RoundContext
from fedtune.methods.state import ClientUpdate, ServerState
from fedtune.settings import load
from fedtune.types import CancelledError, ConfigError
from tests.experiment.test_methods_run import Stops, _end

KINDS = ("ia3", "full")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_counts_its_bytes_resumes_bit_for_bit_and_is_evaluated_from_its_folder(
    made: Callable[..., Settings], tmp_path: Path, kind: str
) -> None:
    chosen = made(kind)
    path, result = run(chosen, tmp_path / "whole")
    assert (result.rounds, result.lost_clients) == (2, 0)
    assert result.bytes_down + result.bytes_up == result.bytes_predicted
    with pytest.raises(CancelledError):
        run(chosen, tmp_path / "cut", reporter=Stops(1))
    again, resumed = run(chosen, tmp_path / "cut", resume=True)
    one, two = _end(path), _end(again)
    assert all(torch.equal(one[n], two[n]) for n in one | two)
    assert (path / "rounds.jsonl").read_bytes() == (again / "rounds.jsonl").read_bytes()
    assert resumed.arms == result.arms
    config, folder = chosen.config, path / spaces.of(chosen.config).folder
    if kind == "full":
        config, adapter = made(kind, model={"name": str(folder)}).config, None
    else:
        adapter = folder
    [score] = evaluate(config, adapter, tmp_path / "evals")
    assert score.score == result.arms[-1].scores[0].score


def test_a_cohort_trains_one_client_after_the_other(made: Callable[..., Settings], tmp_path: Path) -> None:
    short = {"rounds": 1}
    one, _ = run(made("ia3", federation=short, engine={"executor": "sequential"}), tmp_path / "sequential")
    other, _ = run(made("ia3", federation=short, engine={"executor": "cohort", "cohort": 3}), tmp_path / "cohort")
    assert read_json(other / "manifest.json")["plan"]["cohort"] == 1
    assert all(torch.equal(t, _end(other)[n]) for n, t in _end(one).items())


def test_full_parameters_in_bfloat16_travel_so_and_are_kept_in_float32(
    made: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = made("full", model={"dtype": "bfloat16"}, server={"optimizer": "fedavgm", "learning_rate": 0.3})
    path, result = run(chosen, tmp_path / "whole")
    assert (result.rounds, result.lost_clients) == (2, 0)
    assert result.bytes_down + result.bytes_up == result.bytes_predicted
    with pytest.raises(CancelledError):
        run(chosen, tmp_path / "cut", reporter=Stops(1))
    again, _ = run(chosen, tmp_path / "cut", resume=True)
    one, two, saved = _end(path), _end(again), safetensors.torch.load_file(path / "model/model.safetensors")
    assert {t.dtype for t in one.values()} == {torch.float32}
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(one[n], two[n]) for n in one | two)
    assert all(torch.equal(one[n].bfloat16(), t) for n, t in saved.items())
    assert any(not torch.equal(one[n], t.float()) for n, t in saved.items())
    # a header for each tensor, and two bytes for each parameter, from and to three clients in two rounds
    numbers = result.trainable_parameters
    assert result.bytes_predicted == 2 * 2 * 3 * (2 * numbers + 128 * len(saved))


AROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "fedkseed": ("full", {"method": {"name": "fedkseed", "seeds": 8}}),
    "scaffold": ("ia3", {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}}),
    "fedadam": ("ia3", {"server": {"optimizer": "fedadam"}, "drift": {"proximal_mu": 0.1}}),
    "robust": ("full", {"robust": {"rule": "trimmed"}, "attack": {"kind": "sign-flip", "clients": [1], "scale": 2.0}}),
    "bfloat16": (
        "full",
        {"model": {"dtype": "bfloat16"}, "drift": {"scaffold": True}, "train": {"optimizer": "sgd"}},
    ),
    "bfloat16 by seeds": ("full", {"model": {"dtype": "bfloat16"}, "method": {"name": "fedkseed", "seeds": 8}}),
    "local-only": ("full", {"arm": "local-only"}),
}


@pytest.mark.parametrize("what", AROUND)
def test_what_goes_around_a_method_goes_around_it_here(
    made: Callable[..., Settings], tmp_path: Path, what: str
) -> None:
    kind, more = AROUND[what]
    _, result = run(made(kind, federation={"rounds": 1}, **more), tmp_path / "run")
    assert (result.rounds, result.lost_clients) == (1, 0)


def test_a_robust_rule_drops_who_stands_apart() -> None:
    robust = {"rule": "multi-krum", "malicious": 1}
    federation = {"clients": 5, "fraction": 1.0}
    chosen = load([{"domain": "finance", "peft": {"kind": "full"}, "robust": robust, "federation": federation}]).config
    algorithm = methods.create(chosen)
    state = ServerState(Plain("full", {"w": torch.zeros(4), "v": torch.zeros(2, 2)}))
    moves = [1.0, 1.1, 0.9, 1.05, 50.0]
    updates = [ClientUpdate(c, {"w": torch.full((4,), m), "v": torch.ones(2, 2)}, 1.0) for c, m in enumerate(moves)]
    after = algorithm.server_step(updates, state, RoundContext(1))
    assert isinstance(after.adapter, Plain)
    assert torch.allclose(after.adapter.tensors["w"], torch.full((4,), 4.05 / 4), atol=1e-6)


def test_a_boost_beyond_what_a_round_can_do_to_a_weight_is_refused(
    made: Callable[..., Settings], tmp_path: Path
) -> None:
    attack = {"kind": "boost", "clients": [1], "scale": 50.0}
    path, result = run(made("full", federation={"rounds": 1}, attack=attack), tmp_path / "run")
    [record] = rounds_of(path)
    assert result.lost_clients == 1
    assert [(r.client, r.reason) for r in record.rejected] == [(1, "values")]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"peft": {"kind": "ia-3"}}, r'unknown space; did you mean "ia3"\?'),
    "of another": ({"peft": {"kind": "full", "target_modules": ["q_proj"]}}, "full has no such setting"),
    "lora": ({"peft": {"kind": "ia3"}, "lora": {"r": 8}}, r'lora.r = 8: has no effect with peft.kind = "ia3"'),
    "dora": ({"peft": {"kind": "full"}, "lora": {"dora": True}}, r"lora.dora = True: has no effect"),
    "targets": ({"peft": {"kind": "lora", "target_modules": ["q_proj"]}}, "lora has no such setting"),
    "feed-forward": (
        {"peft": {"kind": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]}},
        "'up_proj' is none of peft.target_modules",
    ),
    "quantised": ({"peft": {"kind": "full"}, "model": {"quantization": 4}}, "quantised weights cannot be trained"),
    "method": (
        {"peft": {"kind": "ia3"}, "method": {"name": "flora"}},
        'flora is not defined with peft.kind = "ia3"; .*fedit',
    ),
    "gauge": ({"peft": {"kind": "full"}, "attack": {"kind": "gauge", "clients": [1]}}, "there is no gauge"),
    "robust": ({"robust": {"rule": "krum", "malicious": 0}}, "not bounded by what a rule lets through"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    tree, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said):
        load([{"domain": "finance", **tree}])


def test_a_protocol_of_lora_leaves_its_lora_out_and_does_not_rank_another_space() -> None:
    protocol = read_protocol("flowertune-paper")
    tree = {"domain": "finance", "protocol": protocol.name, "peft": {"kind": "ia3"}, "model": {"quantization": 0}}
    config = load([tree], here=False).config
    assert config.lora == Config(domain="finance").lora
    assert unranked_reasons(config, protocol) == ("peft.kind is 'ia3', the protocol flowertune-paper trains LoRA",)
