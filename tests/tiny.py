"""A random tiny Llama with a byte-level tokenizer, made on the spot: everything a test needs, in a tenth of a second.

`python -m tests.tiny FOLDER` writes one for the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nWhat is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.",
    "### Response: positive negative neutral yes no maybe A B C D E",
    "Question: Which one? Options: A. first B. second C. third D. fourth The answer is:",
]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


def make_model(seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def make_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    make_model(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]))
