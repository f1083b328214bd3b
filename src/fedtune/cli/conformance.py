"""`fedtune conformance`: which identities somebody's own aggregation keeps."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.say import say
from fedtune.types import ConfigError, Problem, nearest


def _function(name: str) -> Any:
    """Import `package.module:function`, also from the working directory.

    Raises:
        ConfigError: not of that form, not to be imported, or no such function.
    """
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


def conformance(
    callable_: Annotated[str, typer.Option("--callable", help="package.module:function")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try a function (list of PEFT states, list of weights) -> state on the identities of LoRA aggregation.

    The states have alpha = rank, so that a delta is B A. It exits with 1 if an identity that every aggregation should
    keep does not hold.
    """
    import json

    from fedtune.lora.conformance import examine

    found = examine(_function(callable_))
    if json_output:
        typer.echo(json.dumps([vars(f) for f in found], indent=1))
    else:
        for finding in found:
            mark = "holds" if finding.holds else "FAILS" if finding.damning else "does not hold"
            size = "" if finding.error is None else f"{finding.error:.1e}"
            say(f"{mark:13} {size:>8}  {finding.name}  ({finding.raised or finding.whose})")
    if any(finding.damning for finding in found):
        raise typer.Exit(1)
