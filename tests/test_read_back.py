"""The settings of a run that was made are read back by form and limits, whatever the defaults have become since."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.config import Config, Settings
from fedtune.config.load import flatten
from fedtune.experiment.run import run
from fedtune.settings import load
from fedtune.types import ConfigError

# in every section a number or a word that changes nothing, as a default of its time may be
OF_OTHER_DEFAULTS = """
domain = "finance"
model = { revision = "main" }
lora = { r = 1, rslora = true }
method = { name = "fedask", width = 1000000000 }
drift = { proximal_mu = 0.5 }
server = { beta1 = 0.5 }
robust = { iterations = 100, malicious = 2 }
attack = { scale = 5.0 }
data = { path = "/there", limit = 0, balance = true, partition = "natural" }
federation = { clients = 1, fraction = 0.5, rounds = 1 }
train = { optimizer = "sgd", max_steps = 1, adam_beta1 = 0.5, learning_rate_max = 0.5 }
eval = { official_limit = 9, modes = ["likelihood"], samples = 4, max_new_tokens = 9, every = 4 }
engine = { threads = 3 }
prompt = { template = "{instruction} {response}" }
"""


def test_settings_of_other_defaults_are_taken_where_they_are_read_back() -> None:
    tree = tomllib.loads(OF_OTHER_DEFAULTS)
    with pytest.raises(ConfigError) as caught:
        load([tree])
    refused = {p.where.split(".")[0] for p in caught.value.problems if p.what.startswith("has no effect: ")}
    sections = {name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)}
    sections -= {"peft", "objective"}  # a name that is chosen, and nothing else by default
    assert refused == sections - {"engine", "prompt"}  # in which nothing is without effect
    assert set(tree) - {"domain"} == sections
    kept = load([tree], kept=True).config
    assert {k: v for k, v in flatten(kept.plain()).items() if k in flatten(tree)} == flatten(tree)
    assert load([tree], here=False).config == kept
    assert load([kept.plain()], kept=True).config == kept


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"robust": {"iterations": 0}}, "robust.iterations = 0"),
        ({"robust": {"rule": "krum", "malicious": 9}}, "are asked"),
        ({"method": {"name": "fedrot_lora", "blend": 0.0}}, "with blend = 0 this is FedIT"),
        ({"method": {"name": "fedex_lora", "residual": 3}}, "unknown key"),
        ({"method": {"name": "fedavgx"}}, "unknown method"),
        ({"eval": {"modes": []}}, "is empty"),
        ({"eval": {"tasks": ["fpb", "fpb"]}}, "twice"),
    ],
)
def test_what_is_read_back_is_held_against_form_and_limits(tree: dict[str, Any], told: str) -> None:
    for where in ({"kept": True}, {"here": False}):
        with pytest.raises(ConfigError, match=re.escape(told)):
            load([{"domain": "finance", **tree}], **where)


def test_every_command_takes_a_run_of_other_defaults(
    settings: Callable[..., Settings], data_folder: Path, tmp_path: Path
) -> None:
    tree = settings(federation__clients=2, federation__rounds=1, train__max_steps=1, eval__limit=4).config.plain()
    tree["robust"]["iterations"], tree["attack"]["scale"], tree["eval"]["max_new_tokens"] = 100, 5.0, 256
    folder, _ = run(load([tree], kept=True), tmp_path / "run")
    packed = tmp_path / "packed"
    for command in (
        ["report", str(folder)],
        ["submit", str(folder), "--out", str(packed), "--team", "a team"],
        ["validate", str(packed)],
        ["verify", str(packed / "seed-42"), "--data", str(data_folder)],
        ["run", "--resume", "--out", str(folder)],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
