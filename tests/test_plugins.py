"""Methods and domains of other packages: listed, examined, run, resumed and named, without an edit here."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedtune import objectives, spaces
from fedtune import settings as whole
from fedtune.cli import app
from fedtune.config import Settings
from fedtune.domains import DOMAINS, TASKS, Item
from fedtune.evaluation import scorers
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.run import evaluate
from fedtune.experiment import arms
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.io import digest, read_json, read_lines
from fedtune.methods import METHODS, wrappers
from fedtune.registry import Registry
from fedtune.results.manifest import code_sha256, versions
from fedtune.types import CancelledError, ConfigError, ResumeError, RoundRecord
from tests.evaluation.test_scorers import the_page
from tests.outside import FEDEMA, install

NUMBERS = itertools.count()
Offer = Callable[..., str]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Install a package of somebody else's, under a name that no other test has used; return the name."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def build(source: str, **points: dict[str, str]) -> str:
        module = f"fedtune_outside_{next(NUMBERS):03}"
        install(tmp_path / "site", module, source, points)
        # what is on the path is read once for each path
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / module)])
        return module

    yield build
    for module in [name for name in sys.modules if name.startswith("fedtune_outside_")]:
        del sys.modules[module]


def lines(*words: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout))


class Stop(Reporter):
    def round(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise CancelledError(15)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_method_of_another_package_is_listed_conforms_runs_resumes_and_is_named(
    offer: Offer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    package = offer(FEDEMA, methods={"fedema": "FedEMA"}).replace("_", "-")
    row = next(r for r in lines("ls", "methods") if r["method"] == "fedema")
    assert (row["package"], row["settings"]) == (f"{package} 0.3", "decay")
    examined = {f["name"]: f for f in lines("conformance", "--method", "fedema")}
    assert not [f for f in examined.values() if f["whose"].startswith("any") and not f["holds"]]
    # it is not meant to be one, and says so
    assert not examined["identical clients are a fixed point"]["holds"]
    made = settings(method={"name": "fedema", "decay": 0.25})
    assert made.unranked[-1] == f"the method fedema comes from the package {package} 0.3"
    folder, result = run(made, tmp_path / "whole")
    assert result.arms[0].scores[0].score is not None
    assert made.unranked[-1] in result.unranked
    manifest = read_json(folder / "manifest.json")
    assert manifest["versions"][package] == "0.3"
    assert manifest["identity"]["outside"]["method fedema"]["package"] == package
    with pytest.raises(CancelledError):
        run(made, tmp_path / "cut", reporter=Stop())
    again, _ = run(made, tmp_path / "cut", resume=True)
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(folder).items())
    plain, _ = run(settings(), tmp_path / "plain")
    assert any(not torch.equal(t, weights(plain)[name]) for name, t in weights(folder).items())


def test_a_run_goes_on_with_the_very_package_that_began_it(
    offer: Offer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    first = offer(FEDEMA, methods={"fedema": "FedEMA"})
    made = settings(method={"name": "fedema"})
    with pytest.raises(CancelledError):
        run(made, tmp_path / "cut", reporter=Stop())
    (tmp_path / "site" / first / "__init__.py").write_text("")
    (tmp_path / "site" / f"{first}-0.3.dist-info" / "entry_points.txt").write_text("")
    second = offer(FEDEMA.replace("0.5", "0.6"), methods={"fedema": "FedEMA"})
    with pytest.raises(
        ResumeError, match=rf"outside\.method fedema\.package: '{first}' -> '{second}'".replace("_", "-")
    ):
        run(made, tmp_path / "cut", resume=True)


DOMAIN = """
    from dataclasses import replace
    from fedtune.domains import DOMAINS
    finance = DOMAINS.own["finance"]
    shop = replace(finance, name="shop", tasks=tuple(replace(t, name=f"shop-{t.name}") for t in finance.tasks))
    clash = replace(finance, name="clash", tasks=tuple(replace(t) for t in finance.tasks))
"""


def test_a_domain_of_another_package_brings_its_tasks(
    offer: Offer, settings: Callable[..., Settings], data_folder: Path, tmp_path: Path
) -> None:
    package = offer(DOMAIN, domains={"shop": "shop"}).replace("_", "-")
    assert "fpb" in TASKS
    assert not [m for m in sys.modules if m.startswith("fedtune_outside_")]
    assert {r["domain"]: r["package"] for r in lines("ls", "domains")}["shop"] == f"{package} 0.3"
    assert {r["task"]: r["package"] for r in lines("ls", "tasks")}["shop-fpb"] == f"{package} 0.3"
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "train").mkdir()
    (tmp_path / "data" / "train" / "shop_toy.jsonl").symlink_to(data_folder / "train" / "finance_toy.jsonl")
    (tmp_path / "data" / "eval" / "shop").symlink_to(data_folder / "eval" / "finance")
    made = settings(domain="shop", eval__tasks=["shop-fpb"], data__path=str(tmp_path / "data"))
    assert f"the task shop-fpb comes from the package {package} 0.3" in made.unranked
    _, result = run(made, tmp_path / "run")
    assert (result.domain, result.arms[0].scores[0].task) == ("shop", "shop-fpb")
    # a task of its own in a domain of ours
    assert settings(eval__tasks=["shop-fpb"]).unranked[-1] == made.unranked[-1]
    with pytest.raises(ConfigError, match='did you mean "shop"'):
        settings(domain="shopp")


SUMS = """
from dataclasses import replace
from fedtune.domains import DOMAINS
words = WORDS
school = replace(DOMAINS.own["finance"], name="school", tasks=(words,), packaged_tasks=())
half = {"sometimes": NUMBERS["likelihood"]}
"""


def test_a_kind_of_task_of_another_package_scores_its_tasks(
    offer: Offer, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"domains": {"school": "school"}, "kinds": {"number": "NUMBERS", "half": "half", "none": "words"}}
    package = offer(the_page() + SUMS, **points).replace("_", "-")
    made = settings(domain="school", eval__tasks=["words"], eval__modes=["likelihood"], eval__max_new_tokens=9)
    assert f"the kind number comes from the package {package} 0.3" in made.unranked
    listed = {row["kind"]: (row["package"], row["tasks"]) for row in lines("ls", "kinds")}
    assert listed["number"] == (f"{package} 0.3", "words")
    assert (listed["solution"], listed.keys() & {"half", "none"}) == (("fedtune", "algorithms-solutions"), set())
    (scorer,) = scorers.planned(TASKS["words"], made.config.eval)
    assert (scorer.mode, scorer.metric.name) == ("greedy", "accuracy")
    assert "'sometimes' is no word of eval.modes" in scorers.KINDS.fault("half")
    assert "is no mapping of scorers" in scorers.KINDS.fault("none")
    with pytest.raises(ConfigError, match="words cannot be scored in the mode official"):
        settings(domain="school", eval__tasks=["words"], eval__modes=["official"])
    # samples of another version of the package are not taken up
    monkeypatch.setattr("fedtune.evaluation.generate.complete", lambda *asked: iter([[["It is 4."]]]))
    items = TaskItems(TASKS["words"], (Item("2 and 2?", "2 and 2?", ("4",), 0),), (0,), "h")
    assert evaluate(None, None, items, "greedy", made.config, tmp_path / "log", "me").score == 1
    header, origin = read_lines(tmp_path / "log")[0], scorers.KINDS.origin("number")
    assert origin is not None
    assert header["code"] == digest([code_sha256(), versions(), origin.sha256])


BROKEN = {
    "raise ImportError('no module named x')": "ImportError: no module named x",
    "raise SystemExit('ended')": "SystemExit: ended",
    "class Ended(BaseException): pass\nraise Ended('at once')": "Ended: at once",
    "": "AttributeError",
    "Broken = 3": "is no subclass of fedtune.methods.Method",
    "from fedtune.methods import Method\nclass Broken(Method): pass": "Broken has no name",
    "from fedtune.methods import METHODS\nclass Broken(METHODS['fedit']):\n    Parameters = dict": "no subclass of Method.Par",
    "from fedtune.methods import METHODS\nBroken = METHODS['fedit']": "FedIT.name is 'fedit'",
}


@pytest.mark.parametrize(("source", "why"), BROKEN.items())
def test_a_broken_package_is_a_warning_with_its_name(
    offer: Offer, source: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    package = offer(source, methods={"broken": "Broken"}).replace("_", "-")
    with caplog.at_level(logging.WARNING, "fedtune"):
        listed = [row["method"] for row in lines("ls", "methods")]
    assert listed == list(METHODS.own)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"the method 'broken' of {package} 0.3 cannot be used: ")
    assert why in said[0]
    # asked for by name, the reason is in the error
    with pytest.raises(ConfigError, match=f"unknown method; the method 'broken' of {package} 0.3 cannot be used"):
        whole.load([{"domain": "finance", "method": {"name": "broken"}}])
    assert METHODS.get("broken") is None


def test_names_that_are_taken_or_no_names(offer: Offer, caplog: pytest.LogCaptureFixture) -> None:
    first = offer(FEDEMA, methods={"fedema": "FedEMA", "fedit": "FedEMA", "Fed/EMA": "FedEMA"}).replace("_", "-")
    second = offer(FEDEMA, methods={"fedema": "FedEMA"}).replace("_", "-")
    assert METHODS["fedit"].__module__ == "fedtune.methods.fedit"
    with caplog.at_level(logging.WARNING, "fedtune"):
        assert list(METHODS) == list(METHODS.own)
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert f"the method 'fedit' of {first} 0.3 cannot be used: fedtune has one of this name" in said
    assert f"the method 'fedema' of {first} 0.3 and {second} 0.3 cannot be used: more than one" in said
    assert "the method 'Fed/EMA'" in said
    with pytest.raises(ConfigError, match="more than one package offers it"):
        whole.load([{"domain": "finance", "method": {"name": "fedema"}}])


def test_a_task_of_ours_is_not_replaced(offer: Offer) -> None:
    offer(DOMAIN, domains={"clash": "clash"})
    assert "fedtune has a task" in DOMAINS.fault("clash")
    assert list(DOMAINS) == list(DOMAINS.own)
    assert TASKS["fpb"] in DOMAINS["finance"].tasks


def test_nothing_of_another_package_is_imported_unasked(offer: Offer) -> None:
    package = offer(FEDEMA, methods={"fedema": "FedEMA"})
    whole.load([{"domain": "finance", "method": {"name": "flora"}}])
    assert "fedit" in METHODS
    assert METHODS.origin("fedit") is None
    assert METHODS.origin("nothing") is None
    assert package not in sys.modules
    assert "fedema" in METHODS
    assert package in sys.modules


PAGE = Path(__file__).parents[1] / "docs/add-a-wrapper.md"


def test_a_wrapper_of_another_package_goes_around_a_method_by_its_table(
    offer: Offer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    package = offer(code, wrappers={"shrinks": "Shrinks"}).replace("_", "-")
    assert {r["wrapper"]: r["package"] for r in lines("ls", "wrappers")}["shrinks"] == f"{package} 0.3"
    made = settings(wrappers__shrinks__share=0.5, federation__rounds=2)
    assert made.unranked[-1] == f"the wrapper shrinks comes from the package {package} 0.3"
    asked = wrappers.asked(settings(wrappers__shrinks__share=0.5, drift__proximal_mu=0.1).config, METHODS["fedit"])
    assert [w.name for w in asked] == ["shrinks", "fedprox"]
    folder, _ = run(made, tmp_path / "around")
    plain, _ = run(settings(federation__rounds=2), tmp_path / "plain")
    assert any(not torch.equal(t, weights(plain)[name]) for name, t in weights(folder).items())
    assert arms.derive(made.config, "local-only").wrappers == {}
    for wrong, said in (
        ({"shrinks": {"share": 2}}, "wrappers.shrinks.share = 2"),
        ({"shrinks": {"share": 0.5, "more": 1}}, "wrappers.shrinks.more: unknown key"),
        ({"shrink": {}}, 'unknown wrapper; did you mean "shrinks"'),
        ({"fedprox": {}}, "is no wrapper of another package"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            settings(wrappers=wrong)
    with pytest.raises(ConfigError, match="has no effect: with arm"):
        settings(arm="centralised", wrappers__shrinks__share=0.5)


def test_a_wrapper_with_the_name_of_a_method_is_refused(offer: Offer) -> None:
    offer(
        "from fedtune.methods.wrappers import Wrapper\nclass W(Wrapper):\n    name = 'fedit'", wrappers={"fedit": "W"}
    )
    with pytest.raises(ConfigError, match="has the name of a method"):
        whole.load([{"domain": "finance", "wrappers": {"fedit": {}}}])


def test_a_space_of_another_package_is_chosen_by_its_name(offer: Offer, settings: Callable[..., Settings]) -> None:
    package = offer(
        "from fedtune.spaces.ia3 import IA3\nclass Mine(IA3):\n    name = 'mine'", spaces={"mine": "Mine"}
    ).replace("_", "-")
    assert {r["space"]: r["package"] for r in lines("ls", "spaces")}["mine"] == f"{package} 0.3"
    tree = {"domain": "finance", "peft": {"kind": "mine"}}
    assert whole.load([tree]).unranked[-1] == f"the space mine comes from the package {package} 0.3"
    with pytest.raises(ConfigError, match='unknown space; did you mean "mine"'):
        whole.load([{**tree, "peft": {"kind": "mines"}}])


def test_an_objective_of_another_package_is_trained_by(
    offer: Offer, settings: Callable[..., Settings], data_folder: Path, tmp_path: Path
) -> None:
    page = (PAGE.parent / "add-an-objective.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    package = offer(code, objectives={"simpo": "SimPO"}).replace("_", "-")
    assert {r["objective"]: r["package"] for r in lines("ls", "objectives")}["simpo"] == f"{package} 0.3"
    rows = [json.loads(line) for line in (data_folder / "train/finance_toy.jsonl").read_text().splitlines()]
    (tmp_path / "data/train").mkdir(parents=True)
    pairs = "".join(json.dumps({**row, "rejected": "unknown"}) + "\n" for row in rows)
    (tmp_path / "data/train/finance_pairs.jsonl").write_text(pairs)
    (tmp_path / "data/eval").symlink_to(data_folder / "eval")
    made = settings(objective__name="simpo", data__path=str(tmp_path / "data"), federation__rounds=1, eval__limit=4)
    assert f"the objective simpo comes from the package {package} 0.3" in made.unranked
    _, result = run(made, tmp_path / "run")
    assert (result.rounds, result.lost_clients) == (1, 0)


@pytest.mark.parametrize(
    "registry", [METHODS, wrappers.WRAPPERS, spaces.SPACES, objectives.OBJECTIVES], ids=lambda registry: registry.kind
)
def test_a_class_whose_settings_are_no_section_is_refused(offer: Offer, registry: Registry[Any]) -> None:
    own = next(iter(registry.own.values()))
    kind = own if isinstance(own, type) else type(own)
    source = f"from {kind.__module__} import {kind.__name__} as Own\nclass Broken(Own):\n    name = 'broken'\n"
    offer(source + "    Parameters = dict", **{f"{registry.kind}s": {"broken": "Broken"}})
    assert "Broken.Parameters is no subclass of " in registry.fault("broken")
    offer(source, **{f"{registry.kind}s": {"sound": "Broken"}})
    assert "Broken.name is 'broken'" in registry.fault("sound")


STAMPED = """
from dataclasses import replace
import torch
from fedtune.methods.wrappers import Wrapper

def split(tensors):
    own = {n: t for n, t in tensors.items() if n.startswith("stamp/")}
    return {n: t for n, t in tensors.items() if n not in own}, own

class Stamp(Wrapper):
    '''Sends a tensor down, and what a client makes of it up.'''
    name = "stamp"
    one_by_one = True
    def view(self, state, client):
        return {**self.inner.view(state, client), "stamp/x": torch.ones(2)}
    def begin(self, client, download):
        sent, own = split(download)
        return {**self.inner.begin(client, sent), **own}
    def fit(self, client, start):
        model, own = split(start)
        fitted = yield from self.inner.fit(client, model)
        return replace(fitted, payload={**fitted.payload, "stamp/x": 2 * own["stamp/x"]})
    def untrained(self, start):
        return self.inner.untrained(split(start)[0])
    def upload(self, state, client, round_, steps=0):
        inner = self.inner.upload(state, client, round_, steps)
        return replace(
            inner,
            tensors={**inner.tensors, "stamp/x": torch.zeros(2)},
            whole=lambda sent: inner.whole(split(sent)[0]),
            problem=lambda sent: inner.problem(split(sent)[0]),
        )
    def server_step(self, updates, state, context):
        assert all(torch.equal(u.tensors["stamp/x"], torch.full((2,), 2.0)) for u in updates)
        return self.inner.server_step([replace(u, tensors=split(u.tensors)[0]) for u in updates], state, context)
"""


@pytest.mark.parametrize("method", ["fedit", "fedsa_lora", "feddpa", "fedalt"])
def test_a_wrapper_adds_to_what_travels_around_methods_whose_clients_have_own_models(
    offer: Offer, settings: Callable[..., Settings], tmp_path: Path, method: str
) -> None:
    offer(STAMPED, wrappers={"stamp": "Stamp"})
    _, result = run(settings(method__name=method, wrappers__stamp={}, federation__rounds=2), tmp_path / "run")
    assert (result.rounds, result.lost_clients, result.skipped_rounds) == (2, 0, 0)
