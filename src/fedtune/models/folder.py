"""Folders of adapters and of whole models as files: read without a base model, at once or tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.io import read_json
from fedtune.lora.state import LoraModule, Plain, from_tensors
from fedtune.models.adapter_config import AdapterConfig, LoraAdapterConfig, read_config
from fedtune.models.source import (
    CONFIG,
    INDEX,
    SINGLE,
    WEIGHTS,
    check_folder,
    check_index,
    check_settings,
    not_a_number,
)
from fedtune.names import PREFIX, A, B, M
from fedtune.tensors import tensor_header
from fedtune.types import AdapterError, CorruptFileError, ModelError

# of a whole model's settings, what says nothing of the model
_ABOUT = {"_name_or_path", "transformers_version"}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def inside(folder: Path, path: Path) -> None:
    """Refuse a link that leads outside a folder. Raises AdapterError."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise AdapterError(f"{path}: a link that leads outside the folder is not followed")


def check_files(folder: Path) -> None:
    """Refuse a folder that is no adapter's, or whose files are not safe to open. Raises AdapterError."""
    if any("\udc80" <= letter <= "\udcff" for letter in str(folder)):
        raise AdapterError(f"{str(folder)!a}: its name is not UTF-8; rename it")
    if not (folder / CONFIG).is_file():
        missing = f"no {CONFIG}; this is not a PEFT adapter folder" if folder.is_dir() else "no such folder"
        raise AdapterError(f"{folder}: {missing}")
    for path in (folder / CONFIG, folder / WEIGHTS):
        inside(folder, path)
    if not (folder / WEIGHTS).exists():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        raise AdapterError(
            f"{folder}: no {WEIGHTS}"
            + (f"; {pickled[0]} is a pickle, which can run code and is not read" if pickled else "")
            + ". Convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), out)"
        )


def checked(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return an adapter folder's settings and its tensors' header, having made sure that its files are safe and whole.

    Raises:
        AdapterError: pickled weights, a link that leads outside, an adapter that is not read here, or not numbers.
        CorruptFileError: a damaged file.
    """
    check_files(folder)
    config = read_config(folder)
    return config, checked_header(folder / WEIGHTS)


def checked_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of floating-point numbers, none of them NaN or infinity; raises as `checked`."""
    header = tensor_header(path)
    other = next((n for n, entry in header.items() if entry["dtype"] not in _FLOATS), None)
    if other:
        what = f"{other} is {header[other]['dtype']}; one of {', '.join(sorted(_FLOATS))} is wanted"
        raise AdapterError(f"{path.parent}: {what}")
    if spoilt := not_a_number(path):
        raise AdapterError(f"{path.parent}: {spoilt} has NaN or infinity")
    return header


class FileTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for, so that those of many fit into memory.

    A file's header is read once: each tensor is then found by its place, however many there are.

    Args:
        headers: of each file what `tensor_header` returns.
    """

    def __init__(self, headers: Mapping[Path, Mapping[str, Any]]) -> None:
        self.headers = headers
        self._places = {name: (path, entry) for path, own in headers.items() for name, entry in own.items()}
        self._sizes = {path: path.stat().st_size for path in headers}

    def start(self, path: Path) -> int:
        """Return the byte of a file at which its numbers begin."""
        return self._sizes[path] - max((entry["data_offsets"][1] for entry in self.headers[path].values()), default=0)

    def entry(self, name: str) -> dict[str, Any]:
        """Return what the header says of a tensor."""
        found: dict[str, Any] = self._places[name][1]
        return found

    def only(self, name: str) -> FileTensors:
        """Return one of the tensors alone."""
        made = copy(self)
        made._places = {name: self._places[name]}
        return made

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor. Raises CorruptFileError where its file has another size than when it was opened."""
        path, entry = self._places[name]
        tensor = torch.empty(entry["shape"], dtype=_FLOATS[entry["dtype"]])
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._sizes[path]:
                raise CorruptFileError(f"{path}: was changed while it was read; start again")
            file.seek(self.start(path) + entry["data_offsets"][0])
            file.readinto(as_bytes(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def as_bytes(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderPlain(Plain):
    """A folder as a state of plain tensors, which are read when they are asked for.

    Attributes:
        folder: where they lie.
        config: of an adapter; None of a whole model.
        alike: settings in which folders have to agree to be aggregated, by name.
    """

    tensors: FileTensors
    folder: Path
    config: AdapterConfig | None = None
    alike: Mapping[str, Any]

    def only(self, name: str) -> FolderPlain:
        """Return the state of one of the tensors alone."""
        return replace(self, tensors=self.tensors.only(name))


class FolderState(Mapping[str, LoraModule]):
    """An adapter folder as a state whose layers are read when they are asked for.

    Args:
        folder: made by PEFT or anything that writes the same.

    Attributes:
        kinds: the dtype that each tensor is read as, by name: at first its own.

    Raises:
        AdapterError, CorruptFileError: as `checked`; also for names, shapes, ranks or alphas that are not those
            of one LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, header = checked(folder)
        if not isinstance(config, LoraAdapterConfig):
            raise AdapterError(f"{folder}: peft_type = {config.kind}; a LoRA adapter is wanted")
        if config.rank_pattern or config.alpha_pattern:
            raise AdapterError(f"{folder}: {CONFIG}: rank_pattern and alpha_pattern cannot be aggregated")
        self.config = config
        self.kinds = {n: _FLOATS[entry["dtype"]] for n, entry in header.items()}
        self._tensors = FileTensors({folder / WEIGHTS: header})
        # shapes alone, so that a wrong file is refused before a number of it is read
        empty = {n: torch.empty(entry["shape"], device="meta") for n, entry in header.items()}
        try:
            state = from_tensors(empty, config.lora_alpha)
        except AdapterError as err:
            raise AdapterError(f"{folder / WEIGHTS}: {err}") from err
        self._paths = dict.fromkeys(state)
        for path, module in state.items():
            if problem := _layer_problem(path, module, config):
                raise AdapterError(f"{folder}: {problem}")

    def __getitem__(self, path: str) -> LoraModule:
        """Read one layer. Raises CorruptFileError where the file has another size than when it was opened."""
        if path not in self._paths:
            raise KeyError(path)
        a, b = (self._tensor(PREFIX + path + end) for end in (A, B))
        m = self._tensor(PREFIX + path + M) if self.config.use_dora else None
        return LoraModule(a, b, self.config.lora_alpha, self.config.use_rslora, m, self.config.fan_in_fan_out)

    def _tensor(self, name: str) -> Tensor:
        return self._tensors[name].to(self.kinds[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _layer_problem(path: str, module: LoraModule, config: LoraAdapterConfig) -> str:
    if not module.a.numel() or not module.b.numel():
        return f"{path} is empty: A is {tuple(module.a.shape)} and B {tuple(module.b.shape)}"
    if config.use_dora and module.magnitude is None:
        return f"{CONFIG} says use_dora = true, but {path} has no magnitudes"
    if not config.use_dora and module.magnitude is not None:
        return f"{path} has magnitudes, but {CONFIG} does not say use_dora = true"
    if module.magnitude is not None and module.magnitude.shape != module.b.shape[:1]:
        return f"{path} has magnitudes {tuple(module.magnitude.shape)} for {len(module.b)} rows"
    return "" if module.rank == config.r else f"{path} has rank {module.rank}, its {CONFIG} says {config.r}"


def whole_folder(folder: Path, space: str) -> FolderPlain:
    """Open the folder of a whole model as a state of that space.

    Raises:
        ModelError, AdapterError, CorruptFileError: it is not whole, would run code, has a link that leads outside, or
            weights that are no finite floating-point numbers.
    """
    check_folder(folder)
    for path in folder.rglob("*"):
        inside(folder, path)
    single = (folder / SINGLE).is_file()
    names = {SINGLE} if single else check_index(folder / INDEX)
    files = FileTensors({folder / name: checked_header(folder / name) for name in sorted(names)})
    held = {name: path.name for path, header in files.headers.items() for name in header}
    if not held:
        raise ModelError(f"{folder}: its files have no weights")
    if len(held) < sum(map(len, files.headers.values())):
        raise ModelError(f"{folder}: a tensor is in two of its files; save the model again")
    if not single and read_json(folder / INDEX)["weight_map"] != held:
        raise ModelError(f"{folder}: {INDEX} does not name the tensors that its files have; save the model again")
    settings = {k: v for k, v in check_settings(folder / "config.json").items() if k not in _ABOUT}
    return FolderPlain(space, tensors=files, folder=folder, alike=settings)
