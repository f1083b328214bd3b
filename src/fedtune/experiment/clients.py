"""Clients' folders, opened together: what keeps them from being aggregated is known before any work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor

from fedtune import spaces
from fedtune.lora.state import to_tensors
from fedtune.methods import METHODS, Method, not_defined
from fedtune.methods.traits import magnitudes
from fedtune.models.folder import FolderPlain, FolderState
from fedtune.types import ConfigError, FedtuneError, Problem, ProblemsError

Weights = Callable[[str], Tensor]
Client = FolderState | FolderPlain

# of a layer's factors, magnitudes and update; their products, squares and sums over clients are finite in float32
LARGEST_NORM = 1e9


def check_out(out: Path, inputs: Sequence[Path], effective: Path | None = None) -> None:
    """Raise ConfigError for what would be overwritten: an input may be spelled with links or dots."""
    taken = {folder.resolve(): folder for folder in inputs}
    found = []
    if out.resolve() in taken:
        found.append(Problem(f"--out {out}", f"is the input {taken[out.resolve()]}", "choose a new folder"))
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found.append(Problem(f"--out {out}", "exists, and nothing is overwritten", "choose a new folder, or remove it"))
    if effective and (effective.is_dir() or taken.keys() & set(effective.resolve().parents)):
        found.append(Problem(f"--effective {effective}", "is a folder, or inside an input", "name a new file"))
    if found:
        raise ConfigError("fedtune aggregate", found)


def _other_base(state: Client, first: Client) -> list[Problem]:
    """Return how the base model of one client's adapter is not that of the first, by name or by commit."""
    if state.config is None or first.config is None:
        return []
    one, other = state.config, first.config
    if one.base and other.base and Path(one.base).name != Path(other.base).name:
        what = f"was trained on {one.base!r}, the first on {other.base!r}"
    elif one.revision and other.revision and one.revision != other.revision:
        what = f"was trained on {one.base!r} at {one.revision[:19]}, the first at {other.revision[:19]}"
    else:
        return []
    return [Problem(str(state.folder), what, "if they are the same, give --base MODEL")]


def _mismatches(state: FolderState, first: FolderState, method: Method, base: Weights | None) -> list[Problem]:
    """Return what keeps one client's adapter from being aggregated with the first one's."""
    where = str(state.folder)
    if set(state) != set(first):
        differing = sorted(set(state) ^ set(first))[:2]
        return [Problem(where, f"adapts other layers than the first folder: {', '.join(differing)} …")]
    if state.config.use_dora != first.config.use_dora:
        return [Problem(where, "DoRA and LoRA adapters cannot be mixed")]
    if state.config.fan_in_fan_out != first.config.fan_in_fan_out:
        what = f"fan_in_fan_out = {str(state.config.fan_in_fan_out).lower()}, the first folder says the other"
        return [Problem(where, what, "their layers lie the other way round: set what the base model has")]
    if state.config.r != first.config.r and not method.mixed_ranks:
        able = ", ".join(m for m in METHODS if METHODS[m].mixed_ranks)
        return [Problem(where, f"rank {state.config.r}, the first has {first.config.r}", f"mixed ranks: {able}")]
    if state.config.use_dora and not magnitudes(type(method)):
        return [Problem(where, f"a DoRA adapter; {method.name} is not defined for magnitudes")]
    if state.config.use_dora and magnitudes(type(method)) == "exact" and base is None:
        return [Problem(where, f"a DoRA adapter; {method.name} needs its base model's weights", "give --base MODEL")]
    return _layer_mismatches(state, first)


def _absurd(where: str, norms: Mapping[str, float]) -> list[Problem]:
    """Return the first of a client's norms that is larger than that of any trained adapter, if there is one."""
    large = [
        f"{name}: norm {norm:.1e}, at most {LARGEST_NORM:g}" for name, norm in norms.items() if not norm <= LARGEST_NORM
    ]
    return [Problem(where, what, "leave it out: values this large cannot be summed") for what in large[:1]]


def _layer_mismatches(state: FolderState, first: FolderState) -> list[Problem]:
    where, found = str(state.folder), []
    for path, module in state.items():
        like = first[path]
        norms = {n: float(torch.linalg.vector_norm(t.double())) for n, t in to_tensors({path: module}).items()}
        a, b = list(norms.values())[:2]
        found += _absurd(where, {**norms, f"alpha and the factors of {path}": module.scale * a * b})
        if (module.a.shape[1], module.b.shape[0]) != (like.a.shape[1], like.b.shape[0]):
            shape = f"{module.b.shape[0]} x {module.a.shape[1]}"
            found.append(Problem(where, f"{path} is {shape}, another base model?"))
    return found[:3]


def _tensor_mismatches(state: FolderPlain, first: FolderPlain, method: Method, round_: int) -> list[Problem]:
    """Return what keeps one client's tensors from being aggregated with the first one's."""
    where, own, wanted = str(state.folder), state.tensors, first.tensors
    if set(own) != set(wanted):
        differing = sorted(set(own) ^ set(wanted))[:2]
        return [Problem(where, f"has other tensors than the first folder: {', '.join(differing)} …")]
    found = []
    for key in sorted(set(state.alike) | set(first.alike)):
        if (said := state.alike.get(key)) != (other := first.alike.get(key)):
            found.append(Problem(where, f"{key} is {short(said)}, the first has {short(other)}"))
    for name in own:
        for what in ("shape", "dtype"):
            if (said := own.entry(name)[what]) != (other := wanted.entry(name)[what]):
                found.append(Problem(where, f"{name} has the {what} {said}, the first has {other}"))
    return found[:3] or _value_mismatches(state, first, method, round_)


def _value_mismatches(state: FolderPlain, first: FolderPlain, method: Method, round_: int) -> list[Problem]:
    where, found = str(state.folder), []
    for name, tensor in state.tensors.items():
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        if absurd := _absurd(where, {name: norm}):
            found += absurd
        elif not method.trainable(round_, name) and not torch.equal(tensor, first.tensors[name]):
            what = f"{name} differs from the first folder's; {method.name} keeps it frozen and common"
            found.append(Problem(where, what))
    return found[:3]


def _not_shared(states: Sequence[FolderState], method: Method, round_: int) -> list[Problem]:
    """Return which clients do not share what must be common in this round."""
    found = []
    for state in states[1:]:
        for path, module in state.items():
            own, first = to_tensors({path: module}), to_tensors({path: states[0][path]})
            unlike = [n for n in own if not method.trainable(round_, n) and not torch.equal(own[n], first[n])]
            if unlike:
                what = f"{unlike[0]} differs from the first folder's; {method.name} keeps it frozen and common"
                found.append(Problem(str(state.folder), what))
                break
    return found


def _widen(states: Sequence[FolderState]) -> None:
    """Have each tensor read in a dtype that holds every client's numbers, so that none is rounded to another's."""
    for name in states[0].kinds:
        kind = functools.reduce(torch.promote_types, (state.kinds[name] for state in states))
        for state in states:
            state.kinds[name] = kind


def _opened(folders: Sequence[Path], method: Method, *, insist: bool) -> Iterator[Problem | Client]:
    """Yield each folder as a state, or what is wrong with it; all are of one space, in which the method is defined."""
    first = None
    for folder in folders:
        try:
            space = spaces.of_folder(folder)
            if first is None:
                first = space
                yield from not_defined(type(method), space.name, f"--method {method.name}")
                if insist and space.whole:
                    yield Problem("--base", f'with peft.kind = "{space.name}" there is none', "leave it out")
            if space.name == first.name:
                yield space.opened(folder)
            else:
                yield Problem(str(folder), f'is of peft.kind = "{space.name}", the first of "{first.name}"')
        except FedtuneError as err:
            yield Problem(str(folder), str(err).removeprefix(f"{folder}: "))


def read_clients(
    folders: Sequence[Path], method: Method, round_: int, base: Weights | None = None, *, insist: bool = False
) -> list[Client]:
    """Open all folders, or report everything that is wrong with any of them. Layers are read when they are used.

    Args:
        folders: of the clients.
        method, round_: what is to be done with them.
        base: reads the base model's weights, where one is given.
        insist: take folders that name different base models.

    Raises:
        ProblemsError: the list.
    """
    opened = list(_opened(folders, method, insist=insist))
    problems = [found for found in opened if isinstance(found, Problem)]
    states = [found for found in opened if not isinstance(found, Problem)]
    factors = [state for state in states if isinstance(state, FolderState)]
    plain = [state for state in states if isinstance(state, FolderPlain)]
    if states and not insist:
        problems += [p for state in states[1:] for p in _other_base(state, states[0])]
    if not problems:
        problems += [p for state in factors for p in _mismatches(state, factors[0], method, base)]
        problems += [p for state in plain for p in _tensor_mismatches(state, plain[0], method, round_)]
    if factors and not problems:
        _widen(factors)
        problems += _not_shared(factors, method, round_)
    if problems or not states:
        raise ProblemsError("adapters cannot be aggregated", problems or [Problem("--clients", "names no folder")])
    return states
