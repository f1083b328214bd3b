"""The official answer to a question is what `generate` gives, whatever the model's own generation settings are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config.schema import ModelSettings
from fedtune.domains.base import Item
from fedtune.evaluation import official
from fedtune.models.load import load

PROMPTS = ("Which one? A. first B. second", "yes no maybe yes no maybe", "C D E")
ITEMS = [Item(prompt, prompt, ("A", "B"), 0) for prompt in PROMPTS]


def _generated(model: Any, tokenizer: Any) -> list[str]:
    found = []
    for item in ITEMS:
        ids = torch.tensor([tokenizer(official.wrap(item.prompt))["input_ids"]])
        made = model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=tokenizer.eos_token_id,
        )
        found.append(tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize(
    "setting",
    [
        *("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
        *("sequence_bias", "forced_eos_token_id", "num_beams"),
    ],
)
def test_the_answer_is_that_of_generate_under_the_model_s_settings(tiny_folder: Path, setting: str) -> None:
    base = load(ModelSettings(name=str(tiny_folder), dtype="float32"))
    model, tokenizer = base.model, base.tokenizer
    plain = [text for batch in official.choose(model, tokenizer, ITEMS) for text in batch]
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(official.wrap(p))["input_ids"]]) for p in PROMPTS]
        top = sorted({int(model(input_ids=row).logits[0, -1].argmax()) for row in ids})
    values = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": top,
        "begin_suppress_tokens": top,
        "bad_words_ids": [[token] for token in top],
        "sequence_bias": [[[token], -50.0] for token in top],
        "forced_eos_token_id": 2,
        "num_beams": 2,
    }
    setattr(model.generation_config, setting, values[setting])
    found = [text for batch in official.choose(model, tokenizer, ITEMS) for text in batch]
    assert found == _generated(model, tokenizer)
    if setting not in ("repetition_penalty", "no_repeat_ngram_size", "num_beams"):
        assert found != plain
