"""fedtune as a library: what the commands do, as functions. `import fedtune` has them; torch is loaded when one works.

Settings are keywords with the names of a settings file: `train={"max_steps": 10}`, or the short forms of the command
line, `method="flora", rounds=3`. Whoever calls, the one loader of `fedtune.settings` validates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune import settings as whole
from fedtune.config import Settings
from fedtune.results.schema import Result, Score
from fedtune.types import ConfigError, Problem

if TYPE_CHECKING:
    from fedtune.experiment.aggregate import Aggregated
    from fedtune.experiment.reporter import Reporter
    from fedtune.methods import Method

Folder = str | Path


def _reporter(given: Reporter | None) -> Reporter:
    """Return who watches: progress on standard output, in a notebook line by line, unless somebody else is given."""
    from fedtune.experiment.progress import TerminalReporter, terminal

    return given or TerminalReporter(terminal())


def _path(folder: Folder | None) -> Path | None:
    return None if folder is None else Path(folder)


def load_settings(
    domain: str | None = None,
    *,
    file: Folder | None = None,
    data: Folder | Mapping[str, Any] | None = None,
    arms: Sequence[str] = (),
    **settings: Any,
) -> Settings:
    """Return validated settings.

    Args:
        domain: what to train for: `fedtune ls domains`.
        file: a TOML file of settings, below the others.
        data: a folder with `train/` and `eval/<domain>/` files, or the section of that name.
        arms: baselines to be trained beside the federated run.
        settings: sections, `train={"max_steps": 10}`; dotted keys; or protocol, arm, model, method, rounds, clients,
            partition and seed by their own names.

    Raises:
        ConfigError: with every problem found, and what would repair each.
    """
    section, folder = (data, None) if isinstance(data, Mapping) else (None, _path(data))
    layer = whole.nested(domain=domain, data=section, **settings)
    return whole.resolve(_path(file), [layer], folder, beside=arms)


def run(
    settings: Settings | str,
    *,
    out: Folder | None = None,
    resume: bool = False,
    arms: Sequence[str] = (),
    reporter: Reporter | None = None,
    **chosen: Any,
) -> Result:
    """Run an experiment: train federatedly, evaluate, and leave a run folder.

    Args:
        settings: those of `load_settings`, or a domain.
        out: the run folder; a new one under `runs/` by default.
        resume: continue the run in `out`.
        arms: baselines beside it: "local-only", "centralised".
        reporter: who watches; `fedtune.Reporter()` is silent.
        chosen: with a domain, what `load_settings` takes.

    Returns:
        The result, with its folder.

    Raises:
        FedtuneError: anything a user can repair, before work starts wherever that can be known.
        CancelledError: Ctrl-C or SIGTERM; `resume` goes on.
    """
    from fedtune.experiment.run import run as execute

    if isinstance(settings, str):
        settings = load_settings(settings, arms=arms, **chosen)
    elif chosen:
        raise TypeError(f"settings are given already; give {', '.join(chosen)} to load_settings")
    # settings that were made in another way are held against the same checks
    checked = whole.load([settings.config.plain()], kept=resume, beside=arms)
    folder, _ = execute(checked, _path(out), resume=resume, extra_arms=arms, reporter=_reporter(reporter))
    return Result.read(folder)


def sweep(
    out: Folder, axes: Mapping[str, Sequence[Any]], *, reporter: Reporter | None = None, **chosen: Any
) -> list[dict[str, Any]]:
    """Run every combination of some settings' values, sharing one base model in memory; what is complete stays.

    Args:
        out: the sweep's folder.
        axes: setting -> values, such as {"domain": ["finance"], "method": ["fedit", "flora"], "seed": [1, 2, 3]}.
        reporter: who watches.
        chosen: of all runs, what `load_settings` takes.

    Returns:
        For each combination but for seeds a row with the means of its scores and their 95 % intervals.

    Raises:
        RunFailedError: some runs failed; the others are done.
    """
    from fedtune.experiment.sweep import points
    from fedtune.experiment.sweep import sweep as execute

    chosen_points = points(axes, lambda where: load_settings(**{**chosen, **where}), Path(out))
    return execute(chosen_points, Path(out), _reporter(reporter))


def evaluate(
    target: Folder,
    domain: str,
    *,
    base: str | None = None,
    out: Folder | None = None,
    reporter: Reporter | None = None,
    **chosen: Any,
) -> list[Score]:
    """Evaluate an adapter folder or a base model on a domain's tasks; what was evaluated already is not done again.

    Args:
        target: a PEFT folder, or a model's name.
        domain: whose tasks.
        base: the adapter's base model, in place of the one its folder names.
        out: the folder of the per-sample logs; one under `evals/` by default.
        reporter: who watches.
        chosen: what `load_settings` takes; `eval={"limit": 100}` for a sample of the items.
    """
    from fedtune.experiment import evaluate as work

    name, adapter = work.base_of(str(target), base)
    every = {"eval.limit": 0, "eval.official_limit": 0}
    config = load_settings(domain, **{**every, **chosen, "model": name}).config
    folder = _path(out) or work.default_folder(str(target), config)
    return work.evaluate(config, adapter, folder, _reporter(reporter), insist=base is not None)


def aggregate(
    method: str,
    clients: Sequence[Folder],
    out: Folder,
    *,
    examples: Sequence[int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    start: Folder | None = None,
    base: str | None = None,
    effective: Folder | None = None,
    round_: int = 1,
    rank: int = 0,
) -> Aggregated:
    """Aggregate PEFT folders, or those of whole models, with a method's server half, into the new folder `out`.

    Args:
        method: `fedtune ls methods`.
        clients: their folders, all of one space.
        out: the global adapter's or model's folder, or that of the clients' own adapters.
        examples: of each client; one each by default.
        parameters: the method's own settings.
        start: the adapter that they started from.
        base: the base model, for DoRA, or where the folders name different ones.
        effective: also write the dense update of each weight into this file.
        round_: for methods that alternate.
        rank: of the result, where the method cuts ranks; 0 is the largest of the clients.

    Raises:
        ConfigError, AdapterError: before anything is written.
    """
    from fedtune.experiment import aggregate as work
    from fedtune.experiment.clients import check_out, read_clients

    built, folders = work.build(method, parameters or {}), [Path(c) for c in clients]
    _check_cut(built, rank)
    inputs = [*folders, *([Path(start)] if start else [])]
    check_out(Path(out), inputs, _path(effective))
    weights = work.base_weights(base) if base else None
    # the global adapter has to fit the clients' in every way that they have to fit each other
    given = read_clients(inputs, built, round_, weights, insist=base is not None)
    states, before = given[: len(folders)], given[-1] if start else None
    result = work.aggregate(built, states, examples or [1] * len(folders), before, round_, rank, weights)
    dense = work.dense_update(result) if effective else {}
    written = work.write(result, folders[0], Path(out), base)
    if effective:
        work.write_dense(dense, Path(effective))
    return replace(result, folders=tuple(written))


def _check_cut(method: Method, rank: int) -> None:
    """Raise ConfigError for a rank that a method would take no notice of."""
    from fedtune.methods import METHODS
    from fedtune.methods.traits import cuts

    if rank and not cuts(type(method)):
        able = ", ".join(name for name, kind in METHODS.items() if cuts(kind))
        found = Problem(f"rank={rank}", f"{method.name} does not cut its result to a rank", f"these do: {able}")
        raise ConfigError("fedtune aggregate", [found])
