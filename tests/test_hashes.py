"""Hashes of settings stay: a setting that is added later changes none, and a default that is changed is seen here."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.config import Config, Settings, protocol_names
from fedtune.config.load import flatten
from fedtune.config.schema import EvalSettings, Section
from fedtune.domains import DOMAINS
from fedtune.experiment.folder import open_run
from fedtune.io import read_json, write_json
from fedtune.results.entry import Entry
from fedtune.settings import load
from fedtune.types import ResumeError
from tests.board.entries import entry

DEFAULTS = tomllib.loads((Path(__file__).parent / "defaults.toml").read_text("utf-8"))


class Later(Section):
    kind: str = "as before"


class LaterEval(EvalSettings):
    shots: int = 0


class LaterConfig(Config):
    """Settings of a later version: one more section, and one more setting in a section of today's."""

    later: Later = Later()
    eval: EvalSettings = LaterEval()


@pytest.mark.parametrize("protocol", protocol_names())
@pytest.mark.parametrize("domain", DOMAINS)
def test_settings_that_come_later_change_no_hash(protocol: str, domain: str) -> None:
    now = load([{"domain": domain, "protocol": protocol, "method": {"name": "lora_fair", "ridge": 0.5}}]).config
    later = LaterConfig.model_validate(now.semantic())
    assert (later.semantic(), later.hash) == (now.semantic(), now.hash)
    assert later.model_copy(update={"later": Later(kind="other")}).hash != now.hash


@pytest.mark.parametrize("protocol", protocol_names())
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_written_down_makes_all_settings_again(protocol: str, domain: str) -> None:
    own = {"method": {"name": "lora_fair", "ridge": 0.5}, "engine": {"threads": 2}}
    config = load([{"domain": domain, "protocol": protocol, **own}]).config
    again = Config.model_validate(config.semantic())
    assert again.plain() == {**config.plain(), "engine": again.plain()["engine"]}
    assert entry(1, domain=domain, config=config.semantic()).settings == again


def test_no_default_is_another_than_it_was() -> None:
    today = flatten(Config(domain="finance").plain())
    assert {key: today.get(key) for key in flatten(DEFAULTS)} == flatten(DEFAULTS)
    written = {key for key in today if key.partition(".")[0] not in ("domain", "engine")}
    assert written == set(flatten(DEFAULTS)), "write the new setting's default into tests/defaults.toml"


def test_a_run_is_continued_and_refused_by_its_whole_settings(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    made = settings()
    known = {"config": made.config.semantic(), "code": "now"}
    open_run(tmp_path, made, known, (), resume=False, force=False)
    written = read_json(tmp_path / "manifest.json")
    # an earlier version wrote every setting
    written["identity"]["config"] = made.config.model_dump(mode="json", exclude={"engine": True, "data": {"path"}})
    write_json(tmp_path / "manifest.json", written)
    open_run(tmp_path, made, known, (), resume=True, force=False)
    other = {"config": settings(lora__r=16).config.semantic(), "code": "then"}
    with pytest.raises(ResumeError) as refused:
        open_run(tmp_path, made, other, (), resume=True, force=False)
    # 16 is the default, so it is not written down; the refusal says it all the same
    assert "config.lora.r: 4 -> 16" in str(refused.value)
    assert "code: 'now' -> 'then'" in str(refused.value)
    write_json(tmp_path / "manifest.json", {**written, "identity": {"config": [], "code": "now"}})
    with pytest.raises(ResumeError, match="was made by a different run"):
        open_run(tmp_path, made, known, (), resume=True, force=False)


def test_an_entry_of_no_settings_says_so() -> None:
    with pytest.raises(ValueError, match="rank"):
        _ = Entry.model_copy(entry(1), update={"config": {"lora": {"rank": 3}}}).settings
