"""FlowerTune's sentiment evaluation step by step, on random models of many kinds; and what it gave in transformers 4.53.

`reference_sentiment.json` was written by this module with an older transformers put before the installed one:

    python -m pip install --target OLD --no-deps transformers==4.53.0 tokenizers==0.21.4 huggingface_hub==0.36.2
    PYTHONPATH=OLD:. python -m tests.evaluation.reference_sentiment > tests/evaluation/reference_sentiment.json
"""

from __future__ import annotations

import itertools
import json
import sys
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from tests.tiny import make_tokenizer

PROMPTS = [
    f"Instruction: What is the sentiment of this news? Please choose an answer.\nInput: {text}\nAnswer: "
    for text in ("Profit rose today .", "The board met .", "No", "Sales fell and fell and fell again .", "It is so .")
]
NEW_TOKENS = 12
SEED = 2024
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
GQA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
WIDE = {**GQA, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GQA,
    "Mistral": {**GQA, "sliding_window": 16},
    "Qwen2": GQA,
    "Qwen3": WIDE,
    "Phi3": {**GQA, "pad_token_id": 0},
    "Phi": GQA,
    "Gemma": WIDE,
    "Gemma2": WIDE,
    "Gemma3Text": {**WIDE, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "GPT2": GPT2,
    "GPTNeoX": {**COMMON, "intermediate_size": 48},
    "OPT": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@dataclass(frozen=True)
class Case:
    """One model and tokenizer.

    Attributes:
        family: of the model.
        side: where the tokenizer pads.
        pad: `none`, `eos` or `own`: what the tokenizer has as its padding token.
        rows: of the model's embeddings beyond the tokenizer's tokens; with `[PAD]` they become exactly 1.
        tied: whether the head is the embedding.
        bos: whether the tokenizer puts BOS before a text.
        sampled: whether the model's generation settings say so.
        penalty: a repetition penalty in the model's generation settings; 0 for none.
    """

    family: str
    side: str
    pad: str
    rows: int
    tied: bool
    bos: bool = False
    penalty: float = 0.0
    sampled: bool = False

    @property
    def name(self) -> str:
        """A name for people and for the file."""
        extras = [
            "tied" if self.tied else "untied",
            *(["bos"] if self.bos else []),
            *(["sampled"] if self.sampled else []),
        ]
        penalty = [f"penalty{self.penalty}"] if self.penalty else []
        return "-".join([self.family, self.side, self.pad, f"rows{self.rows}", *extras, *penalty])


def cases() -> list[Case]:
    """All cases: every arrangement of vocabulary and padding for one family, a few of them for the others."""
    sides, rows, ties = ("right", "left"), (0, 1, 90), (True, False)
    pads = itertools.cycle(("none", "eos"))
    found = [Case("Llama", s, next(pads), r, t, bos=r == 90) for s, r, t in itertools.product(sides, rows, ties)]
    found += [Case("Llama", side, "own", 90, tied=True) for side in sides]
    found += [Case("Llama", side, "eos", r, tied=False, penalty=1.3) for side in sides for r in (0, 90)]
    found += [Case("Llama", side, "eos", r, tied=False, sampled=True) for side in sides for r in (0, 90)]
    for number, family in enumerate(f for f in FAMILIES if f != "Llama"):
        tied = family.startswith(("Gemma", "GPT2", "OPT", "Bloom", "Falcon"))
        found += [Case(family, "right", next(pads), r, tied, bos=bool(number % 2)) for r in (0, 90)]
        found += [Case(family, "left", next(pads), 0, tied)]
    return found


def tokenizer_of(case: Case) -> Any:
    """Return the case's tokenizer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.padding_side = case.side
    tokenizer.pad_token = {"none": None, "eos": tokenizer.eos_token, "own": "<|endoftext|>"}[case.pad]
    if case.bos:
        start = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
    return tokenizer


def _values(name: str, shape: torch.Size) -> torch.Tensor:
    """Return a parameter's values by its name, however a release initialises it."""
    name = name.replace("embed_out", "lm_head")  # GPT-NeoX's head has another name in later releases
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return drawn * (0.2 if "embed" in name or "wte" in name or "wpe" in name else 0.4)
    scale_of_norm = name.endswith("weight")
    return 1 + 0.1 * drawn if scale_of_norm else 0.3 * drawn


def model_of(case: Case, size: int) -> Any:
    """Return the case's random model with so many rows in its vocabulary."""
    import transformers

    config = getattr(transformers, f"{case.family}Config")(
        vocab_size=size, tie_word_embeddings=case.tied, bos_token_id=1, eos_token_id=2, **FAMILIES[case.family]
    )
    # the attention that transformers chooses; but for Gemma 2, 4.53 chooses one that leaves out a part of the model
    attention = {"attn_implementation": "eager"} if case.family == "Gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter.shape))
    model.generation_config.pad_token_id = None
    model.generation_config.repetition_penalty = case.penalty or None
    if case.sampled:
        model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    return model


def script(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """Do what FlowerTune's finance/eval.py and benchmarks.py do with a model, a tokenizer and a batch of prompts.

    They generate to `max_length=512`, here the number of new tokens is given; and they set the seed once, at the start.
    """
    if not tokenizer.pad_token or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, max_length=512, return_token_type_ids=False)
    torch.manual_seed(SEED)
    with torch.no_grad():
        made = model.generate(**tokens, max_new_tokens=new_tokens, eos_token_id=tokenizer.eos_token_id)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
    return [text.split("Answer: ")[1] for text in texts]


def main() -> None:
    """Print what the script gives in the installed release of transformers."""
    torch.set_num_threads(1)
    found = {}
    for case in cases():
        tokenizer = tokenizer_of(case)
        model = model_of(case, len(tokenizer) + case.rows)
        found[case.name] = script(model, tokenizer, PROMPTS, NEW_TOKENS)
        sys.stderr.write(f"{case.name}\n")
    json.dump(found, sys.stdout, indent=0)


if __name__ == "__main__":
    main()
