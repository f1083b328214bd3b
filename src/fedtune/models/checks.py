"""What must hold of a model that has just been loaded, before anything is computed with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedtune.names import PREFIX
from fedtune.types import ModelError

log = logging.getLogger("fedtune")

# where a checkpoint of something else usually comes from, by what its names begin with
_WRAPPERS = {
    PREFIX: "a PEFT model was saved whole; save model.merge_and_unload() instead",
    "module.": "a DataParallel wrapper was saved; save its .module instead",
    "_orig_mod.": "a compiled model was saved; save its ._orig_mod instead",
}
_INSIDE = {
    ".base_layer.": "a PEFT model was saved whole; save model.merge_and_unload() instead",
    ".lora_": "an adapter was saved with the model; save model.merge_and_unload() instead",
    "_fsdp_wrapped_module.": "an FSDP wrapper was saved; save its full state dict instead",
}

# masks that some attentions once saved, as they did the causal one as their "bias"
MASKS = ("masked_bias", "causal_mask")
# what the official evaluation writes into every question
WRITTEN = "<|im_start|><|im_end|>"


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _cause(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Say where a checkpoint's names come from, if they tell."""
    wanted, found = set(missing), sorted(unexpected)
    for mark, why in _INSIDE.items():
        if any(mark in name for name in found):
            return f"; its names have {mark!r}: {why}"
    longest = max(map(len, wanted), default=0)
    for name in found:
        dots = (i for i in range(max(0, len(name) - longest - 1), len(name)) if name[i] == ".")
        prefix = next((name[: i + 1] for i in dots if name[i + 1 :] in wanted), "")
        if prefix:
            return f"; its names begin with {prefix!r}" + (f": {_WRAPPERS[prefix]}" if prefix in _WRAPPERS else "")
    return ""


def _is_constant(name: str, modules: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint's tensor is one that a module makes by itself: a buffer, or an attention's old mask."""
    home, _, leaf = name.rpartition(".")
    mask = leaf == "bias" and home.rpartition(".")[2] in ("attn", "attention")
    return mask or leaf in MASKS or (home in modules and leaf in dict(modules[home].named_buffers(recurse=False)))


def _dropped(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Return the tensors that belong inside a module of the model, and so were dropped from what it computes.

    A whole part that a language model does not have (a vision tower, a value head) is not counted.
    """
    modules = dict(model.named_modules())
    top = {"", str(model.base_model_prefix)}
    deepest = max(name.count(".") for name in modules) + 1

    def home(name: str) -> str:
        parts = name.split(".")[:-1][:deepest]
        return next(p for p in (".".join(parts[:i]) for i in range(len(parts), -1, -1)) if p in modules)

    return [name for name in unexpected if home(name) not in top and not _is_constant(name, modules)]


def check_complete(what: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model of which a part is not from its checkpoint, and would be random.

    In transformers' loading information tied weights and recomputed buffers are not missing.

    Raises:
        ModelError: naming tensors, shapes and the likely cause.
    """
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if info["mismatched_keys"]:
        name, got, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{what}: {len(info['mismatched_keys'])} tensors have other shapes than its config.json says; "
            f"{name} is {tuple(got)}, expected {tuple(wanted)}"
        )
    if missing:
        raise ModelError(
            f"{what}: its weights lack {len(missing)} tensors, which would be random: {_some(missing)}"
            + (f"; they have {len(unexpected)} unknown ones: {_some(unexpected)}" if unexpected else "")
            + _cause(missing, unexpected)
        )
    if lost := _dropped(model, unexpected):
        raise ModelError(
            f"{what}: its weights have {len(lost)} tensors that its config.json makes no use of: {_some(lost)}"
            + _cause(missing, lost)
        )
    if unexpected:
        log.warning("%s: not part of the language model, left out: %s", what, _some(unexpected))


def check_decoder(what: str, config: Any) -> None:
    """Refuse an encoder-decoder, of which only the half that writes would be loaded. Raises ModelError."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what} is an encoder-decoder ({config.model_type}); a causal language model is wanted")


def check_finite(what: str, model: Any) -> None:
    """Refuse NaN and infinity: what is computed with them looks like an answer. Raises ModelError with the name."""
    for name, weight in model.named_parameters():
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16) or not weight.numel():
            continue
        # one pass without a copy; a NaN anywhere makes both ends NaN
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach())):
            raise ModelError(f"{what}: {name} has NaN or infinity; the file is damaged, or was saved from a failed run")


def _of_no_text(tokenizer: Any) -> set[str]:
    """Return special tokens that no prompt has: those that stand for an image, say."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token}
    written = f"{tokenizer.chat_template or ''}{WRITTEN}"
    return {token for token in special - used if token not in written}


def _refuse_beyond(embedding: Any, rows: int) -> None:
    """Let an embedding say which token it has no row for, before a device is asked for it."""

    def check(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        largest = int(args[0].max()) if args[0].numel() else 0
        if largest >= rows:
            raise ValueError(f"the text has token {largest}, for which the model has none of its {rows} rows")

    embedding.register_forward_pre_hook(check)


def check_vocabulary(what: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives tokens the model has no row for. A token that only pads is never looked up.

    One that no prompt has is let be; a text that has it all the same is refused when the model is to read it.

    Raises:
        ModelError: naming the first such token.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    outside = {t: i for t, i in tokenizer.get_vocab().items() if i >= rows and t != tokenizer.pad_token}
    if outside and outside.keys() <= _of_no_text(tokenizer):
        _refuse_beyond(embedding, rows)
    elif outside:
        token = min(outside, key=outside.__getitem__)
        raise ModelError(
            f"{what}: its tokenizer has {len(outside)} tokens beyond the model's {rows} (first: {token!r} is number "
            f"{outside[token]}); use the model's own tokenizer, or save the model after resize_token_embeddings"
        )


def quantised_bits(what: str, config: Any, asked: int) -> int:
    """Return the bits a model's weights are stored in, 0 if they are not quantised; they must be what was asked.

    Raises:
        ModelError: another number of bits, or a way of quantising that no setting stands for.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return 0
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    kind = str(facts.get("quant_method") or "an unknown method")
    if kind.rsplit(".", 1)[-1].lower() not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise ModelError(f"{what} is quantised by {kind}, which is not supported; use its unquantised weights")
    bits = 4 if facts.get("load_in_4bit") else 8
    if bits != asked:
        raise ModelError(
            f"{what} is stored in {bits} bits and model.quantization is {asked}; set model.quantization={bits}, "
            "or use its unquantised weights"
        )
    return bits
