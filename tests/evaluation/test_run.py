"""Likelihood and official evaluation on the tiny model, against slow references; logs, resume and errors."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.domains import TASKS
from fedtune.domains.base import Item, multiple_choice, sentiment
from fedtune.evaluation import likelihood, official
from fedtune.evaluation.decode import History
from fedtune.evaluation.items import TaskItems, load
from fedtune.evaluation.run import evaluate
from fedtune.io import digest, read_lines, write_lines
from fedtune.models.load import LoadedModel
from fedtune.models.load import load as load_model
from fedtune.types import CorruptFileError

QUESTIONS = [multiple_choice("Answer.", f"Which {i} one", [f"o{i}", "x y", "z"], i % 3) for i in range(19)]
SENTENCES = [sentiment(f"Profit {'rose ' * (i % 5)}today .", i % 3, "news") for i in range(9)]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSettings(name=str(tiny_folder)))


@pytest.fixture(scope="module")
def loaded(tiny_config: Config) -> TaskItems:
    return load(TASKS["fpb"], tiny_config, 0)


def _reference(model: LoadedModel, item: Item, config: Config, wrapped: Callable[[str], str]) -> list[float]:
    """Score each answer with one plain, unpacked forward pass."""
    scores = []
    for candidate in likelihood._candidates(item, wrapped, model.tokenizer, config):
        logits = model.model(input_ids=torch.tensor([candidate.ids])).logits[0].float().log_softmax(-1)
        steps = range(candidate.start - 1, len(candidate.ids) - 1)
        scores.append(float(torch.stack([logits[i, candidate.ids[i + 1]] for i in steps]).mean()))
    return scores


@pytest.mark.parametrize("prompt", ["training", "official", "chat"])
@pytest.mark.parametrize(("items", "wrapped"), [(QUESTIONS, official.wrap), (SENTENCES, str)])
def test_packed_likelihood_is_the_plain_one(
    model: LoadedModel, settings: Callable[..., Settings], items: list[Item], wrapped: Callable[[str], str], prompt: str
) -> None:
    config = settings(eval__prompt=prompt).config
    packed = [s for batch in likelihood.score(model.model, model.tokenizer, items, wrapped, config) for s in batch]
    with torch.inference_mode():
        plain = [_reference(model, item, config, wrapped) for item in items]
    assert torch.tensor(packed) == pytest.approx(torch.tensor(plain), abs=1e-4)


def test_the_official_choice_is_what_generate_gives_one_prompt_at_a_time(model: LoadedModel) -> None:
    quick = [t for batch in official.choose(model.model, model.tokenizer, QUESTIONS) for t in batch]
    slow = []
    for item in QUESTIONS:
        ids = model.tokenizer(official.wrap(item.prompt), return_tensors="pt").input_ids
        made = model.model.generate(inputs=ids, max_new_tokens=1, do_sample=False, pad_token_id=2)
        slow.append(model.tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True))
    assert quick == slow


def test_a_repetition_penalty_of_the_model_applies_as_in_generate(tiny_folder: Path) -> None:
    fresh = load_model(ModelSettings(name=str(tiny_folder)))
    fresh.model.generation_config.repetition_penalty = 5.0
    quick = next(official.choose(fresh.model, fresh.tokenizer, QUESTIONS[:4]))
    text = fresh.tokenizer(official.wrap(QUESTIONS[0].prompt))["input_ids"]
    assert quick[0] == official._generate_one(fresh.model, fresh.tokenizer, text, 1)


def test_the_first_gold_of_a_batch_decides_how_much_is_decoded(model: LoadedModel) -> None:
    long = Item("p", "q", ("no such single token", "x"), 0)
    one = Item("p", "q", ("x", "no such single token"), 0)
    tokens = len(model.tokenizer("no such single token", add_special_tokens=False)["input_ids"])
    assert tokens > 1
    first = next(official.choose(model.model, model.tokenizer, [long, one]))
    second = next(official.choose(model.model, model.tokenizer, [one, long]))
    ids = model.tokenizer(official.wrap("p"))["input_ids"]
    assert first[1] == official._generate_one(model.model, model.tokenizer, ids, tokens)
    assert second[0] == official._generate_one(model.model, model.tokenizer, ids, 1)


def test_stopping_at_the_verdict_never_changes_a_label(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.evaluation.extract import official_label

    stopped = [t for b in official.sentiment(model.model, model.tokenizer, SENTENCES, 24) for t in b]
    monkeypatch.setattr(official, "verdict_fixed", lambda text: False)
    whole = [t for b in official.sentiment(model.model, model.tokenizer, SENTENCES, 24) for t in b]
    assert [official_label(t) for t in stopped] == [official_label(t) for t in whole]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model whose next token does depend on positions."""
    from tests.tiny import make_folder

    folder = make_folder(tmp_path_factory.mktemp("loud") / "m", seed=3, initializer_range=0.4)
    return load_model(ModelSettings(name=str(folder)))


def _token_by_token(model: LoadedModel, prompts: list[str], steps: int, padding: int) -> list[str]:
    """The padded batch, everything computed anew for each token; padding stands at a position, the rest are counted."""
    tokens = model.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
        logits = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], 1)
    width, eos = tokens["input_ids"].shape[1], model.tokenizer.eos_token_id
    rows = [r[: width + r[width:].index(eos)] if eos in r[width:] else r for r in ids.tolist()]
    return [model.tokenizer.decode(r, skip_special_tokens=True).split("Answer: ")[1] for r in rows]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_decoded_side_by_side_are_the_plain_padded_batch(
    loud: LoadedModel, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Guesses, shared beginnings, rows that join late: the text is that of the official batch, to its end."""
    prompts = [item.prompt for item in SENTENCES]
    assert len({len(loud.tokenizer(p)["input_ids"]) for p in prompts}) > 1
    monkeypatch.setattr(loud.tokenizer, "padding_side", side)
    monkeypatch.setattr(official, "verdict_fixed", lambda text: False)
    monkeypatch.setattr(official, "SENTIMENT_BATCH", 5)
    monkeypatch.setattr(official, "GROUP", 2)
    with torch.inference_mode():
        plain = [_token_by_token(loud, prompts[i : i + 5], 24, 1) for i in (0, 5)]
        ours = list(official._decoded(loud.model, loud.tokenizer, prompts, 24))
        generated = [official._generated(loud.model, loud.tokenizer, prompts[i : i + 5], 24) for i in (0, 5)]
        elsewhere = [_token_by_token(loud, prompts[i : i + 5], 24, 40) for i in (0, 5)]
    assert ours == plain
    if side == "left":
        assert ours == generated
    else:
        assert plain != elsewhere, "this model would not show where padding stands"


def test_models_with_settings_of_their_own_are_left_to_generate(tiny_folder: Path) -> None:
    fresh = load_model(ModelSettings(name=str(tiny_folder)))
    assert official._plain_greedy(fresh.model)
    fresh.model.generation_config.repetition_penalty = 1.1
    assert not official._plain_greedy(fresh.model)
    penalised = [t for b in official.sentiment(fresh.model, fresh.tokenizer, SENTENCES[:3], 8) for t in b]
    assert len(penalised) == 3
    fresh.model.generation_config.repetition_penalty = None
    fresh.model.generation_config.do_sample = True
    assert not official._plain_greedy(fresh.model)


def test_guesses_save_passes_and_change_nothing(model: LoadedModel) -> None:
    from fedtune.evaluation.decode import Decoder, Row, run

    texts = [list(range(10, 22 + 3 * i)) for i in range(5)]

    def decode(*, drafts: bool) -> tuple[list[list[int]], int]:
        rows = [Row(i, text) for i, text in enumerate(texts)]
        decoder = Decoder(model.model, lambda row: len(row.new) == 60, drafts=drafts)
        with torch.inference_mode():
            for _ in run(decoder, [rows[:2], rows[2:]], 4):
                pass
        assert all(row.ended for row in rows)
        return [row.new for row in rows], decoder.passes

    (plain, slow), (drafted, fast) = decode(drafts=False), decode(drafts=True)
    assert drafted == plain
    assert fast < slow


def scanned(tokens: list[int], most: int) -> list[int]:
    """What followed the last tokens where they last stood before, found by going through the whole text."""
    for length in range(min(3, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                rest = tokens[start + length :]
                return [rest[i % len(rest)] for i in range(most)]
    return []


@examples(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 4), min_size=1, max_size=60), most=st.integers(1, 40), cut=st.integers(0, 60))
def test_a_guess_is_what_going_through_the_whole_text_would_find(tokens: list[int], most: int, cut: int) -> None:
    history = History()
    history.add(tokens[:cut])
    for token in tokens[cut:]:
        history.add([token])
    assert history.draft(most) == scanned(tokens, most)


PIECES = [
    "Answer",
    ":",
    " ",
    "pos",
    "itive",
    "Positive",
    " negative",
    "<|im_start|>",
    "An",
    "swer: ",
    "\u00e9",
    "x",
    "itive ",
]


@examples(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6),
    new=st.lists(st.sampled_from(PIECES), min_size=1, max_size=60),
)
def test_a_label_is_fixed_at_the_token_at_which_the_whole_text_fixes_it(
    model: LoadedModel, prompt: list[str], new: list[str]
) -> None:
    tokenizer = model.tokenizer
    before, after = (tokenizer("".join(part))["input_ids"] for part in (prompt, new))

    def first(fixed: Callable[[int], bool]) -> int | None:
        return next((n for n in range(1, len(after) + 1) if fixed(n)), None)

    def whole(n: int) -> bool:
        return official.verdict_fixed(tokenizer.decode([*before, *after[:n]], skip_special_tokens=True))

    fixed = official._label_fixed(tokenizer)
    assert first(lambda n: fixed(before, after[:n])) == first(whole)


def test_guesses_stay_inside_a_table_of_positions() -> None:
    """GPT-2 has one; a row that is nearly full is beside one that has room for long drafts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedtune.evaluation.decode import Decoder, Row, run

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()

    def decode(*, drafts: bool) -> list[list[int]]:
        rows = [Row(i, list(range(5, 5 + n))) for i, n in enumerate((8, 30))]
        decoder = Decoder(model, lambda row: len(row.prompt) + len(row.new) == 48, drafts=drafts)
        with torch.inference_mode():
            for _ in run(decoder, [rows], 4):
                pass
        return [row.new for row in rows]

    assert decode(drafts=True) == decode(drafts=False)


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("Input: good\nAnswer: negative", False),
        ("Input: good\nAnswer: negative, or positive", True),
        ("Input: good\nAnswer: x\nAnswer: ", True),
        ("Input: good\nAnswer: Pos", False),
        ("positive\nAnswer: ", False),
    ],
)
def test_when_a_verdict_is_fixed(text: str, fixed: bool) -> None:
    assert official.verdict_fixed(text) is fixed


def test_a_second_call_does_only_what_is_missing(
    model: LoadedModel, loaded: TaskItems, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that dies at a sample keeps what is on disk; the next call does the rest."""
    log = tmp_path / "fpb.jsonl"
    real = likelihood.score
    monkeypatch.setattr(likelihood, "MAX_TOKENS", 300)

    def dies(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(likelihood, "score", dies)
    args = (model.model, model.tokenizer, loaded, "likelihood", tiny_config, log, "me")
    with pytest.raises(KeyboardInterrupt):
        evaluate(*args)
    kept = read_lines(log)[1:]
    assert 0 < len(kept) < len(loaded.items)
    asked: list[int] = []

    def counts(model: Any, tokenizer: Any, items: Any, *rest: Any) -> Iterator[Any]:
        asked.append(len(items))
        return real(model, tokenizer, items, *rest)

    monkeypatch.setattr(likelihood, "score", counts)
    resumed = evaluate(*args)
    assert asked == [len(loaded.items) - len(kept)]
    assert read_lines(log)[1 : len(kept) + 1] == kept
    fresh = evaluate(*args[:5], tmp_path / "other.jsonl", "me")
    assert resumed == fresh
    assert [r["i"] for r in read_lines(log)[1:]] == list(range(len(loaded.items)))
    inode = log.stat().st_ino
    assert evaluate(*args) == fresh
    assert log.stat().st_ino == inode, "a log that lacks nothing is left alone"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"correct": 2}, "line 2: correct is 2, it gives"),
        ({"predicted": "x"}, "line 2: predicted is 'x', it gives"),
        ({"gold": "x"}, "line 2: its right answer is not the item's"),
        ({"gold": None}, "line 2: its right answer is not the item's"),
        ({"answers": 5}, "line 2: its possible answers are not the item's"),
        ({"scores": 5}, "line 2: it has not one likelihood for each answer"),
        (
            {"same_prompt_as": 1},
            "line 2: it names another sample, which only those of official answers to questions do",
        ),
        ({"error": "no", "correct": True}, "line 2: an item that raised has an answer or counts as right"),
    ],
)
def test_a_log_is_held_against_its_items_and_what_it_says_of_its_own_answers(
    model: LoadedModel, loaded: TaskItems, tiny_config: Config, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    few = replace(loaded, items=loaded.items[:2], places=loaded.places[:2])
    args = (model.model, model.tokenizer, few, "likelihood", tiny_config, tmp_path / "fpb.jsonl", "me")
    evaluate(*args)
    header, first, *rest = read_lines(args[5])
    write_lines(args[5], [header, {**first, **change}, *rest])
    with pytest.raises(CorruptFileError, match=re.escape(f"{args[5]}: {why}")):
        evaluate(*args)


def test_a_log_of_another_model_is_started_anew(
    model: LoadedModel, loaded: TaskItems, tiny_config: Config, tmp_path: Path
) -> None:
    log = tmp_path / "fpb.jsonl"
    for who in ("first", "second"):
        evaluate(model.model, model.tokenizer, loaded, "likelihood", tiny_config, log, who)
    lines = read_lines(log)
    assert lines[0]["model"] == "second"
    assert len(lines) == len(loaded.items) + 1


def test_one_bad_item_is_an_error_and_counts_as_wrong(
    model: LoadedModel,
    loaded: TaskItems,
    settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = loaded.items[5]
    real = likelihood._candidates

    def sometimes(item: Item, *rest: Any) -> Any:
        if item is bad:
            raise ValueError("cannot encode this")
        return real(item, *rest)

    monkeypatch.setattr(likelihood, "_candidates", sometimes)
    lax = settings(eval__max_error_rate=0.1).config
    found = evaluate(model.model, model.tokenizer, loaded, "likelihood", lax, tmp_path / "a.jsonl", "me")
    assert (found.n, found.errors) == (24, 1)
    assert found.score is not None
    row = read_lines(tmp_path / "a.jsonl")[6]
    assert row["error"] == "ValueError: cannot encode this"
    assert not row["correct"]
    strict = settings(eval__max_error_rate=0.0).config
    withheld = evaluate(model.model, model.tokenizer, loaded, "likelihood", strict, tmp_path / "b.jsonl", "me")
    assert withheld.score is None
    assert withheld.withheld == "1 of 24 items raised an error, more than 0.0%: ValueError: cannot encode this"


def test_a_limit_takes_the_same_sample_in_file_order(tiny_config: Config) -> None:
    once, again = load(TASKS["fpb"], tiny_config, 7), load(TASKS["fpb"], tiny_config, 7)
    assert once.places == again.places == tuple(sorted(once.places))
    assert len(set(once.places)) == 7
    assert once.sha256 == digest([vars(i) for i in once.items])


def test_a_folder_without_the_set_says_which_file_it_wants(tiny_config: Config) -> None:
    from fedtune.types import DataError

    with pytest.raises(DataError, match=r"eval/finance: no tfns_validation\.jsonl"):
        load(TASKS["tfns"], tiny_config, 0)
