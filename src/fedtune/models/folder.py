"""PEFT adapter folders as files: read without a base model, whole or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtune.config.schema import LoraSettings
from fedtune.io import read_json, tensor_header
from fedtune.lora.state import PREFIX, A, B, LoraModule, M, from_tensors
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.types import AdapterError


def read_folder(folder: Path) -> tuple[LoraSettings, str, dict[str, Tensor]]:
    """Read a PEFT adapter folder that anybody made.

    Returns:
        Its settings, the name of its base model, and its tensors.

    Raises:
        AdapterError: pickled weights, a link that leads outside, or not a LoRA adapter.
        CorruptFileError: a damaged file.
    """
    import safetensors.torch

    settings, config = _checked(folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    return settings, str(config.get("base_model_name_or_path", "")), tensors


def _checked(folder: Path) -> tuple[LoraSettings, dict[str, Any]]:
    """Return an adapter folder's settings, having made sure that its files are safe and whole."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: no {CONFIG}; this is not a PEFT adapter folder")
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
    config = read_json(folder / CONFIG)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise AdapterError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA adapters are read")
    tensor_header(folder / WEIGHTS)
    targets = config.get("target_modules") or ()
    settings = LoraSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )
    return settings, config


class FolderState(Mapping[str, LoraModule]):
    """An adapter folder as a state whose layers are read when they are asked for, so that many fit into memory.

    Args:
        folder: made by PEFT or anything that writes the same.

    Raises:
        AdapterError, CorruptFileError: as `read_folder`; also for names, shapes, ranks or alphas that are not those
            of one LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings, self.config = _checked(folder)
        if self.config.get("rank_pattern") or self.config.get("alpha_pattern"):
            raise AdapterError(f"{folder}: rank_pattern and alpha_pattern are not read")
        self._check_names(tensor_header(folder / WEIGHTS))

    def _check_names(self, header: Mapping[str, Any]) -> None:
        import torch

        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        # shapes alone, so that a wrong file is refused before a number of it is read
        empty = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
        state = from_tensors(empty, self.settings.alpha)
        self._paths = sorted(state)
        self.dora = all(m.magnitude is not None for m in state.values())
        wrong = [path for path, module in state.items() if module.rank != self.settings.r]
        if wrong:
            rank = state[wrong[0]].rank
            raise AdapterError(f"{self.folder}: {wrong[0]} has rank {rank}, its {CONFIG} says {self.settings.r}")

    def __getitem__(self, path: str) -> LoraModule:
        """Read one layer."""
        from safetensors import safe_open

        if path not in self._paths:
            raise KeyError(path)
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = (file.get_tensor(PREFIX + path + end) for end in (A, B))
            m = file.get_tensor(PREFIX + path + M) if self.dora else None
        flipped = bool(self.config.get("fan_in_fan_out"))
        return LoraModule(a, b, self.settings.alpha, self.settings.rslora, m, flipped)

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
