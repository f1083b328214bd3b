"""What lies in a model's or an adapter's folder: whether it is safe to load, and the hash that identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedtune.io import file_sha256, read_json
from fedtune.types import ModelError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# what no loader reads: texts about a model, code, pickles, and weights in the formats of other libraries
_UNREAD = {".md", ".py", ".pyc", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
_UNREAD |= {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".log"}


def _hash(root: Path, files: Iterable[Path]) -> str:
    text = "".join(f"{path.relative_to(root).as_posix()}:{file_sha256(path)};" for path in sorted(files))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def model_revision(folder: Path) -> str:
    """Hash everything in a model's folder that decides what it computes or says.

    That is not only the weights and config.json: with another tokenizer, chat template or generation_config.json it is
    another model. Whatever is not known to be never read counts, so that no tokenizer's own file is forgotten.
    """
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    files = [p for p in folder.iterdir() if p.is_file() and p.suffix.lower() not in _UNREAD and p.name[0] != "."]
    return _hash(folder, [*files, *templates])


def adapter_revision(folder: Path) -> str:
    """Hash an adapter's weights and settings: a scale, a pattern or a target changes what the same factors do."""
    return _hash(folder, [folder / WEIGHTS, folder / CONFIG])


def check_folder(folder: Path) -> None:
    """Refuse a model folder that could only be loaded by running code or unpickling.

    Raises:
        ModelError: saying how to convert it.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; this is not a transformers model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        raise ModelError(
            f"{folder}: no safetensors weights"
            + (f", only pickles ({', '.join(pickles[:3])}), which can run code and are not read" if pickles else "")
            + "; convert them where you trust them: model.save_pretrained(folder, safe_serialization=True)"
        )
    if "auto_map" in read_json(folder / "config.json"):
        raise ModelError(f"{folder}: its config.json asks for remote code (auto_map), which is never run")
