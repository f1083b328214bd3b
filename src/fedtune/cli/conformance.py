"""`fedtune conformance`: which identities an aggregation keeps, somebody's own function or a method by its name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.say import say
from fedtune.types import ConfigError, Problem, nearest

if TYPE_CHECKING:
    from fedtune.lora.conformance import Finding
    from fedtune.methods import Method


def _function(name: str) -> Any:
    """Import `package.module:function`, also from the working directory. Raises ConfigError: it is none."""
    where, _, what = name.partition(":")
    if not where or not what:
        raise ConfigError("command line", [Problem(f"--callable {name}", "is not package.module:function")])
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(where)
    except ImportError as err:
        raise ConfigError("command line", [Problem(f"--callable {name}", str(err))]) from err
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, what, None)):
        known = [n for n in vars(module) if callable(getattr(module, n))]
        raise ConfigError("command line", [Problem(f"--callable {name}", f"no function {what}", nearest(what, known))])
    return getattr(module, what)


def _of_method(name: str) -> Any:
    """Return a method's server half, with its default settings, as such a function. Raises ConfigError: it has none."""
    from fedtune.experiment.aggregate import build
    from fedtune.lora import conformance as kit
    from fedtune.lora.base_delta import as_adapter
    from fedtune.lora.state import from_tensors, to_tensors, with_tensors
    from fedtune.methods import ServerState
    from fedtune.methods.aggregation import aggregate

    method = build(name, {})
    if method.models == "own":
        raise ConfigError("command line", [Problem(f"--method {name}", "has no global model that could be examined")])

    def aggregated(states: list[kit.State], weights: list[float]) -> kit.State:
        start = to_tensors(kit.ONE)
        # what all clients have alike, such as a frozen factor
        common = {n for n in start if not method.trainable(1, n)}
        adapters = []
        for state in states:
            whole = {**state, **{n: start[n].to(state[n].dtype) for n in common if n in state}}
            adapters.append({p: replace(m, alpha=float(m.rank)) for p, m in from_tensors(whole, 1.0).items()})
        # all start from another model than any of them, but for what is common
        began = {**to_tensors(kit.random_adapter(9)), **{n: start[n] for n in common}}
        first = with_tensors(adapters[0], {n: began.get(n, t) for n, t in to_tensors(adapters[0]).items()})
        after, _ = aggregate(method, adapters, weights, ServerState(first))
        made = as_adapter(after.adapter, after.base)
        return to_tensors({p: replace(m, b=m.b * m.scale) for p, m in made.items()})

    return aggregated


def _tried(kind: type[Method], found: Sequence[Finding]) -> list[Finding]:
    """Return what was found of a method; mixed ranks are not tried on one that takes one rank."""
    from fedtune.lora.conformance import MIXED

    kept = [f for f in found if kind.mixed_ranks or f.name != MIXED]
    return [replace(f, whose=_excused(kind.guarantee).get(f.name, f.whose)) for f in kept]


def _excused(guarantee: str) -> dict[str, str]:
    """Return the identities that a method does not promise, each with those who do."""
    from fedtune.lora.conformance import COMMON_A, FIXED_POINTS

    # one that weights clients in a way of its own, say
    exact = {} if guarantee == "exact" else {COMMON_A: "exact methods"}
    return exact | (dict.fromkeys(FIXED_POINTS, "methods with a fixed point") if guarantee == "none" else {})


def conformance(
    callable_: Annotated[str | None, typer.Option("--callable", help="package.module:function")] = None,
    method: Annotated[str | None, typer.Option(help="A method, also of another package: fedtune ls methods")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try a function (list of PEFT states, list of weights) -> state on the identities of LoRA aggregation.

    The states have alpha = rank, so that a delta is B A. It exits with 1 if an identity that every aggregation should
    keep does not hold. With --method it is a method's server half, from the first client's adapter.
    """
    from fedtune.lora.conformance import examine
    from fedtune.methods import METHODS

    if (callable_ is None) == (method is None):
        raise ConfigError("command line", [Problem("conformance", "takes either --callable or --method")])
    found = examine(_of_method(method) if method else _function(str(callable_)))
    if method:
        found = _tried(METHODS[method], found)
    if json_output:
        typer.echo(json.dumps([vars(f) for f in found], indent=1))
    else:
        for finding in found:
            mark = "holds" if finding.holds else "FAILS" if finding.damning else "does not hold"
            size = "" if finding.error is None else f"{finding.error:.1e}"
            say(f"{mark:13} {size:>8}  {finding.name}  ({finding.raised or finding.whose})")
    if any(finding.damning for finding in found):
        raise typer.Exit(1)
