"""A second adapter whose weight depends on the text has that weight however the text is scored or continued."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.domains.base import Item
from fedtune.evaluation import official
from fedtune.evaluation.generate import Decoding, complete
from fedtune.models import attention, sides
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.attention import packed_logits, text_features
from fedtune.models.head import log_probabilities
from fedtune.models.load import load
from fedtune.types import AdapterError

WORDS = ("news", "this", "yes and no")
PROMPTS = [f"What is the sentiment of {word}? Answer: " for word in WORDS]
ITEMS = [Item(prompt, "x", ("maybe", "no"), 0) for prompt in PROMPTS]


@pytest.fixture
def mixed(tiny_folder: Path) -> AdaptedModel:
    base = load(ModelSettings(name=str(tiny_folder), dtype="float32"))
    model = attach(base, LoraSettings(r=2, alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj")), 0)
    generator = torch.Generator().manual_seed(3)
    tensors = {n: 0.5 * torch.randn(p.shape, generator=generator) for n, p in model.slots.items()}
    tensors |= {n.replace(".lora_", ".other_"): torch.randn(p.shape, generator=generator) for n, p in tensors.items()}
    anchors = text_features(model.model, [base.tokenizer(p)["input_ids"] for p in (PROMPTS[0], "B or C?")])
    model.load({**tensors, "mix.anchors": anchors, "mix.weight": torch.tensor(1.0)})
    model.model.eval()
    return model


@pytest.fixture
def used(mixed: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The second adapter's weights in every pass of the adapted layers: one a row."""
    seen: list[Any] = []
    own = sides._Layer._own

    def noted(self: Any, module: Any, inputs: Any, output: Any) -> Any:
        if self.sides.active:
            seen.append(torch.as_tensor(self.gates[1]).flatten())
        return own(self, module, inputs, output)

    monkeypatch.setattr(sides._Layer, "_own", noted)
    for layer in mixed.sides._layers.values():
        layer.layer.lora_B["default"]._forward_hooks.clear()
        layer.layer.lora_B["default"].register_forward_hook(layer._own)
    return seen


def _weights(model: AdaptedModel, texts: list[list[int]]) -> torch.Tensor:
    return model.sides.similarity(text_features(model.model, texts))


def test_the_official_sentiment_evaluation_mixes_by_prompt(mixed: AdaptedModel, used: list[Any]) -> None:
    tokenizer = mixed.base.tokenizer
    list(official.sentiment(mixed.model, tokenizer, ITEMS, 4))
    want = _weights(mixed, [tokenizer(p)["input_ids"] for p in PROMPTS])
    assert len({round(float(w), 4) for w in want}) == 3
    assert used
    assert all(torch.allclose(weights, want, atol=1e-5) for weights in used)


def test_beams_have_their_prompt_s_mixture(mixed: AdaptedModel, used: list[Any]) -> None:
    tokenizer, mixed.model.generation_config.num_beams = mixed.base.tokenizer, 2
    list(official.sentiment(mixed.model, tokenizer, ITEMS, 4))
    want = _weights(mixed, [tokenizer(p)["input_ids"] for p in PROMPTS]).repeat_interleave(2)
    assert len(used[-1]) == 6
    assert all(torch.allclose(weights, want, atol=1e-5) for weights in used if len(weights) == 6)


def test_an_official_answer_of_several_tokens_mixes_by_prompt(mixed: AdaptedModel, used: list[Any]) -> None:
    tokenizer = mixed.base.tokenizer
    assert len(tokenizer("maybe", add_special_tokens=False)["input_ids"]) > 1 or pytest.fail("of one token")
    list(official.choose(mixed.model, tokenizer, ITEMS[:1]))
    want = _weights(mixed, [tokenizer(official.wrap(PROMPTS[0]))["input_ids"]])
    assert used
    assert all(torch.allclose(weights, want, atol=1e-5) for weights in used)


def test_a_pass_that_names_no_text_is_an_error_and_not_a_sum_of_both(mixed: AdaptedModel) -> None:
    with pytest.raises(AdapterError, match="depends on the text"):
        mixed.model(input_ids=torch.tensor([[5, 6, 7]]))


def test_an_answer_s_likelihood_depends_on_nothing_after_it(mixed: AdaptedModel) -> None:
    prompt = list(range(20, 50))
    with torch.no_grad():
        found = [log_probabilities(mixed.model, [[*prompt, 55, end]], [29], [(0, 55)]) for end in (60, 61, 300)]
        alone = packed_logits(mixed.model, [prompt], [29]).log_softmax(-1)[:, 55]
    assert all(torch.allclose(one, alone, atol=1e-5) for one in found)


def test_prompts_are_read_once_and_no_more_than_a_lot_at_a_time(
    mixed: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many samples a prompt has, and without a table of the logits of all places."""
    tokenizer, rows = mixed.base.tokenizer, []
    monkeypatch.setattr(attention, "BATCH", 24)
    own = attention._features

    def noted(model: Any, texts: Any) -> Any:
        rows.append([len(text) for text in texts])
        return own(model, texts)

    monkeypatch.setattr(attention, "_features", noted)
    want = [list(w) for w in (tokenizer(p)["input_ids"] for p in PROMPTS)]
    decoding = Decoding(temperature=0.5, new_tokens=2)
    list(complete(mixed.model, tokenizer, PROMPTS, [()] * 3, decoding, samples=3))
    assert [n for row in rows for n in row] == [len(text) for text in want]
    assert all(sum(row) <= 24 or len(row) == 1 for row in rows)
    assert len(rows) > 1
