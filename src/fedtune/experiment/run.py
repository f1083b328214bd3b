"""One command's work, from settings to `result.json`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedtune import domains, spaces
from fedtune.config import Settings
from fedtune.data.check import WORDS
from fedtune.evaluation.run import check_prompts, check_tasks
from fedtune.experiment import arms, folder
from fedtune.experiment.arms import Arm
from fedtune.experiment.folder import RunFolder, cancellable, open_run, status
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.resident import Resident
from fedtune.experiment.session import OwnModels, Session
from fedtune.federation.checkpoint import Progress, rounds_of, together
from fedtune.federation.faults import kill_point
from fedtune.federation.pool import Steps, complete
from fedtune.io import folder_lock, only_files, read_lines, write_json, write_lines
from fedtune.lora.state import AdapterState
from fedtune.methods.state import ServerState
from fedtune.models import budget, zoo
from fedtune.models.load import LoadedModel
from fedtune.results import schema
from fedtune.training import workload
from fedtune.training.plan import Plan
from fedtune.types import RoundRecord, RunFailedError, counted

P = ParamSpec("P")
T = TypeVar("T")
Trained = tuple[schema.Arm, Sequence[RoundRecord]]


def _steps(records: Sequence[RoundRecord]) -> int:
    return sum(c.steps for r in records for c in r.clients)


def _prepare(session: Session, name: str, where: Path, data: workload.TrainingData | None = None) -> Arm:
    """Return an arm ready to run; the federated one is evaluated every `eval.every` rounds into `curve.jsonl`."""
    config = arms.derive(session.config, name)
    data = data or workload.load(config)
    shards = workload.encode_shards(data, session.adapted.base.tokenizer, config)
    run, reporter = session.run, session.reporter
    arm = Arm(config, session.adapted, shards, session.start, run.run_id, where, reporter, session.pool)
    every = config.eval.every

    def measure(record: RoundRecord, state: ServerState) -> None:
        if record.round % every == 0 and record.round < config.federation.rounds:
            scores, _ = session.evaluate_state(arm, state, record.round, f"round-{record.round:06d}")
            _put_on_curve(run.path / "curve.jsonl", record.round, scores)
            kill_point(record.round, "measured")

    return replace(arm, on_round=measure) if every and name == "federated" else arm


def _put_on_curve(path: Path, round_: int, scores: Sequence[schema.Score]) -> None:
    """Put a round's scores on the curve, in place of what an interrupted run has left of them."""
    before = [line for line in read_lines(path, torn_tail=True) if line["round"] < round_]
    write_lines(path, [*before, *({"round": round_, **s.model_dump(mode="json")} for s in scores)])


def _train(session: Session, arm: Arm, only: int | None = None) -> Steps[Progress]:
    started = time.monotonic()
    try:
        return (yield from arms.train(arm, only))
    finally:
        session.run.add_seconds("training", time.monotonic() - started)


def _save(session: Session, state: AdapterState, where: Path) -> None:
    space = spaces.of(session.config)
    space.save(session.adapted, state, where / space.folder)


def _single(session: Session, name: str, where: Path, data: workload.TrainingData | None) -> Steps[Trained]:
    """Train and evaluate the federated or the centralised arm; a global model is saved as its space says."""
    arm = _prepare(session, name, where, data)
    progress = yield from _train(session, arm)
    if arm.algorithm.method.models != "own":
        _save(session, arm.adapter_of(progress.state), where)
    scores, each = session.evaluate_state(arm, progress.state, progress.round, name)
    steps = _steps(progress.records)
    return schema.Arm(name=name, scores=scores, steps=steps, per_client=each), progress.records


def _local_only(session: Session, where: Path, data: workload.TrainingData | None) -> Steps[Trained]:
    """Train and evaluate every client alone, in the rounds in which the federation would have asked it.

    Raises:
        RunFailedError: no client has a model.
    """
    arm = _prepare(session, "local-only", where, data)
    asked = [client for client, examples in arm.shards.sizes.items() if examples]
    failed: dict[int, str] = {}
    models = OwnModels(session, "local-only")
    for client in asked:
        own = arm.for_client(client)
        try:
            state = (yield from _train(session, own, client)).state
        except RunFailedError as err:
            failed[client] = str(err)
            session.reporter.note(f"local-only: client {client} has no model: {err}")
            continue
        _save(session, own.adapter_of(state), own.folder)
        models.evaluate(client, own.shared_model(state))
    scores, each = models.scored()
    if len(failed) == len(asked):
        raise RunFailedError(f"local-only: no client has a model: {failed[asked[0]]}")
    records = together([rounds_of(arm.for_client(client).folder) for client in asked])
    steps = _steps(records)
    return schema.Arm(name="local-only", scores=scores, steps=steps, per_client=each, failed=failed), records


def _arm(session: Session, name: str, main: bool, data: workload.TrainingData) -> Steps[Trained]:
    where = session.run.path if main and name != "local-only" else session.run.path / "arms" / name
    mine = data if main else None
    if name == "local-only":
        return (yield from _local_only(session, where, mine))
    return (yield from _single(session, name, where, mine))


def _result(
    session: Session, data: workload.TrainingData, done: list[schema.Arm], records: Sequence[RoundRecord]
) -> schema.Result:
    config = session.config
    return schema.Result(
        domain=config.domain,
        protocol=session.settings.protocol.name,
        protocol_sha256=session.settings.protocol.hash,
        config_sha256=config.hash,
        config=config.semantic(),
        unranked=session.run.manifest["unranked"],
        method=config.method.name,
        model=config.model.name,
        revision=session.adapted.base.revision,
        data=data.summary(),
        seed=config.seed,
        arms=done,
        rounds=len(records),
        skipped_rounds=sum(r.status == "skipped" for r in records),
        lost_clients=sum(len(r.cohort) - len(r.clients) for r in records),
        bytes_down=sum(r.bytes_down for r in records),
        bytes_up=sum(r.bytes_up for r in records),
        bytes_predicted=session.run.manifest["predicted"]["total"],
        trainable_parameters=session.run.manifest["predicted"]["trainable"],
    )


def _report_data(session: Session, data: workload.TrainingData, shards: workload.EncodedShards) -> None:
    """Write the report on bad rows, and say how many there are."""
    report = {
        "counts": data.checked.counts(),
        "masked_rows": list(shards.masked),
        "truncated_rows": shards.truncated,
        "problems": [vars(p) for p in data.checked.problems],
    }
    write_json(session.run.path / "data.json", report)
    counts = {**data.checked.counts(), "no_label_left": len(shards.masked), "truncated": shards.truncated}
    listed = ", ".join(f"{n} {WORDS[kind]}" for kind, n in counts.items() if n)
    rows = counted(len(data.checked.rows), "row")
    session.reporter.note(f"data: {data.name}, {rows}" + (f"; {listed} (see data.json)" if listed else ""))
    empty = [c for c, n in shards.sizes.items() if not n]
    if empty:
        session.reporter.note(f"{counted(len(empty), 'client')} without examples, never asked: {empty[:10]}")


def _work(
    session: Session, data: workload.TrainingData, extra: Sequence[str], shared: Resident
) -> Steps[schema.Result]:
    config = session.config
    shards = workload.encode_shards(data, session.adapted.base.tokenizer, config)
    _report_data(session, data, shards)
    before = session.run.manifest.get("plan")
    how = shared.planned(config, shards, Plan.read(before) if before else None)
    session.pool = shared.pool
    planned = budget.predict(
        arms.derive(config, config.arm),
        session.adapted,
        shards.longest,
        arms.wire(config, session.start),
        tokens=how.tokens,
        checkpointing=how.checkpointing,
    )
    session.run.update(predicted=vars(planned), data=data.summary(), plan=vars(how))
    session.reporter.plan(config, planned)
    session.reporter.note(f"engine: {how.line()} ({'; '.join(how.why)})")
    done = [schema.Arm(name="base", scores=session.evaluate(None, "base"))] if config.eval.base else []
    main, records = yield from _arm(session, config.arm, True, data)
    done.append(main)
    for name in extra:
        if name != config.arm:
            done.append((yield from _arm(session, name, False, data))[0])
    result = _result(session, data, done, records)
    write_json(session.run.path / schema.RESULT, result.model_dump(mode="json"))
    session.run.update(bytes={"down": result.bytes_down, "up": result.bytes_up})
    return result


def _opened(path: Path, settings: Settings, data: str, base: LoadedModel, *, resume: bool, force: bool) -> RunFolder:
    """Open a run's folder for what the run is made of: settings, the hash of its data, and the base model."""
    config, dtype = settings.config, str(base.model.dtype).removeprefix("torch.")
    known = folder.identity(config, data, base.revision, dtype)
    unranked = (*settings.unranked, *zoo.unranked_reasons(config), *domains.unranked_reasons(config))
    return open_run(path, settings, known, unranked, resume=resume, force=force)


def steps(
    settings: Settings,
    out: Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    extra_arms: Sequence[str] = (),
    reporter: Reporter = Reporter(),
    resident: Resident | None = None,
) -> Steps[tuple[Path, schema.Result]]:
    """Run an experiment, or continue one, as a generator that waits for its clients.

    Args:
        settings: validated.
        out: the run folder; None chooses a new one under `runs/`.
        resume: continue the run in `out`.
        force: continue although something changed; the run is then unranked.
        extra_arms: further arms beside the settings' own.
        reporter: who watches.
        resident: a model that is shared with other runs; whoever shares it sees to Ctrl-C.

    Returns:
        The run folder and the result.

    Raises:
        FedtuneError: anything a user can repair, before work starts wherever that can be known.
        CancelledError: Ctrl-C or SIGTERM.
    """
    config = settings.config
    path = out or folder.fresh_folder(config)
    again = f"continue with: fedtune run --resume --out {path}"
    if resume and path.exists():
        only_files(path)  # somebody else may have made it
    with folder_lock(path), cancellable(again) if resident is None else contextlib.nullcontext():
        data = workload.load(arms.derive(config, config.arm))
        tasks = domains.chosen_tasks(config)
        check_tasks(tasks, config)
        shared = resident or Resident.of(config, [config.seed])
        check_prompts(shared.base.tokenizer, tasks, config)
        opened = _opened(path, settings, data.hash, shared.base, resume=resume, force=force)
        try:
            with status(opened):
                start = shared.starts[config.seed]
                session = Session(settings, opened, shared.adapted, start, tasks, reporter, shared.pool)
                # a continued run finishes the arms it was started with
                wanted = list(extra_arms) or list(opened.manifest.get("arms", []))
                opened.update(arms=wanted)
                return path, (yield from _work(session, data, wanted, shared))
        finally:
            reporter.close()
            if resident is None:
                shared.end()


def _alone(work: Callable[P, Steps[T]]) -> Callable[P, T]:
    @wraps(work)
    def to_its_end(*args: P.args, **kwargs: P.kwargs) -> T:
        return complete(work(*args, **kwargs))

    return to_its_end


run = _alone(steps)
"""Run an experiment, or continue one, beside no other; parameters and errors are those of `steps`."""
