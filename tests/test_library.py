"""fedtune as a library: five lines run an experiment, and whoever calls, the settings are checked by one loader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedtune
from fedtune.config import Config, Settings
from fedtune.config.load import flatten
from fedtune.experiment.progress import TerminalReporter
from fedtune.types import ConfigError, FedtuneError, RoundRecord

SILENT = fedtune.Reporter()


@pytest.fixture
def chosen(settings: Callable[..., Settings]) -> dict[str, Any]:
    """Keywords of a fast run on the tiny model."""
    made = settings(federation__clients=2, federation__rounds=1, train__max_steps=1, eval__limit=4).config.plain()
    return {key: value for key, value in made.items() if key != "domain"}


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_nothing_and_lists_everything() -> None:
    code = """import sys
before = set(sys.modules)
import fedtune
others = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(others), [name for name in sys.modules if name.startswith("fedtune")])
print(*dir(fedtune))
"""
    loaded, listed = fresh(code).splitlines()
    assert loaded == "['fedtune'] ['fedtune']"
    assert set(fedtune.__all__) <= set(listed.split())


def test_every_name_is_there_and_settings_need_no_torch() -> None:
    code = (
        "import sys, fedtune\n"
        "made = fedtune.load_settings('finance', method='flora', rounds=2)\n"
        "print(len(fedtune.METHODS), len(fedtune.DOMAINS), made.config.federation.rounds, 'torch' in sys.modules)\n"
        "print([type(getattr(fedtune, name)).__name__ for name in fedtune.__all__].count('function'))\n"
    )
    assert fresh(code).split() == [str(len(fedtune.METHODS.own)), "4", "2", "False", "5"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedtune.nothing


def test_keywords_are_the_settings_of_a_file_and_of_the_command_line(tmp_path: Path, data_folder: Path) -> None:
    made = fedtune.load_settings(
        "finance", method="lora_fair", clients=3, train={"max_steps": 2}, data=data_folder, **{"method.ridge": 0.5}
    ).config
    assert (made.method.name, made.method.parameters) == ("lora_fair", {"ridge": 0.5})
    assert (made.federation.clients, made.train.max_steps, made.data.path) == (3, 2, str(data_folder))
    (tmp_path / "run.toml").write_text('domain = "finance"\nseed = 7\n[lora]\nr = 8\n')
    made = fedtune.load_settings(file=tmp_path / "run.toml", seed=8).config
    assert (made.seed, made.lora.r) == (8, 8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"domain": "finanse"}, 'did you mean "finance"'),
        ({"domain": "finance", "method": "fedpox"}, 'did you mean "fedprox"'),
        ({"domain": "finance", "max_steps": 3}, 'did you mean "train.max_steps"'),
        ({"domain": "finance", "server": {"tau": 0.1}}, "has no effect"),
        ({"domain": "finance", "arm": "centralised", "method": "flora"}, "has no effect"),
        ({"domain": "finance", "data": Path("nowhere")}, "no such folder"),
    ],
)
def test_wrong_settings_are_refused_whoever_calls(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    others = {key: value for key, value in wrong.items() if key != "domain"}
    for call in (
        lambda: fedtune.load_settings(**wrong),
        lambda: fedtune.run(wrong["domain"], out=tmp_path / "run", **others),
        lambda: fedtune.sweep(tmp_path / "sweep", {"domain": [wrong["domain"]]}, **others),
        lambda: fedtune.evaluate("packaged/smollm2-135m-instruct", **{**wrong, "out": tmp_path / "eval"}),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    assert not list(tmp_path.iterdir())


def test_settings_made_by_hand_are_checked_and_their_rank_is_not_believed(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    by_hand = Settings(Config(domain="finanse"), settings().protocol, ())
    with pytest.raises(ConfigError, match='did you mean "finance"'):
        fedtune.run(by_hand, out=tmp_path / "run")
    with pytest.raises(TypeError, match="give rounds to load_settings"):
        fedtune.run(settings(), rounds=3)


def test_five_lines_run_evaluate_and_aggregate(
    chosen: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fedtune.run("finance", out=tmp_path / "run", arms=["local-only"], **chosen)
    assert "round 1/1" in capsys.readouterr().out
    assert list(result.scores) == ["federated", "local-only"]
    assert result.folder == tmp_path / "run"
    assert result.unranked == json.loads((tmp_path / "run/result.json").read_text())["unranked"]
    again = fedtune.run("finance", out=tmp_path / "run", resume=True, reporter=SILENT, **chosen)
    assert (again.scores, capsys.readouterr().out) == (result.scores, "")
    adapter = tmp_path / "run" / "adapter"
    scores = fedtune.evaluate(
        adapter, "finance", out=tmp_path / "eval", reporter=SILENT, data=chosen["data"], eval=chosen["eval"]
    )
    assert {f"{s.task}/{s.mode}": s.score for s in scores} == result.scores["federated"]
    made = fedtune.aggregate("fedit", [adapter, adapter], tmp_path / "both", examples=[1, 3])
    assert (made.folders, made.weights) == ((tmp_path / "both",), (0.25, 0.75))
    with pytest.raises(ConfigError, match="fedit does not cut its result"):
        fedtune.aggregate("fedit", [adapter], tmp_path / "cut", rank=2)
    with pytest.raises(FedtuneError, match="not a PEFT adapter folder"):
        fedtune.aggregate("fedit", [tmp_path], tmp_path / "none")


PAGE = Path(__file__).parents[1] / "docs/library.md"


def test_the_page_runs(tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's lines, of the tiny model and its data in place of the packaged ones."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    small = f'"finance", data={str(data_folder)!r}, '
    code = code.replace('"finance", method', f"{small}model={str(tiny_folder)!r}, clients=2, lora={{'r': 4}}, method")
    code = code.replace('"finance", eval={"limit"', small + 'eval={"tasks": ["fpb"], "modes": ["likelihood"], "limit"')
    code = code.replace('eval={"limit": 40}', 'eval={"tasks": ["fpb"], "modes": ["likelihood"]}')
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert list(names["result"].scores) == ["base", "federated", "local-only"]
    assert [s.task for s in names["scores"]] == ["fpb"]


def test_the_page_names_what_there_is() -> None:
    page = PAGE.read_text("utf-8")
    named = set(re.findall(r"^\| `(\w+)|`, `(\w+)", page, re.MULTILINE))
    assert {one or two for one, two in named} >= set(fedtune.__all__) - {
        "Config",
        "FedtuneError",
        "Settings",
        "__version__",
    }


def test_a_sweep_is_every_combination(chosen: dict[str, Any], tmp_path: Path) -> None:
    axes = {"domain": ["finance"], "method": ["fedit", "flora"], "seed": [1, 2]}
    rows = fedtune.sweep(tmp_path / "sweep", axes, reporter=SILENT, **chosen)
    assert [(row["where"]["method"], row["seeds"]) for row in rows] == [("fedit", [1, 2]), ("flora", [1, 2])]


def test_a_run_may_be_started_in_a_thread(chosen: dict[str, Any], tmp_path: Path) -> None:
    ended: list[fedtune.Result] = []
    worker = threading.Thread(
        target=lambda: ended.append(fedtune.run("finance", out=tmp_path / "run", reporter=SILENT, **chosen))
    )
    worker.start()
    worker.join()
    assert ended[0].rounds == 1


def test_a_notebook_gets_lines_and_not_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    watch = TerminalReporter(Console(force_jupyter=True))
    watch.training("federated", 2, 0)
    watch.step(0, 10, 1.0)
    watch.round(RoundRecord(1, "ok", 0.1, (0,), (), (), 1, 1))
    watch.close()
    assert [line.partition(":")[0].strip() for line in shown] == ["federated round 1/2"]


def test_the_keywords_of_a_run_are_every_setting() -> None:
    made = fedtune.load_settings("finance").config
    again = fedtune.load_settings(**{k: v for k, v in made.plain().items() if k not in ("protocol",)})
    assert flatten(again.config.plain()) == flatten(made.plain())
