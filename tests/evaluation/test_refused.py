"""What cannot be scored is an error that says why: a model of NaN, a prompt that the chat template refuses."""

from collections.abc import Callable
from pathlib import Path

import torch

from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.domains import TASKS
from fedtune.evaluation.items import load
from fedtune.evaluation.run import evaluate
from fedtune.models.load import load as load_model


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
