"""What lies in a model's or an adapter's folder: whether it is safe to load, and the hash that identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.io import file_sha256, read_json, read_text
from fedtune.tensors import tensor_header
from fedtune.types import ModelError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# what no loader reads: texts about a model, code, pickles, and weights in the formats of other libraries
_UNREAD = {".md", ".py", ".pyc", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
_UNREAD |= {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".log"}

# entries of settings by which transformers loads weights, a configuration or a tokenizer from files of other names
_ELSEWHERE = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "spiece*")
_SHARD = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors", re.DOTALL)


def _hash(root: Path, files: Iterable[Path]) -> str:
    text = "".join(f"{path.relative_to(root).as_posix()}:{file_sha256(path)};" for path in sorted(files))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _read(folder: Path) -> list[Path]:
    """Return the files of a model that are read; what is no file would be waited for, or read without end."""
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    files = (p for p in folder.iterdir() if p.suffix.lower() not in _UNREAD and p.name[0] != ".")
    return [path for path in (*files, *templates) if path.is_file()]


def settings_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each of a model's files but its weights: which of them has changed can then be named."""
    files = (path for path in sorted(_read(folder)) if path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def model_revision(folder: Path) -> str:
    """Hash everything in a model's folder that decides what it computes or says.

    That is not only the weights and config.json: with another tokenizer, chat template or generation_config.json it is
    another model. Whatever is not known to be never read counts, so that no tokenizer's own file is forgotten.
    """
    return _hash(folder, _read(folder))


def adapter_revision(folder: Path) -> str:
    """Hash an adapter's weights and settings: a scale, a pattern or a target changes what the same factors do."""
    return _hash(folder, [folder / WEIGHTS, folder / CONFIG])


def not_a_number(path: Path) -> str:
    """Return the name of the first tensor of a safetensors file that has NaN or infinity, or an empty text.

    Such a number is one whose exponent has all its bits set, whatever the width.

    Raises:
        CorruptFileError: the file is damaged.
    """
    exponents = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16), "F16": ("<u2", 0x7C00)}
    exponents["BF16"] = ("<u2", 0x7F80)
    header = tensor_header(path)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    start = path.stat().st_size - end
    whole = np.memmap(path, np.uint8, "r") if end else np.empty(0, np.uint8)
    for name, entry in header.items():
        kind, mask = exponents.get(entry["dtype"], ("", 0))
        first, last = (start + place for place in entry["data_offsets"])
        if kind and bool(np.any((whole[first:last].view(kind) & mask) == mask)):
            return name
    return ""


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a JSON value with what it stands for, however deep inside."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            left += inner.values()
        elif isinstance(inner, list):
            left += inner


def _kernels(settings: Any) -> list[str]:
    """Return the implementations (of attention, of experts) that are repositories of code on the Hub."""
    chosen = [value for key, value in _entries(settings) if "_implementation" in f"_{key}"]
    named = [inner for value in chosen for inner in (value.values() if isinstance(value, dict) else [value])]
    return [name for name in named if isinstance(name, str) and "/" in name]


def check_settings(path: Path) -> Any:
    """Read settings; refuse those that name code, or another file to be loaded in place of the model's own.

    Such a file can be a pickle, or lie outside of what identifies the model.

    Raises:
        ModelError: naming the entry.
        CorruptFileError: not JSON.
    """
    try:
        settings = json.loads(read_text(path))  # as the loaders do, who take the Infinity that some configurations have
    except (ValueError, RecursionError):
        settings = read_json(path)  # says what is wrong where
    if named := next((key for key, _ in _entries(settings) if key in _ELSEWHERE), ""):
        raise ModelError(
            f"{path}: its {named} names other files to load; only files of the usual names are read: "
            f"give them those ({SINGLE}, config.json, tokenizer.json) and remove {named}"
        )
    if kernels := _kernels(settings):
        raise ModelError(
            f"{path}: asks for the implementation {kernels[0]!r}, which is code of a repository and never run; "
            "remove the entry"
        )
    return settings


def check_index(path: Path) -> set[str]:
    """Return the files that an index of weights names; refuse all but visible safetensors files that lie beside it.

    Raises:
        ModelError: naming what is none.
        CorruptFileError: not JSON.
    """
    whole = read_json(path)
    shards = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path}: its weight_map is not an object of file names")
    names = set(shards.values())
    if wrong := sorted(name for name in names if not _SHARD.fullmatch(name)):
        raise ModelError(
            f"{path}: its weight_map names {wrong[0]!r}; a name of a *.safetensors file in the same folder is wanted, "
            "without a folder and without a dot in front: save the model again with model.save_pretrained(folder)"
        )
    return names


def _check_settings(folder: Path) -> None:
    """Refuse settings that ask for code, or that cannot be read: loaders pass over some of them without a word."""
    for path in sorted(folder.glob("*config.json")):
        settings = check_settings(path)
        if any(key == "auto_map" for key, _ in _entries(settings)):
            raise ModelError(
                f"{folder}: its {path.name} asks for remote code (auto_map), which is never run; "
                "if transformers has the class itself, remove auto_map from the file"
            )
        if not isinstance(settings, dict):
            raise ModelError(f"{path}: not a JSON object")
    if (folder / "custom_generate").exists():
        raise ModelError(f"{folder}: its custom_generate folder replaces generation by remote code, which is never run")


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        raise ModelError(
            f"{folder}: no safetensors weights"
            + (f", only pickles ({', '.join(pickles[:3])}), which can run code and are not read" if pickles else "")
            + "; convert them where you trust them: model.save_pretrained(folder, safe_serialization=True)"
        )
    if (folder / SINGLE).is_file() or not (folder / INDEX).exists():
        return
    if absent := sorted(name for name in check_index(folder / INDEX) if not (folder / name).is_file()):
        raise ModelError(
            f"{folder}: {', '.join(absent[:3])} is named in {INDEX} and is not there; copy the folder again, whole"
        )


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is not whole, or could only be loaded by running code or unpickling.

    Raises:
        ModelError: saying what is missing, or how to convert it.
        CorruptFileError: a settings file is not JSON.
    """
    if (folder / CONFIG).exists():
        raise ModelError(f"{folder}: has an {CONFIG}, so it is an adapter and no base model: fedtune eval {folder}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; this is not a transformers model folder")
    _check_weights(folder)
    _check_settings(folder)
    if not any(True for kind in _TOKENIZERS for _ in folder.glob(kind)):
        raise ModelError(f"{folder}: no tokenizer; add the model's own: tokenizer.save_pretrained({str(folder)!r})")
