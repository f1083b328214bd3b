"""What cannot be scored is an error that says why: a model of NaN, a prompt that the chat template refuses."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import likelihood, official
from fedtune.evaluation.generate import Decoding, complete
from fedtune.evaluation.items import load
from fedtune.evaluation.retry import Failed, batches
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.scorers import KINDS
from fedtune.experiment.evaluate import evaluate as evaluate_model
from fedtune.experiment.run import run
from fedtune.io import read_lines
from fedtune.models.load import load as load_model
from fedtune.types import ModelError


def test_a_likelihood_that_is_not_a_number_is_an_error_and_not_the_first_answer(
    tiny_folder: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    base = load_model(ModelSettings(name=str(tiny_folder)))
    config = settings().config
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    loaded = load(TASKS["fpb"], config, 6)
    score = evaluate(base.model, base.tokenizer, loaded, "likelihood", config, tmp_path / "log.jsonl", "me")
    assert (score.score, score.errors) == (None, 6)
    assert "the model's likelihood of an answer is not a number" in score.withheld


def _chat(template: str | None, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_refuses_is_named_before_any_work(
    tiny_folder: Path, settings: Callable[..., Settings], tmp_path: Path, template: str | None, said: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    _chat(template, folder)
    chosen = settings(model__name=str(folder), eval__prompt="chat")
    with pytest.raises(ModelError, match=said):
        evaluate_model(chosen.config, None, tmp_path / "evals")
    assert not list((tmp_path / "evals").glob("*.jsonl"))
    with pytest.raises(ModelError, match=said):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run/rounds.jsonl").exists()


def test_a_template_that_refuses_one_item_costs_that_item(
    tiny_folder: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    base = load_model(ModelSettings(name=str(tiny_folder)))
    config = settings(eval__prompt="chat", eval__max_error_rate=0.5).config
    loaded = load(TASKS["fpb"], config, 6)
    odd = loaded.items[2].question
    base.tokenizer.chat_template = "{% if messages[0].content == odd %}{{ raise_exception('not this') }}{% endif %}x"
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace("odd", json.dumps(odd))
    score = evaluate(base.model, base.tokenizer, loaded, "likelihood", config, tmp_path / "log.jsonl", "me")
    assert score.errors == 1
    assert "not this" in read_lines(tmp_path / "log.jsonl")[3]["error"]


def test_a_chat_prompt_is_encoded_as_the_template_wrote_it(
    tiny_folder: Path, settings: Callable[..., Settings]
) -> None:
    """The template begins with what is also this tokenizer's token for the beginning of a text; it has to stay."""
    tokenizer = load_model(ModelSettings(name=str(tiny_folder))).tokenizer
    config = settings(eval__prompt="chat").config
    item = load(TASKS["fpb"], config, 1).items[0]
    turns = [{"role": "user", "content": item.question}]
    want = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert want[0] == tokenizer.bos_token_id
    for candidate in likelihood._candidates(item, str, tokenizer, config):
        assert list(candidate.ids[: candidate.start]) == want


def test_answers_that_all_have_no_likelihood_are_an_error_and_not_the_first_one() -> None:
    item = Item("x", "x", ("a", "b"), 0)
    none, some = (KINDS["choice"]["likelihood"].sample(item, [-math.inf, other]) for other in (-math.inf, -9.0))
    assert none["error"] == "the model's likelihood of every answer is zero"
    assert (none["correct"], none["valid"], some["predicted"]) == (False, False, "b")
    assert "error" in KINDS["solution"]["likelihood"].sample(Item("x", "x", ("a",), 0), [-math.inf])


def _refused(tiny_folder: Path, ask: Callable[[Any, Any, list[Item]], Iterator[Any]], **settings: Any) -> None:
    """One text of three has a token whose embedding is NaN: it is refused, the others have an answer."""
    base = load_model(ModelSettings(name=str(tiny_folder), dtype="float32"))
    for name, value in settings.items():
        setattr(base.model.generation_config, name, value)
    texts = ["one Answer: ", "two \u00b6 Answer: ", "one Answer: "]
    first = base.tokenizer("\u00b6")["input_ids"]
    assert not {*first} & {*base.tokenizer(texts[0])["input_ids"]}
    items = [Item(text, text, ("maybe", "no"), 0) for text in texts]
    hook = lambda module, args, output: torch.where(args[0][..., None] == first[0], torch.nan, output)  # noqa: E731
    base.model.get_input_embeddings().register_forward_hook(hook)
    found = [
        row for batch in batches(lambda i, j: ask(base.model, base.tokenizer, items[i:j]), 0, 3, 16) for row in batch
    ]
    assert [isinstance(row, Failed) for row in found] == [False, True, False]
    assert "logits are not numbers" in found[1].text
    assert found[0] == found[2]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"no_repeat_ngram_size": 3}, {"do_sample": True}])
def test_official_answers_from_logits_that_are_no_numbers_are_errors(
    tiny_folder: Path, settings: dict[str, Any]
) -> None:
    _refused(tiny_folder, lambda m, t, items: official.sentiment(m, t, items, 3), **settings)


@pytest.mark.parametrize("golds", [("A", "B"), ("maybe", "no")])
def test_an_official_choice_from_logits_that_are_no_numbers_is_an_error(tiny_folder: Path, golds: Any) -> None:
    def ask(model: Any, tokenizer: Any, items: list[Item]) -> Iterator[Any]:
        return official.choose(model, tokenizer, [replace(item, answers=golds) for item in items])

    _refused(tiny_folder, ask)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("batch", [True, False])
def test_programs_from_logits_that_are_no_numbers_are_errors(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, batch: bool
) -> None:
    monkeypatch.setattr("fedtune.evaluation.alone.batches", lambda model, longest: batch)
    how = Decoding(temperature=temperature, new_tokens=3)

    def ask(model: Any, tokenizer: Any, items: list[Item]) -> Iterator[Any]:
        return complete(model, tokenizer, [i.prompt for i in items], [()] * len(items), how, places=[0] * len(items))

    _refused(tiny_folder, ask)
