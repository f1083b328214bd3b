"""What is held against a federation: nothing of the federation's troubles is in it, and nothing is hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.tables import doubts
from fedtune.config import Settings
from fedtune.experiment import arms
from fedtune.experiment.arms import derive
from fedtune.experiment.run import run
from fedtune.federation.checkpoint import rounds_of, together
from fedtune.federation.faults import planned
from fedtune.io import read_json
from fedtune.types import ClientStats, Rejection, RoundRecord, RunFailedError

TROUBLES: dict[str, Any] = {
    "federation": {
        "clients": 4,
        "rounds": 5,
        "fraction": 0.5,
        "min_clients": 2,
        "deadline": 0.001,
        "faults": {"dropout": 0.5, "straggler": 0.25, "error": 0.25},
    },
    "attack": {"kind": "label-flip", "clients": [1]},
    "robust": {"rule": "multi-krum", "malicious": 0},
    "server": {"optimizer": "fedadam"},
    "method": {"name": "flexlora"},
}


@pytest.mark.parametrize("arm", ["local-only", "centralised"])
def test_baselines_meet_none_of_the_federations_troubles(settings: Callable[..., Settings], arm: str) -> None:
    loaded = settings(**{k: v for k, v in TROUBLES.items() if k not in ("server", "attack", "robust", "method")}).config
    config = loaded.model_copy(
        update={
            "attack": loaded.attack.model_copy(update=TROUBLES["attack"]),
            "robust": loaded.robust.model_copy(update=TROUBLES["robust"]),
            "server": loaded.server.model_copy(update=TROUBLES["server"]),
        }
    )
    plain = derive(config, arm)
    assert not any(planned(plain.federation.faults, plain.seed, r, c) for r in range(1, 6) for c in range(4))
    assert plain.federation.deadline > 1e8
    assert plain.federation.min_clients == 1
    assert (plain.attack.kind, plain.robust.rule, plain.server.optimizer) == ("none", "none", "none")
    federated = derive(config, "federated")
    assert federated.federation == config.federation
    assert federated.attack == config.attack
    if arm == "local-only":
        assert plain.federation.fraction == config.federation.fraction
        assert plain.federation.clients == 4


def test_arms_make_the_same_steps_though_the_federation_loses_clients(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Matched by steps: what faults took from the federation is not taken from the baselines."""
    faults = {"dropout": 0.4, "error": 0.2}
    federation = {"clients": 2, "rounds": 3, "faults": faults, "max_skipped_rounds": 9}
    made = settings(federation=federation, train={"max_steps": 1}, eval={"limit": 2, "modes": ["likelihood"]})
    _, result = run(made, tmp_path / "run", extra_arms=["centralised", "local-only"])
    steps = {a.name: a.steps for a in result.arms}
    assert result.lost_clients > 0
    assert steps["federated"] == 6 - result.lost_clients
    assert steps["centralised"] == steps["local-only"] == 6


def test_a_client_alone_that_fails_is_told_and_in_no_mean(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = arms.train

    def train(arm: Any, only: int | None = None) -> Any:
        if only == 1:
            raise RunFailedError("3 rounds in a row had too few good updates; the last: client 1: error (always)")
        return plain(arm, only)

    monkeypatch.setattr(arms, "train", train)
    few = {"clients": 3, "rounds": 2}
    made = settings(
        federation=few, train={"max_steps": 1}, eval={"limit": 2, "modes": ["likelihood"]}, arm="local-only"
    )
    path, result = run(made, tmp_path / "run")
    arm = result.arms[-1]
    assert list(arm.failed) == [1]
    assert "client 1: error (always)" in arm.failed[1]
    assert all(len(each) == 2 for each in arm.per_client.values())
    assert not (path / "arms/local-only/client-0001/adapter").exists()
    assert any("no model and no score for 1 client (1)" in line for line in doubts(result))
    document = read_json(path / "result.json")
    assert document["arms"][-1]["failed"] == {"1": arm.failed[1]}
    # bytes, rounds and steps are those of all clients, not of the last
    each = [rounds_of(path / f"arms/local-only/client-{c:04d}") for c in (0, 2)]
    assert result.rounds == 2
    assert result.bytes_up == sum(r.bytes_up for rounds in each for r in rounds)
    assert arm.steps == 4

    monkeypatch.setattr(arms, "train", lambda arm, only=None: train(arm, 1))
    with pytest.raises(RunFailedError, match="local-only: no client has a model: 3 rounds in a row"):
        run(made, tmp_path / "nobody")


def test_rounds_of_clients_alone_add_up_to_rounds_of_all() -> None:
    def record(round_: int, client: int, status: str) -> RoundRecord:
        stats = (ClientStats(client, 5, 50, 2, 1.0),) if status == "ok" else ()
        lost = (Rejection(client, "error", "x"),) if status == "skipped" else ()
        cohort = () if status == "idle" else (client,)
        return RoundRecord(round_, status, 0.1, cohort, stats, lost, 10, 5 * len(stats))

    one = [record(1, 0, "ok"), record(2, 0, "idle"), record(3, 0, "idle")]
    two = [record(1, 1, "skipped"), record(2, 1, "skipped"), record(3, 1, "idle")]
    found = together([one, two])
    assert [r.status for r in found] == ["ok", "skipped", "idle"]
    assert [r.cohort for r in found] == [(0, 1), (1,), ()]
    assert [len(r.clients) for r in found] == [1, 0, 0]
    assert [(r.bytes_down, r.bytes_up) for r in found] == [(20, 5), (20, 0), (20, 0)]
