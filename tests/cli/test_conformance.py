"""The conformance kit on good and on wrong aggregations: it has to tell them apart."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.lora.conformance import examine
from fedtune.lora.state import from_tensors, to_tensors, with_rank
from fedtune.methods import METHODS, ServerState
from fedtune.methods.aggregation import aggregate
from fedtune.types import ConfigError

UNIVERSAL = {
    "one client is its own model",
    "identical clients are a fixed point",
    "the order of clients does not matter",
    "only the ratio of weights counts",
    "a doubled client is a doubled weight",
    "the same call gives the same result",
    "exact where A is common",
    "bfloat16 is summed in float32 or better",
}
GAUGE, EXACT = "a client's change of gauge changes nothing", "exact: the mean of the clients' updates"
BEST, MIXED = "the best approximation of its rank", "exact with mixed ranks"


def ours(name: str, states: list[dict[str, Tensor]], weights: list[float]) -> Mapping[str, Tensor]:
    """One of our methods as somebody's function: alpha = rank in, alpha = rank out."""
    from dataclasses import replace

    from fedtune.lora.base_delta import as_adapter

    read = [from_tensors(s, 1.0) for s in states]
    adapters = [{p: replace(m, alpha=float(m.rank)) for p, m in a.items()} for a in read]
    method = METHODS[name](METHODS[name].Parameters())
    after = aggregate(method, adapters, weights, ServerState(adapters[0]))[0]
    made = as_adapter(after.adapter, after.base)
    return to_tensors({p: replace(m, b=m.b * m.scale) for p, m in made.items()})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fedit", set()),
        ("flexlora", {GAUGE, BEST}),
        ("flora", {GAUGE, EXACT, MIXED}),
        ("fedex_lora", {GAUGE, EXACT}),
        ("fedmomentum", {GAUGE, EXACT, MIXED}),
        ("fedask", {GAUGE, EXACT, MIXED}),
    ],
)
def test_our_methods_keep_what_they_say(name: str, more: set[str]) -> None:
    found = examine(lambda states, weights: ours(name, states, weights))
    assert {f.name for f in found if f.holds} == UNIVERSAL | more


def transposed_residual(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """FedEx-LoRA as published: the residual transposed. On a layer that is not square it does not even fit."""
    total = sum(weights)
    mean = {n: sum(w / total * s[n] for w, s in zip(weights, states, strict=True)) for n in states[0]}
    made: dict[str, Tensor] = {}
    for name in [n for n in mean if "lora_A" in n]:
        b = name.replace("lora_A", "lora_B")
        ideal = sum(w / total * s[b] @ s[name] for w, s in zip(weights, states, strict=True))
        u, s, vh = torch.linalg.svd(mean[b] @ mean[name] + (ideal - mean[b] @ mean[name]).T)
        made |= {name: vh, b: u * s}
    return made


def first_client_only(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """A typo that keeps client 0 times its weight, as in a published baseline."""
    return {n: t * weights[0] / sum(weights) for n, t in states[0].items()}


def weights_on_both(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Stacking with the weight on both factors."""
    total = sum(weights)
    return {
        n: torch.cat([w / total * s[n] for w, s in zip(weights, states, strict=True)], dim=0 if "lora_A" in n else 1)
        for n in states[0]
    }


@pytest.mark.parametrize("wrong", [transposed_residual, first_client_only, weights_on_both])
def test_published_mistakes_are_found(wrong: object) -> None:
    found = examine(wrong)  # type: ignore[arg-type]
    assert any(f.damning for f in found)
    assert not next(f for f in found if f.name == EXACT).holds


def test_the_command_prints_and_exits_by_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_code.py").write_text(
        "def mean(states, weights):\n"
        "    total = sum(weights)\n"
        "    return {n: sum(w / total * s[n].float() for w, s in zip(weights, states)).double() for n in states[0]}\n"
        "def exact(states, weights):\n"
        "    total = sum(weights)\n"
        "    return {n: sum(w / total * s[n].double() for w, s in zip(weights, states)) for n in states[0]}\n"
        "def first(states, weights):\n"
        "    return states[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    good = CliRunner().invoke(app, ["conformance", "--callable", "their_code:exact"])
    assert good.exit_code == 0, good.output
    assert "holds" in good.output
    assert "does not hold" in good.output
    bad = CliRunner().invoke(app, ["conformance", "--callable", "their_code:first", "--json"])
    assert bad.exit_code == 1
    with pytest.raises(ConfigError, match='did you mean "exact"'):
        CliRunner().invoke(app, ["conformance", "--callable", "their_code:exat"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="No module named"):
        CliRunner().invoke(app, ["conformance", "--callable", "nowhere_at_all:f"], catch_exceptions=False)
    with pytest.raises(ConfigError, match=r"is not package\.module:function"):
        CliRunner().invoke(app, ["conformance", "--callable", "nowhere"], catch_exceptions=False)
    assert str(tmp_path) not in sys.path


def test_a_smaller_rank_of_the_same_scale_is_a_part() -> None:
    from tests.methods.test_methods import START

    module = next(iter(START.values()))
    cut = with_rank(module, 1)
    assert torch.allclose(cut.scale * cut.b @ cut.a, module.scale * module.b[:, :1] @ module.a[:1])


def test_mixed_ranks_are_not_tried_on_a_method_that_takes_one() -> None:
    for name, tried in (("fedit", False), ("flora", True)):
        done = CliRunner().invoke(app, ["conformance", "--method", name])
        assert (MIXED in done.output) is tried, done.output
        assert "Error" not in done.output
