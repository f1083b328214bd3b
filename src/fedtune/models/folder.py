"""PEFT adapter folders as files: read without a base model, whole or layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.lora.state import LoraModule, from_tensors
from fedtune.models.adapter_config import AdapterConfig, LoraAdapterConfig, read_config
from fedtune.models.source import CONFIG, WEIGHTS, not_a_number
from fedtune.names import PREFIX, A, B, M
from fedtune.tensors import tensor_header
from fedtune.types import AdapterError, CorruptFileError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_folder(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a PEFT adapter folder that anybody made.

    Returns:
        Its settings and its tensors.

    Raises:
        AdapterError: pickled weights, a link that leads outside, not a LoRA adapter, or not numbers.
        CorruptFileError: a damaged file.
    """
    import safetensors.torch

    config, _ = checked(folder)
    return config, safetensors.torch.load_file(folder / WEIGHTS)


def checked(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return an adapter folder's settings and its tensors' header, having made sure that its files are safe and whole.

    Raises:
        AdapterError, CorruptFileError: as `read_folder`.
    """
    if not (folder / CONFIG).is_file():
        missing = f"no {CONFIG}; this is not a PEFT adapter folder" if folder.is_dir() else "no such folder"
        raise AdapterError(f"{folder}: {missing}")
    for path in (folder / CONFIG, folder / WEIGHTS):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise AdapterError(f"{path}: a link that leads outside the folder is not followed")
    if not (folder / WEIGHTS).exists():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        raise AdapterError(
            f"{folder}: no {WEIGHTS}"
            + (f"; {pickled[0]} is a pickle, which can run code and is not read" if pickled else "")
            + ". Convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), out)"
        )
    config, header = read_config(folder), tensor_header(folder / WEIGHTS)
    other = next((n for n, entry in header.items() if entry["dtype"] not in _FLOATS), None)
    if other:
        what = f"{other} is {header[other]['dtype']}; an adapter has {', '.join(sorted(_FLOATS))}"
        raise AdapterError(f"{folder}: {what}")
    if spoilt := not_a_number(folder / WEIGHTS):
        raise AdapterError(f"{folder}: {spoilt} has NaN or infinity")
    return config, header


class FolderState(Mapping[str, LoraModule]):
    """An adapter folder as a state whose layers are read when they are asked for, so that many fit into memory.

    The file's header is read once: each layer is then found by its place, however many there are.

    Args:
        folder: made by PEFT or anything that writes the same.

    Attributes:
        kinds: the dtype that each tensor is read as, by name: at first its own.

    Raises:
        AdapterError, CorruptFileError: as `read_folder`; also for names, shapes, ranks or alphas that are not those
            of one LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, self._header = checked(folder)
        if not isinstance(config, LoraAdapterConfig):
            raise AdapterError(f"{folder}: peft_type = {config.kind}; only LoRA adapters are aggregated")
        self.config = config
        self._size = (folder / WEIGHTS).stat().st_size
        self._start = self._size - max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
        if self.config.rank_pattern or self.config.alpha_pattern:
            raise AdapterError(f"{folder}: {CONFIG}: rank_pattern and alpha_pattern cannot be aggregated")
        self._check_names()

    def _check_names(self) -> None:
        shapes = {name: tuple(entry["shape"]) for name, entry in self._header.items()}
        # shapes alone, so that a wrong file is refused before a number of it is read
        empty = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
        try:
            state = from_tensors(empty, self.config.lora_alpha)
        except AdapterError as err:
            raise AdapterError(f"{self.folder / WEIGHTS}: {err}") from err
        self._paths = dict.fromkeys(sorted(state))
        self.kinds = {n: _FLOATS[entry["dtype"]] for n, entry in self._header.items()}
        self.dora = self.config.use_dora
        if problem := next((p for p in (self._layer_problem(*item) for item in state.items()) if p), ""):
            raise AdapterError(f"{self.folder}: {problem}")
        wrong = [path for path, module in state.items() if module.rank != self.config.r]
        if wrong:
            rank = state[wrong[0]].rank
            raise AdapterError(f"{self.folder}: {wrong[0]} has rank {rank}, its {CONFIG} says {self.config.r}")

    def _layer_problem(self, path: str, module: LoraModule) -> str:
        if not module.a.numel() or not module.b.numel():
            return f"{path} is empty: A is {tuple(module.a.shape)} and B {tuple(module.b.shape)}"
        if self.dora and module.magnitude is None:
            return f"{CONFIG} says use_dora = true, but {path} has no magnitudes"
        if not self.dora and module.magnitude is not None:
            return f"{path} has magnitudes, but {CONFIG} does not say use_dora = true"
        if module.magnitude is not None and module.magnitude.shape != module.b.shape[:1]:
            return f"{path} has magnitudes {tuple(module.magnitude.shape)} for {len(module.b)} rows"
        return ""

    def __getitem__(self, path: str) -> LoraModule:
        """Read one layer. Raises CorruptFileError where the file has another size than when it was opened."""
        if path not in self._paths:
            raise KeyError(path)
        with open(self.folder / WEIGHTS, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise CorruptFileError(f"{self.folder / WEIGHTS}: was changed while it was read; start again")
            a, b = (self._tensor(file, PREFIX + path + end) for end in (A, B))
            m = self._tensor(file, PREFIX + path + M) if self.dora else None
        return LoraModule(a, b, self.config.lora_alpha, self.config.use_rslora, m, self.config.fan_in_fan_out)

    def _tensor(self, file: BufferedReader, name: str) -> Tensor:
        entry = self._header[name]
        tensor = torch.empty(entry["shape"], dtype=_FLOATS[entry["dtype"]])
        file.seek(self._start + entry["data_offsets"][0])
        buffer: Any = tensor.view(-1).view(torch.uint8).numpy()
        file.readinto(buffer)
        return tensor.to(self.kinds[name])

    def __iter__(self) -> Iterator[str]:
        """Name the layers, sorted."""
        return iter(self._paths)

    def __len__(self) -> int:
        """Count the layers."""
        return len(self._paths)


def read_state(folder: Path) -> dict[str, LoraModule]:
    """Read an adapter folder as a state, whole.

    Raises:
        AdapterError, CorruptFileError: as `FolderState`.
    """
    return dict(FolderState(folder))
