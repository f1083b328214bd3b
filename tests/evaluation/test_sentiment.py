"""Official sentiment: texts and labels of the reference under transformers 4.53, and that no model is changed by it."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.data import packages
from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import official, pinned
from fedtune.evaluation.extract import official_label
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.run import evaluate
from fedtune.io import read_lines
from fedtune.models.load import LoadedModel
from fedtune.models.load import load as load_model
from tests.evaluation import reference_sentiment as reference
from tests.evaluation.reference_sentiment import Case

GOLDEN = json.loads(Path(__file__).with_name("reference_sentiment.json").read_text(encoding="utf-8"))
ITEMS = [Item(prompt, "", ("negative", "neutral", "positive"), 0) for prompt in reference.PROMPTS]


def _ours(model: Any, tokenizer: Any, new_tokens: int = reference.NEW_TOKENS) -> list[str]:
    return [text for batch in official.sentiment(model, tokenizer, ITEMS, new_tokens) for text in batch]


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode whole texts, also where the label is fixed."""
    monkeypatch.setattr(official, "verdict_fixed", lambda text: False)


@pytest.mark.packaged
def test_the_packaged_model_gives_the_reference_s_texts_and_labels(
    packaged: Callable[..., Path], benchmark_data: Path, to_the_end: None
) -> None:
    packaged(packages.SMOLLM2)
    expected = benchmark_data / "official/fpb_smollm2.json"
    if not expected.is_file():
        pytest.skip(f"{expected} is not there")
    known = json.loads(expected.read_text(encoding="utf-8"))
    with gzip.open(benchmark_data / "eval/finance/fpb_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        items = [TASKS["fpb"].item(json.loads(line)) for line, _ in zip(lines, known["out_text"], strict=False)]
    model = load_model(ModelSettings(name="packaged/smollm2-135m-instruct", dtype="float32"))
    found = [text for batch in official.sentiment(model.model, model.tokenizer, items) for text in batch]
    assert len(found) == 32
    assert found == known["out_text"]
    assert [official_label(text) for text in found] == known["new_out"]


def test_every_case_has_its_texts() -> None:
    assert set(GOLDEN) == {case.name for case in reference.cases()}


@pytest.mark.parametrize("case", reference.cases(), ids=lambda case: case.name)
def test_texts_are_those_of_the_reference(case: Case, to_the_end: None) -> None:
    """Both sides of padding, with and without a padding token, BOS, a tied head, more rows than tokens, sampling."""
    tokenizer = reference.tokenizer_of(case)
    model = reference.model_of(case, len(tokenizer) + case.rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert _ours(model, tokenizer) == GOLDEN[case.name]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.vocab_size == len(tokenizer) + case.rows
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_model_loaded_from_a_folder_gives_them_too(family: str, tmp_path: Path, to_the_end: None) -> None:
    case = next(c for c in reference.cases() if (c.family, c.side, c.pad, c.rows) == (family, "right", "none", 0))
    tokenizer = reference.tokenizer_of(case)
    reference.model_of(case, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelSettings(name=str(tmp_path)))
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert _ours(loaded.model, loaded.tokenizer) == GOLDEN[case.name]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_resized_like_any_other(bits: int, tmp_path: Path, to_the_end: None) -> None:
    """The script's steps on a model that is quantised alike, with the positions of 4.53."""
    pytest.importorskip("bitsandbytes")
    case = Case("Llama", "right", "none", 0, tied=True)
    tokenizer = reference.tokenizer_of(case)
    reference.model_of(case, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = (load_model(ModelSettings(name=str(tmp_path), quantization=bits), "cpu") for _ in range(2))
    found = _ours(ours.model, ours.tokenizer)
    with pinned.positions(theirs.model):
        expected = reference.script(theirs.model, theirs.tokenizer, reference.PROMPTS, reference.NEW_TOKENS)
    assert found == expected
    assert len(ours.tokenizer) == len(tokenizer) == len(theirs.tokenizer) - 1


@pytest.mark.parametrize("rows", [0, 1, 90])
def test_the_script_gives_the_same_logits_for_a_text_with_padding(rows: int) -> None:
    """The resized model of the installed release, its weights changed in place, is what the hooks stand for."""
    for case in (Case("Phi", "right", "eos", rows, tied=False), Case("Gemma", "right", "none", rows, tied=True)):
        tokenizer = reference.tokenizer_of(case)
        ours, theirs = (reference.model_of(case, len(tokenizer) + rows) for _ in range(2))
        padder = pinned.padding_tokenizer(tokenizer)
        torch.manual_seed(0)
        theirs.resize_token_embeddings(len(padder))
        ids = torch.tensor([[7, 8, padder.pad_token_id, 9]])
        with torch.inference_mode():
            with pinned.vocabulary(ours, tokenizer, padder)():
                found = ours(input_ids=ids).logits
            expected = theirs(input_ids=ids).logits
        assert found.shape == expected.shape == (1, 4, len(padder))
        # their row is drawn around the mean
        assert torch.allclose(found, expected, rtol=0, atol=5e-2)


def test_a_tied_head_s_bias_is_filled_up_with_zeros() -> None:
    case = Case("Phi", "right", "eos", 0, tied=True)
    tokenizer = reference.tokenizer_of(case)
    model = reference.model_of(case, len(tokenizer))
    model.lm_head.weight = model.model.embed_tokens.weight
    padder = pinned.padding_tokenizer(tokenizer)
    with torch.inference_mode(), pinned.vocabulary(model, tokenizer, padder)():
        hidden = model.model(input_ids=torch.tensor([[7, 8]])).last_hidden_state
        found = model.lm_head(hidden)[..., -1]
        assert torch.allclose(found, hidden @ model.lm_head.weight.mean(0), atol=1e-5)
        assert float(model.lm_head.bias.abs().mean()) > 0.1


@pytest.mark.parametrize("kind", ["linear", "head", "saved"])
def test_an_adapter_on_the_vocabulary_s_layers_is_no_obstacle(kind: str) -> None:
    """The reference cannot resize an adapted head; here such a model is evaluated, and its padding is the mean row."""
    from peft import LoraConfig, get_peft_model

    case = Case("Llama", "right", "eos", 0, tied=False)
    tokenizer = reference.tokenizer_of(case)
    base = reference.model_of(case, len(tokenizer))
    extra: dict[str, Any] = {
        "linear": {"target_modules": ["q_proj"]},
        "head": {"target_modules": ["embed_tokens", "lm_head"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    model = get_peft_model(base, LoraConfig(r=2, **extra)).eval()
    assert _ours(model, tokenizer) == _ours(reference.model_of(case, len(tokenizer)), tokenizer)


def test_nothing_of_it_is_left_between_two_batches_or_when_one_fails(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that stops in the middle, or an item that raises, leaves a model that knows nothing of `[PAD]`."""
    loaded: LoadedModel = load_model(ModelSettings(name=str(tiny_folder)))
    monkeypatch.setattr(official, "SENTIMENT_BATCH", 2)
    rows = loaded.model.get_input_embeddings().num_embeddings

    def untouched() -> bool:
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
        return not hooked and loaded.model.config.vocab_size == rows and "[PAD]" not in loaded.tokenizer.get_vocab()

    batches = official.sentiment(loaded.model, loaded.tokenizer, ITEMS, 4)
    assert len(next(batches)) == 2
    assert untouched()
    broken = [*ITEMS[:2], Item("this has no mark", "", ("x",), 0)]
    with pytest.raises(IndexError):
        list(official.sentiment(loaded.model, loaded.tokenizer, broken, 4))
    assert untouched()


def test_ids_with_gaps_cut_off_no_token() -> None:
    """A vocabulary whose highest id is beyond its number of tokens: `[PAD]` and the tokens before it have rows."""

    class Gapped:
        pad_token, pad_token_id = "[PAD]", 399

        def __len__(self) -> int:
            return 390

    model = reference.model_of(Case("Llama", "left", "none", 0, tied=True), 395)
    with torch.inference_mode(), pinned.vocabulary(model, None, Gapped())():
        assert model(input_ids=torch.tensor([[399, 394]])).logits.shape[-1] == 400


def test_a_prompt_that_leaves_no_room_is_an_error_of_its_own_item(
    settings: Callable[..., Settings], tiny_folder: Path, tmp_path: Path
) -> None:
    """The reference's `generate` raises; a text cut off after one token would count as neutral, its neighbours' too."""
    loaded = load_model(ModelSettings(name=str(tiny_folder)))
    long = Item("Profit. " * 150 + "\nAnswer: ", "", ("negative", "neutral", "positive"), 1)
    items = TaskItems(replace(TASKS["fpb"], max_new_tokens=0), (*ITEMS[:2], long), (0, 1, 2), "hash")
    config = settings(eval__max_error_rate=0.5).config
    score = evaluate(loaded.model, loaded.tokenizer, items, "official", config, tmp_path / "log", "me")
    rows = read_lines(tmp_path / "log")[1:]
    assert [bool(row.get("error")) for row in rows] == [False, False, True]
    assert "nothing can follow" in rows[2]["error"]
    assert score.errors == 1
    assert [row["output"] for row in rows[:2]] == [
        text
        for item in ITEMS[:2]
        for batch in official.sentiment(loaded.model, loaded.tokenizer, [item])
        for text in batch
    ]
