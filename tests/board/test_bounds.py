"""What a stranger's files may make a check do grows with their length, and no faster; what they hold in memory too."""

import gc
import gzip
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.board import cohorts, log_size, logs, sets, validate
from fedtune.board.archive import ENTRY, MAX_ENTRY
from fedtune.board.store import read_entry, write_entry
from fedtune.config.schema import FederationSettings
from fedtune.io import digest
from fedtune.results.entry import Answers, Entry, Point
from fedtune.results.schema import Arm
from tests.board.entries import entry, score

TASKED = ("fpb", "tfns")


class Rows(list[int]):
    """Rows of the clients that count how often all of them are gone through."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows)
        self.walks = 0

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()


def asked(clients: int, cohort: list[Any], rows: list[int]) -> list[str]:
    line = {"cohort": cohort, "clients": [], "bytes_up": 0, "bytes_down": 0, "status": "skipped"}
    return list(cohorts._one(line, FederationSettings(clients=clients), rows))


def test_the_clients_rows_are_not_gone_through_for_each_that_was_asked() -> None:
    rows = Rows([1] * 1_000)
    assert asked(1_000, list(range(1_000)), rows) == []
    assert rows.walks == 0


@pytest.mark.parametrize("cohort", [[-1], [3], [0, 0], [True], ["0"], [0.0], [10**30]], ids=str)
def test_a_client_that_there_cannot_be_was_not_asked(cohort: list[Any]) -> None:
    assert asked(3, cohort, [1, 1, 1]) == ["a client is there twice, or was not asked"]


def test_clients_without_rows_were_not_asked() -> None:
    assert asked(4, [0, 1, 2, 3], [1, 0, 1]) == ["the clients [1, 3] were asked, and have no rows"]


@pytest.mark.parametrize(
    ("rows", "masked", "fewest"), [([], 0, 0), ([3], 9, 1), ([0, 2, 1, 4], 0, 3), ([1, 2, 4], 3, 1), ([1, 2, 4], 2, 2)]
)
def test_the_smallest_clients_may_have_no_label_left(rows: list[int], masked: int, fewest: int) -> None:
    assert cohorts._fewest(rows, masked) == fewest


def test_the_logs_in_the_end_are_read_once_for_all_points_of_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = entry(rounds=9, config={"eval": {"every": 1, "max_error_rate": 0.01, "samples": 1}})
    points = [{"round": r, "task": t, "mode": "likelihood", "n": 1, "score": 1.0} for r in range(1, 9) for t in TASKED]
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    for point in points:
        log = logs.log_path(tmp_path, f"round-{point['round']:06d}", str(point["task"]), "likelihood")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    read: Counter[tuple[str, str]] = Counter()

    def samples(_: Path, subdir: str, task: str, mode: str) -> list[dict[str, Any]]:
        read[subdir, task] += 1
        return [{"i": 0, "gold": "A" if subdir != "round-000004" or task == "fpb" else "B"}]

    monkeypatch.setattr(logs, "samples", samples)
    monkeypatch.setattr(logs, "against", lambda *_, **__: ())
    said = [str(problem) for problem in logs.curve_problems(tmp_path, made)]
    assert said == [
        "curve.jsonl: round 4, tfns (likelihood): its samples are not of the same items as those in the end"
    ]
    assert set(read.values()) == {1}
    assert len(read) == 18


def submission(root: Path, count: int) -> Path:
    """Write a folder of packed runs that have nothing but an entry."""
    for seed in range(count):
        run = root / f"seed-{seed}"
        run.mkdir(parents=True)
        made = entry(seed=seed, files={"result.json": "0" * 64})
        (run / ENTRY).write_text(json.dumps(made.model_dump(mode="json")))
    return root


@pytest.mark.parametrize("name", [ENTRY, "result.json"])
def test_an_entry_of_more_than_two_mebibytes_is_never_parsed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submission(tmp_path / "s", 1) / "seed-0"
    (run / name).write_text(json.dumps({"data": [{"": 0}] * (MAX_ENTRY // 8)}))
    monkeypatch.setattr(validate, "read_entry", lambda *_: pytest.fail("was parsed"))
    [(_, found, problems)] = validate.check(tmp_path / "s")
    assert found is None
    assert f"{name}: " in str(problems[0])
    assert "at most 2,097,152 are taken" in str(problems[0])


def test_entries_that_are_in_the_store_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = submission(tmp_path / "s", 6), tmp_path / "store"
    assert not validate.added(path, store)
    for run in sorted(path.iterdir()):
        write_entry(store, read_entry(run / ENTRY))
    held: list[weakref.ref[Entry]] = []
    most = 0

    def counted(place: Path, limit: int) -> Entry:
        nonlocal most
        gc.collect()
        made = read_entry(place, limit)
        held.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in held))
        return made

    monkeypatch.setattr(validate, "read_entry", counted)
    assert validate.added(path, store)
    assert len(held) == 6
    assert most <= 2


def test_an_honest_entry_of_a_thousand_clients_has_room_to_spare(tmp_path: Path) -> None:
    tasks = [(f"task-{i}", mode) for i in range(9) for mode in ("likelihood", "official")]
    rates = [1 / 3 + i / 7919 for i in range(1_000)]
    arms = [
        Arm(
            name=name,
            scores=[score(120, task=task, mode=mode) for task, mode in tasks],
            per_client={f"{task}/{mode}": rates for task, mode in tasks},
            failed=dict.fromkeys(range(1000), "was never asked in any round"),
        )
        for name in ("federated", "local-only")
    ]
    made = entry(
        arms=arms,
        answers={f"base/{t}/{m}": Answers.pack([True] * 15_000, "i" * 64) for t, m in tasks},
        curve=[Point(round=r, task=t, mode=m, score=1 / 3) for r in range(100) for t, m in tasks],
        losses=[1 / 3] * 1_000,
        data={"rows": 10**6, "clients": [1_000] * 1_000},
        files={f"evals/federated/client-{i:04d}/task.likelihood.jsonl.gz": "f" * 64 for i in range(1_950)},
    )
    path = write_entry(tmp_path, made)
    assert path.stat().st_size < MAX_ENTRY


@pytest.mark.parametrize("form", ["folder", "nested", "zip", "nested zip", "run"])
def test_what_is_in_the_store_is_known_in_whatever_form_it_comes(tmp_path: Path, form: str) -> None:
    path, store = submission(tmp_path / "a/s", 1 if form == "run" else 2), tmp_path / "store"
    for run in path.iterdir():
        write_entry(store, read_entry(run / ENTRY).model_copy(update={"state": "re-scored"}))
    if form == "run":
        path = path / "seed-0"
    elif "nested" in form:
        path = tmp_path / "a"
    if "zip" in form:
        path = Path(shutil.make_archive(str(tmp_path / "z"), "zip", path))
    assert validate.added(path, store)
    shutil.rmtree(store)
    assert not validate.added(path, store)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"i":0,"scores":[[]]}', ""),
        (b'{"i":0,"outcomes":[{"kind":"wrong","x":[]}]}', "line 2 has lists or objects deeper inside"),
        (b'{"i":0,"scores":[[[[]]]]}', "line 2 has lists or objects deeper inside"),
        (b'{"i":0,"scores":[' + b"[]," * 40 + b"0]}", "has more than 40 values"),
        (b'{"output":"' + b"x" * 300 + b'"}', "line 2 has more than 300 bytes"),
        (b"[[],[]]", "line 2 is not an object"),
        (b"[", "line 2 is not JSON"),
    ],
)
def test_a_log_holds_no_more_than_a_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, why: str
) -> None:
    monkeypatch.setattr(log_size, "MAX_VALUES", 40)
    monkeypatch.setattr(log_size, "MAX_LINE", 300)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/fpb.likelihood.jsonl.gz").write_bytes(gzip.compress(b'{"header":1}\n' + line + b"\n"))
    said = [str(problem) for problem in log_size.logs_fit(tmp_path)]
    assert (why in said[0]) if why else not said


@pytest.mark.parametrize("mode", ["likelihood", "official"])
def test_one_client_s_log_is_held_at_a_time_and_the_hash_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    subdirs = [f"federated/client-{n:04d}" for n in range(3)]
    monkeypatch.setattr(sets, "client_subdirs", lambda *_: subdirs)
    arm = Arm(name="federated", scores=[score(1, task="fpb", mode=mode)], per_client={f"fpb/{mode}": [1.0] * 3})
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Log(list[Any]):
        pass

    def samples(_: Path, subdir: str, *__: str) -> list[dict[str, Any]]:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        log = Log([{"i": 0, "gold": "A", "output": f"\u00e9 {subdir}"}])
        alive.append(weakref.ref(log))
        return log

    monkeypatch.setattr(sets, "samples", samples)
    rows = [[[{"i": 0, "gold": "A", "output": f"\u00e9 {r}"}.get(k) for k in sets.ANSWERED]] for r in subdirs]
    wanted = digest(rows if mode == "likelihood" else [rows, [0.5, None]])
    assert sets.fingerprints(tmp_path, arm, [0.5, None]) == {f"fpb/{mode}": wanted}
    assert most == 0
