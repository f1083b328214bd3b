import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from pydantic import model_validator

from fedtune import domains, methods
from fedtune.config import Config, Settings, parse_assignment, protocol_names, read_protocol
from fedtune.config.depth import DEEPEST, parsed, too_deep
from fedtune.config.load import flatten, merge, read_toml
from fedtune.config.section import Section, own_problems
from fedtune.settings import load, resolve
from fedtune.types import ConfigError

FROZEN = {
    "corrected": "9ae171829bada5e2",
    "flowertune-leaderboard": "3131854f680c0801",
    "flowertune-paper": "30710ab4d64ee2a6",
}


def _problems(tree: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load([tree])
    return str(caught.value)


def test_all_mistakes_are_reported_at_once_with_what_was_meant() -> None:
    text = _problems(
        {
            "domain": "finance",
            "lora": {"rr": 3, "r": 0},
            "train": {"labels": "ofsets"},
            "rounds": 3,
            "federation": {"min_clients": 9},
        }
    )
    assert text.startswith("settings (5 problems)")
    assert 'lora.rr: unknown key; did you mean "r"?' in text
    assert "lora.r = 0: Input should be greater than or equal to 1" in text
    assert 'did you mean "offsets"?' in text
    assert 'rounds: unknown key; did you mean "federation.rounds"?' in text
    assert "min_clients = 9 but only 4 are asked per round" in text


def test_wrong_values_do_not_hide_wrong_names() -> None:
    text = _problems({"domain": "finanse", "lora": {"rr": 3}, "train": {"max_steps": 0}, "method": {"name": "fedpox"}})
    assert text.startswith("settings (4 problems)")
    for said in (
        'lora.rr: unknown key; did you mean "r"?',
        "train.max_steps = 0",
        'did you mean "finance"?',
        'did you mean "fedprox"?',
    ):
        assert said in text


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"domain": "finanse"}, 'did you mean "finance"?'),
        ({"domain": "finance", "method": {"name": "fedpox"}}, 'did you mean "fedprox"?'),
        (
            {"domain": "finance", "method": {"name": "lora_fair", "rige": 1}},
            'method.rige: unknown key; did you mean "ridge"',
        ),
        ({"domain": "finance", "method": {"name": "fedprox"}}, "it goes around a method: --set drift.proximal_mu=0.01"),
        ({"domain": "finance", "protocol": "corected"}, 'did you mean "corrected"?'),
        ({"domain": "finance", "eval": {"tasks": ["fbp"]}}, 'did you mean "fpb"?'),
        ({"domain": "finance", "data": {"partition": "dirichle:1"}}, 'did you mean "dirichlet"?'),
        ({"domain": "finance", "data": {"partition": "dirichlet:x"}}, "is not a number"),
        ({"domain": "finance", "data": {"partition": "iid:3"}}, "takes no argument"),
        ({"domain": "finance", "model": {"name": "packaged/smollm2-135m"}}, "packaged/smollm2-135m-instruct"),
        ({"domain": "finance", "data": {"source": "folder"}}, "--data FOLDER"),
        ({"domain": "finance", "train": {"learning_rate_min": 1.0}}, "larger than learning_rate_max"),
        ({"domain": "finance", "prompt": {"template": "no places"}}, "end with {response}"),
        ({"domain": "finance", "federation": {"faults": {"dropout": 0.7, "error": 0.7}}}, "sum to at most 1"),
        ({"domain": "finance", "train": {"learning_rate_max": float("nan")}}, "finite number"),
    ],
)
def test_each_kind_of_mistake_names_its_remedy(tree: dict[str, object], said: str) -> None:
    assert said in _problems(tree)


def test_settings_without_effect_are_refused() -> None:
    text = _problems({"domain": "finance", "method": {"name": "fedrot_lora", "blend": 0.0}})
    assert "has no effect: with blend = 0 this is FedIT" in text
    text = _problems({"domain": "finance", "server": {"tau": 0.1}, "attack": {"kind": "boost"}})
    assert 'server.tau = 0.1: has no effect: server.optimizer = "none" does not use it' in text
    assert "attack: needs both a kind and clients" in text


def test_later_layers_win_and_the_protocol_lies_below() -> None:
    made = load([{"domain": "code", "protocol": "flowertune-leaderboard", "seed": 1}, {"seed": 2}]).config
    assert (made.seed, made.federation.clients, made.federation.fraction) == (2, 10, 0.2)
    assert made.federation.cohort_size == 2


def test_the_hash_knows_what_matters_and_nothing_else() -> None:
    base = Config(domain="finance")
    assert base.hash == Config.model_validate(base.plain()).hash
    assert base.hash != Config(domain="finance", seed=43).hash
    moved = base.model_copy(update={"data": base.data.model_copy(update={"path": "/elsewhere"})})
    assert base.hash == moved.hash


@pytest.mark.parametrize(("name", "start"), FROZEN.items())
def test_published_protocols_do_not_change(name: str, start: str) -> None:
    assert read_protocol(name).hash.startswith(start), f"{name} is frozen: make a new protocol instead of changing it"


@pytest.mark.parametrize("name", protocol_names())
@pytest.mark.parametrize("domain", list(domains.DOMAINS))
def test_every_protocol_is_valid_for_every_domain_and_locks_real_keys(name: str, domain: str) -> None:
    made = load([{"domain": domain, "protocol": name}])
    keys = set(flatten(made.config.plain()))
    for locked in made.protocol.locked:
        assert any(made.protocol.locks(k) for k in keys if k.startswith(locked.removesuffix("*"))), locked
    assert bool(made.unranked) is (name == "quickstart")


def test_the_leaderboard_protocol_to_the_letter() -> None:
    rows = {"general": (20, 2, "instruction"), "finance": (50, 5, "instruction+input"), "medical": (20, 2, "input")}
    for domain, (clients, cohort, text) in {**rows, "code": (10, 2, "instruction+input")}.items():
        c = load([{"domain": domain, "protocol": "flowertune-leaderboard"}]).config
        assert (c.federation.clients, c.federation.cohort_size, c.prompt.input) == (clients, cohort, text)
        assert (c.federation.rounds, c.lora.r, c.lora.alpha, c.lora.dropout) == (200, 32, 64, 0.075)
        assert (c.train.max_steps, c.train.per_device_train_batch_size, c.train.max_length) == (10, 16, 512)
        assert (c.train.learning_rate_max, c.train.learning_rate_min) == (5e-5, 1e-6)
        assert (c.train.rows, c.train.labels, c.train.train_eos) == ("repeat", "template-tokens", False)
        assert (c.model.quantization, c.federation.weights, c.lora.target_modules) == (4, "shard-size", ())


def test_the_paper_protocol_differs_where_the_paper_does() -> None:
    cohorts = []
    for domain in ("general", "finance", "medical", "code"):
        c = load([{"domain": domain, "protocol": "flowertune-paper"}]).config
        assert (c.federation.rounds, c.lora.dora, c.prompt.input) == (15, True, "instruction+input")
        cohorts.append(c.federation.cohort_size)
    assert cohorts == [4, 10, 4, 2]


def test_a_changed_locked_key_makes_a_run_unranked_and_says_so() -> None:
    made = load([{"domain": "finance", "protocol": "corrected", "federation": {"clients": 10}}])
    assert made.unranked == ("federation.clients is 10, locked at 50 by corrected",)
    allowed = load([{"domain": "finance", "protocol": "corrected", "federation": {"rounds": 10}}])
    assert allowed.unranked == ()


def test_assignments_are_toml_or_words() -> None:
    assert parse_assignment("train.max_steps=10") == {"train": {"max_steps": 10}}
    assert parse_assignment("data.partition=dirichlet:0.3") == {"data": {"partition": "dirichlet:0.3"}}
    assert parse_assignment('eval.modes=["official"]') == {"eval": {"modes": ["official"]}}
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_assignment("train.max_steps")


def test_a_file_and_the_command_line_make_one_config(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('domain = "finance"\nseed = 7\n[method]\nname = "lora_fair"\nridge = 0.5\n')
    made = resolve(file, [{"seed": 8}, parse_assignment("lora.r=8")]).config
    assert (made.seed, made.lora.r, made.method.parameters) == (8, 8, {"ridge": 0.5})
    file.write_text("domain = \n")
    with pytest.raises(ConfigError, match=re.escape(str(file)) + r".*\(at line 1"):
        resolve(file, [])


def test_merge_keeps_what_is_below() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_create_builds_the_method_with_its_settings(settings: Callable[..., Settings]) -> None:
    method = methods.create(settings(method={"name": "lora_fair", "ridge": 0.25}).config).method
    assert isinstance(method, methods.METHODS["lora_fair"])
    assert method.parameters.model_dump() == {"ridge": 0.25}


@pytest.mark.parametrize("key", ["max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", ["10000001", "9" * 30, "9" * 4000])
def test_no_round_has_more_rows_than_can_be_planned(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve(None, [{"domain": "finance"}, parse_assignment(f"train.{key}={value}")])
    with pytest.raises(ConfigError, match="16,000,000 rows per round"):
        resolve(None, [{"domain": "finance", "train": {"max_steps": 1000000, "per_device_train_batch_size": 16}}])


DEEP = ".a" * 600


@pytest.mark.parametrize(
    "line",
    [
        *(f"a{DEEP} = 1", f"[a{DEEP}]", f"[[a{DEEP}]]", f"x = {{a{DEEP} = 1}}", "a" + ' . "a.b"' * 600 + " = 1"),
        *(f"x = 'a'  # '\na{DEEP} = 1", f'x = "\\""\na{DEEP} = 1', f"x = '''\n'''\na{DEEP} = 1"),
    ],
)
def test_a_key_of_hundreds_of_parts_is_refused_before_it_is_read(line: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'domain = "finance"\n{line}\n')
    with pytest.raises(ConfigError, match=rf"run\.toml.*has more than {DEEPEST} parts"):
        read_toml(tmp_path / "run.toml")


@pytest.mark.parametrize(
    "text",
    [
        f"a{DEEP}",
        f"# a{DEEP} = 1",
        'it\'s "quoted" \\ and # not a comment',
        f'"""\na{DEEP} = 1\n"""',
        f"'''a{DEEP}'''",
        "\\" * 9 + '"',
    ],
)
def test_dots_in_texts_and_comments_are_no_keys(text: str) -> None:
    settings = {"prompt": {"system": text}, "data": {"path": text}}
    assert parsed(tomli_w.dumps(settings)) == settings
    assert parsed(tomli_w.dumps(settings, multiline_strings=True)) == settings
    assert parsed(f"x = 1  # {text}\n" if "\n" not in text else "x = 1") == {"x": 1}
    assert parse_assignment(f"model.name={text}")["model"]["name"]


@pytest.mark.parametrize("value", [{"a": 1}, [1], (1,)], ids=str)
def test_settings_inside_each_other_without_end_are_refused(value: Any) -> None:
    for _ in range(DEEPEST - 3):
        value = {"a": value} if isinstance(value, dict) else [value]
    layer = {"domain": "finance", "method": {"name": "fedit", "x": value}}
    assert not too_deep(layer)
    assert "method.x: unknown key" in _problems(layer)
    for _ in range(600):
        value = {"a": value} if isinstance(value, dict) else [value]
    text = _problems({"domain": "finance", "method": {"name": "fedit", "x": value}})
    assert re.search(rf"method\.x\S*: lies more than {DEEPEST} tables or lists deep", text)


def test_an_assignment_of_hundreds_of_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"more than {DEEPEST} parts"):
        parse_assignment(f"method.x{DEEP}=1")


def test_of_very_many_mistakes_the_first_are_told() -> None:
    text = _problems({"domain": "finance", **{f"key{i}": 1 for i in range(5000)}})
    assert "key0: unknown key" in text
    assert "settings: 4900 more are wrong" in text
    assert len(text.splitlines()) == 102
    of_a_method = _problems({"domain": "finance", "method": {"name": "fedit", **{f"k{i}": 1 for i in range(5000)}}})
    assert len(of_a_method.splitlines()) <= 102


class _Bounded(Section):
    low: float = 1.0
    high: float = 2.0
    word: Literal["a", "b"] = "a"

    @model_validator(mode="after")
    def _in_order(self) -> "_Bounded":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def test_what_is_wrong_with_several_settings_together_is_told_of_their_table() -> None:
    def told(**given: Any) -> list[str]:
        return [str(problem) for problem in own_problems("objective", "bounded", _Bounded, given)]

    assert told(low=1.5) == []
    assert told(low=5.0) == ["objective: low is above high"]
    assert told(lov=5.0) == ['objective.lov: unknown key; did you mean "low"?']
    assert told(low="x")[0].startswith("objective.low = 'x': ")
    (long,) = told(word="x" * 10**6)
    assert len(long) < 500
    assert long.endswith("Input should be 'a' or 'b'")


def test_a_long_value_is_not_told_whole() -> None:
    assert len(_problems({"domain": "finance", "train": {"labels": "x" * 10**5}})) < 1_000
