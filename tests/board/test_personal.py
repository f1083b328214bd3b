"""A run whose clients have models of their own: every client's samples count, and every number of their mean."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.board import samples
from fedtune.board.entries import from_run
from fedtune.board.sets import client_subdirs
from fedtune.board.submit import pack
from fedtune.board.validate import check
from fedtune.config import Settings
from fedtune.config.schema import EvalSettings
from fedtune.domains import TASKS
from fedtune.evaluation.metrics import mean_score
from fedtune.evaluation.scorers import find
from fedtune.experiment.run import run
from fedtune.io import file_sha256
from fedtune.results.schema import Score
from fedtune.types import DataError

pytestmark = pytest.mark.xdist_group("submission")


@pytest.fixture(scope="module")
def personal(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run of FedALT with a curve and a local-only arm beside it."""
    root = tmp_path_factory.mktemp("personal")
    own = settings(
        seed=1,
        method={"name": "fedalt"},
        federation={"clients": 2, "rounds": 2},
        train={"max_steps": 1},
        eval={"limit": 6, "every": 1, "modes": ["likelihood", "official"]},
    )
    pack([run(own, root / "run", extra_arms=["local-only"])[0]], root / "packed", "a team")
    return root / "packed/seed-1"


@pytest.fixture
def copy(personal: Path, tmp_path: Path) -> Path:
    shutil.copytree(personal, tmp_path / "s/seed-1")
    return tmp_path / "s/seed-1"


def reasons(packed: Path) -> str:
    """Return every problem after the entry was made again from the files, as a careful cheat would."""
    files = {str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()} - {"entry.json"}
    entry = from_run(packed).model_copy(update={"files": {n: file_sha256(packed / n) for n in files}})
    (packed / "entry.json").write_text(json.dumps(entry.model_dump(mode="json")))
    return "\n".join(str(p) for _, _, problems in check(packed.parent) for p in problems)


def _result(packed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((packed / "result.json").read_text())
    change(document)
    (packed / "result.json").write_text(json.dumps(document))


def federated(document: dict[str, Any]) -> dict[str, Any]:
    return next(arm for arm in document["arms"] if arm["name"] == "federated")


def test_an_honest_run_is_good(copy: Path) -> None:
    assert reasons(copy) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metric", "nats_per_token"),
        ("strict", 1.0),
        ("valid_rate", 0.987),
        ("macro_f1", 0.99),
        ("interval", [0.98, 0.99]),
        ("trivial", {"majority": 0.01}),
        ("errors", 3),
        ("n", 5),
    ],
)
def test_every_number_of_a_mean_is_made_again(copy: Path, name: str, value: Any) -> None:
    _result(copy, lambda r: federated(r)["scores"][1].update({name: value}))
    assert f"{name} is " in (said := reasons(copy)) or f"{name} = " in said


def test_a_client_cannot_be_left_out(copy: Path) -> None:
    def without(document: dict[str, Any]) -> None:
        arm = federated(document)
        for key, values in arm["per_client"].items():
            arm["per_client"][key] = values[:1]

    shutil.rmtree(copy / "evals/federated/client-0001")
    _result(copy, without)
    assert "has no samples of the clients [1]" in reasons(copy)


def test_a_client_s_score_is_its_own_samples(copy: Path) -> None:
    _result(copy, lambda r: federated(r)["per_client"].update({"fpb/official": [0.5, 0.987]}))
    assert "federated/client-0001: score is 0.987, the samples give" in reasons(copy)


def test_samples_of_no_client_are_refused_and_give_no_answers(copy: Path) -> None:
    shutil.copy(copy / "evals/federated/client-0000/fpb.official.jsonl.gz", copy / "evals/federated")
    shutil.copytree(copy / "evals/federated/client-0000", copy / "evals/federated/client-0007")
    said = reasons(copy)
    assert "evals/federated/fpb.official.jsonl.gz: belongs to no score" in said
    assert "evals/federated/client-0007: is of no client that has rows" in said
    assert from_run(copy).answers == {}


def _counted(packed: Path) -> None:
    """Make the arm's means and clients from the samples that are there, as a careful cheat would."""
    subdirs = client_subdirs(packed, "federated")

    def remake(document: dict[str, Any]) -> None:
        arm = federated(document)
        for place, told in enumerate(arm["scores"]):
            score = Score.model_validate(told)
            scorer = find(TASKS[score.task], score.mode)
            assert scorer is not None
            made = [samples._one(packed, subdir, score, scorer, EvalSettings())[0] for subdir in subdirs]
            logs = [samples.log_path(packed, subdir, score.task, score.mode) for subdir in subdirs]
            arm["scores"][place] = mean_score([m for m in made if m], logs).model_dump(mode="json")
            arm["per_client"][f"{score.task}/{score.mode}"] = [m.score for m in made if m]

    _result(packed, remake)


@pytest.mark.parametrize("other", ["client-00001", "client-1", "client-000000001", "client-٠٠٠١", "client-0001 "])
def test_a_client_is_spelled_and_counted_once(copy: Path, other: str) -> None:
    shutil.copytree(copy / "evals/federated/client-0001", copy / "evals/federated" / other)
    _counted(copy)
    assert f"evals/federated/{other}/fpb.official.jsonl.gz: belongs to no score, client or round" in reasons(copy)
    assert [len(v) for v in from_run(copy).main.per_client.values()] == [2, 2]


def test_a_client_that_answered_has_a_model(copy: Path) -> None:
    shutil.rmtree(copy / "evals/federated/client-0001")
    _counted(copy)
    _result(copy, lambda r: federated(r).update(failed={"1": "CUDA out of memory"}))
    assert "federated: failed: only where each client trains alone" in reasons(copy)


def test_a_client_that_was_asked_has_rows(copy: Path) -> None:
    shutil.rmtree(copy / "evals/federated/client-0001")
    _counted(copy)
    _result(copy, lambda r: r["data"].update(clients=[r["data"]["clients"][0], 0]))
    assert "round 1: the clients [1] were asked, and have no rows" in reasons(copy)
    _result(copy, lambda r: r["data"].update(clients=r["data"]["clients"][:1]))
    assert "are of 1 clients, the settings say 2" in reasons(copy)


def test_one_model_is_not_passed_off_as_many(copy: Path) -> None:
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace('"fedalt"', '"fedit"'))
    _result(copy, lambda r: (r.update(method="fedit"), r["config"]["method"].update(name="fedit")))
    assert "federated: per_client: each client has no model of its own in this arm" in reasons(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 0.987}, "score is 0.987, the samples give"),
        ({"round": 2}, "the settings do not evaluate it"),
        ({"mode": "greedy"}, "is of no mode that this task is scored in"),
    ],
)
def test_a_point_of_the_curve_is_what_its_samples_give(copy: Path, change: dict[str, Any], said: str) -> None:
    first, *rest = (copy / "curve.jsonl").read_text().splitlines()
    lines = [json.dumps({**json.loads(first), **change}), *rest]
    (copy / "curve.jsonl").write_text("\n".join(lines) + "\n")
    assert said in reasons(copy)


@pytest.mark.parametrize("arm", ["local-only", "centralised"])
def test_a_baseline_is_not_ranked_as_the_method(settings: Callable[..., Settings], arm: str) -> None:
    assert any(arm in reason for reason in settings(arm=arm).unranked)


def test_a_run_without_joint_rounds_is_not_packed(copy: Path, tmp_path: Path) -> None:
    _result(copy, lambda r: r["config"].update(arm="local-only"))
    with pytest.raises(DataError, match="each client trained alone"):
        pack([copy], tmp_path / "out", "a team")
    assert not (tmp_path / "out").exists()
