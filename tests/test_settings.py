"""Settings are checked wherever they are loaded; one that would change nothing is refused with the reason."""

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel

from fedtune.config import Config, protocol_names
from fedtune.config.load import WHOLE, merge, parse_assignment
from fedtune.domains import DOMAINS
from fedtune.settings import load, resolve
from fedtune.types import ConfigError


def made(domain: str, *assignments: str) -> Config:
    return load([{"domain": domain}, *map(parse_assignment, assignments)]).config


WITHOUT_EFFECT = {
    "the only client": ("finance", "federation.fraction", ["federation.clients=1", "federation.fraction=0.5"]),
    "one client's split": ("finance", "data.partition", ["federation.clients=1", "data.partition=natural"]),
    "a folder nobody reads": ("finance", "data.path", ["data.path=/here"]),
    "balance of all rows": ("general", "data.balance", ["data.balance=true"]),
    "a packaged revision": ("finance", "model.revision", ["model.revision=main"]),
    "scale at rank 1": ("finance", "lora.rslora", ["lora.r=1", "lora.rslora=true"]),
    "no official mode": ("finance", "eval.official_limit", ['eval.modes=["likelihood"]', "eval.official_limit=9"]),
    "the smaller limit": ("finance", "eval.official_limit", ["eval.limit=20", "eval.official_limit=20"]),
    "no likelihood": ("finance", "eval.prompt", ['eval.modes=["official"]', "eval.prompt=chat"]),
    "likelihood of programs": ("code", "eval.prompt", ['eval.tasks=["humaneval-packaged"]', "eval.prompt=chat"]),
    "samples of answers": ("finance", "eval.samples", ["eval.samples=4"]),
    "samples of greedy programs": ("code", "eval.samples", ["eval.samples=4"]),
    "a limit of no program": ("finance", "eval.max_new_tokens", ["eval.max_new_tokens=9"]),
    "a limit of sampled programs": (
        "code",
        "eval.max_new_tokens",
        ['eval.tasks=["humaneval-packaged"]', 'eval.modes=["official"]', "eval.max_new_tokens=9"],
    ),
    "a curve of no points": ("finance", "eval.every", ["eval.every=4"]),
}
WITH_EFFECT = [
    ("code", ['eval.tasks=["humaneval-packaged"]', 'eval.modes=["official"]', "eval.samples=4"]),
    ("code", ["eval.max_new_tokens=9"]),
    ("finance", ['eval.modes=["likelihood"]', "eval.prompt=chat"]),
    ("finance", ["eval.limit=20"]),
    ("finance", ['eval.modes=["likelihood"]']),
    ("finance", ['eval.modes=["official"]', "eval.limit=40", "eval.official_limit=20"]),
    ("finance", ["federation.fraction=0.5", "data.partition=natural", "eval.every=2"]),
    ("finance", ["federation.clients=1"]),
    ("finance", ["federation.max_skipped_rounds=4"]),  # no number of skipped rounds ends the run
    ("general", ["data.limit=40", "data.balance=true"]),
    ("finance", ["model.name=some/model", "model.revision=main"]),
]


# of a federation, or of a split: value, and what else has to be set for it
OF_ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "method.name": ("flora", {}),
    "method.samples": (8, {"method": {"name": "feddpa"}}),
    "drift.proximal_mu": (0.1, {}),
    "server.optimizer": ("fedadam", {}),
    "robust.rule": ("krum", {"method": {"name": "flora"}, "federation": {"clients": 9}}),
    "attack.kind": ("sign-flip", {"attack": {"clients": [0]}}),
    "lora.ranks": ([4, 4, 8, 8], {"method": {"name": "flora"}}),
    "federation.faults.dropout": (0.5, {}),
    "federation.deadline": (5.0, {}),
    "federation.connect_timeout": (5.0, {}),
    "federation.min_clients": (2, {}),
    "federation.weights": ("shard-size", {}),
    "eval.every": (1, {}),
    "data.partition": ("natural", {}),
}


@pytest.mark.parametrize("key", OF_ARMS)
def test_an_arm_refuses_what_it_takes_no_notice_of(key: str) -> None:
    value, rest = OF_ARMS[key]
    layers = [{"domain": "finance"}, rest, parse_assignment(f"{key}={value!r}")]
    for arm in ("local-only", "centralised"):
        alone = [*layers, {"arm": arm}]
        if (arm, key) == ("local-only", "data.partition"):
            load(alone)
            continue
        with pytest.raises(ConfigError, match=rf'{re.escape(key)} = .*no effect: with arm = "{arm}"'):
            load(alone)
        load(alone, beside=["federated"])
        load(alone, here=False)
    load(layers)


def test_an_arm_takes_what_decides_how_much_it_trains() -> None:
    for arm in ("local-only", "centralised"):
        set_ = {"federation": {"clients": 8, "fraction": 0.5, "rounds": 3, "max_skipped_rounds": 2}, "lora": {"r": 8}}
        load([{"domain": "finance", "arm": arm}, set_])
        for name in protocol_names():
            load([{"domain": "finance", "arm": arm, "protocol": name}])


@pytest.mark.parametrize("what", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused_with_the_reason(what: str) -> None:
    domain, key, assignments = WITHOUT_EFFECT[what]
    with pytest.raises(ConfigError) as caught:
        made(domain, *assignments)
    [problem] = caught.value.problems
    assert problem.where.startswith(f"{key} = ")
    assert problem.what.startswith("has no effect: ")


@pytest.mark.parametrize(("domain", "assignments"), WITH_EFFECT)
def test_a_setting_with_an_effect_is_taken(domain: str, assignments: list[str]) -> None:
    made(domain, *assignments)


@pytest.mark.parametrize("name", protocol_names())
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_a_protocol_says_may_stand_in_a_file_again(domain: str, name: str) -> None:
    """The settings of a run are in its folder, every one of them, and a run is made again from there."""
    first = load([{"domain": domain, "protocol": name}])
    assert load([first.config.plain()]).config == first.config


EMPTY = [
    ("finance", ["eval.modes=[]"], "eval.modes: is empty"),
    (
        "code",
        ['eval.tasks=["algorithms-solutions"]', 'eval.modes=["official"]'],
        "algorithms-solutions cannot be scored in the mode official",
    ),
]


@pytest.mark.parametrize(("domain", "assignments", "told"), EMPTY)
def test_a_run_that_would_have_no_score_is_refused(domain: str, assignments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        made(domain, *assignments)


TWICE = ['eval.tasks=["fpb","fpb"]', 'eval.modes=["likelihood","likelihood"]', 'lora.target_modules=["q","v","q"]']


@pytest.mark.parametrize("assignment", TWICE)
def test_what_is_named_twice_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"names .* twice"):
        made("finance", assignment)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"domain": "finanse"}, 'did you mean "finance"'),
        ({"domain": "finance", "method": {"name": "nonsense"}}, "unknown method"),
        ({"domain": "finance", "eval": {"tasks": ["fbp"]}}, 'did you mean "fpb"'),
        ({"domain": "finance", "eval": {"samples": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_submission_is_checked_by_the_same_rules_without_the_submitters_folders(
    tree: dict[str, Any], told: str, tmp_path: Path
) -> None:
    from fedtune.board.entries import recipe_hash

    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(tree))
    with pytest.raises(ConfigError, match=told):
        recipe_hash(file)
    file.write_text(
        tomli_w.dumps({"domain": "finance", "model": {"name": "/home/me/model"}, "data": {"source": "folder"}})
    )
    assert len(recipe_hash(file)) == 64


def _dicts(model: type[BaseModel], place: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Return the places of all settings whose value may be a table of its own."""
    found: set[tuple[str, ...]] = set()
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        if any(k is dict or typing.get_origin(k) in (dict, Mapping) for k in kinds):
            found.add((*place, name))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _dicts(kind, (*place, name))
    return found


def test_a_table_that_is_one_value_replaces_the_one_below() -> None:
    assert _dicts(Config) == {*WHOLE, ("wrappers",)}  # that one has a table for each wrapper
    below = {"domain": "finance", "method": {"name": "flexlora"}, "lora": {"r": 16, "ranks": {"4": 0.5, "16": 0.5}}}
    assert load([below, {"lora": {"ranks": {"8": 1.0}}}]).config.lora.ranks == {8: 1.0}
    assert load([below, {"lora": {"ranks": [4, 8, 8, 16]}}]).config.lora.ranks == (4, 8, 8, 16)
    assert merge({"lora": {"r": 4, "ranks": {"4": 1.0}}}, {"lora": {"ranks": {"2": 1.0}}}) == {
        "lora": {"r": 4, "ranks": {"2": 1.0}}
    }


TEMPLATES = {
    "Alpaca's input": ("Q: {instruction} {input} A: {response}", "has {input}, which nothing fills.*prompt.input"),
    "another name": ("{system}\n{instruction}\n{response}", "has {system}, which nothing fills"),
    "misspelt": ("{instrution} {response}", "has {instrution}"),
    "no instruction": ("Q: {response}", "must have {instruction} once"),
    "two": ("{instruction} {instruction} {response}", "must have {instruction} once"),
    "response in the middle": ("{instruction} {response} {response}", "once and end"),
    "the other way round": ("{response} {instruction}", "once and end"),
    "Jinja's": ("{{instruction}} {response}", "once and end"),
    "something behind": ("{instruction} {response} ", "once and end"),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_has_the_places_that_are_filled_and_no_others(what: str) -> None:
    template, told = TEMPLATES[what]
    with pytest.raises(ConfigError, match=told):
        load([{"domain": "finance", "prompt": {"template": template}}])


def test_braces_around_what_is_no_place_stay() -> None:
    template = 'Choose from {negative/neutral/positive}, as {"a": 1}: {instruction}\n{response}'
    assert load([{"domain": "finance", "prompt": {"template": template}}]).config.prompt.template == template


def test_folders_are_named_from_everywhere(
    tiny_folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    short = f"./{tiny_folder.name}"
    for chosen, words in (
        ({"model": {"name": short}}, []),
        ({}, [f"model.name={short}"]),
        ({}, [f"model.name={tiny_folder.name}"]),
    ):
        resolved = resolve(None, [{"domain": "finance", **chosen}, *map(parse_assignment, words)]).config
        assert resolved.model.name == str(tiny_folder.resolve())
    monkeypatch.chdir(data_folder.parent)
    file = data_folder.parent / "run.toml"
    file.write_text(
        f'domain = "finance"\n[data]\nsource = "folder"\nlimit = 0\nbalance = false\npath = "{data_folder.name}"\n'
    )
    assert resolve(file, []).config.data.path == str(data_folder.resolve())
    assert resolve(None, [{"domain": "finance", "model": {"name": "some/model"}}]).config.model.name == "some/model"


def test_an_engine_that_is_not_installed_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine\.executor.*pip install 'fedtune\[simulation\]'"):
        load([{"domain": "finance", "engine": {"executor": "ray"}}])
