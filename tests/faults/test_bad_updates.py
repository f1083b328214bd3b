"""One bad client changes nothing but the record: every way an update can be wrong, through a whole round."""

import io
import math
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.federation import messages
from fedtune.federation import screening as screen
from fedtune.federation.faults import FaultyGrid
from fedtune.federation.guard import state_problem
from fedtune.federation.local import LocalGrid
from fedtune.federation.pool import Steps
from fedtune.federation.rounds import Federation, run_rounds
from fedtune.federation.screening import CONTENT
from fedtune.io import read_lines
from fedtune.lora import state
from fedtune.lora.state import AdapterState, LoraModule, to_tensors
from fedtune.methods.sound import GROWTH
from fedtune.methods.state import ServerState
from fedtune.types import RunFailedError
from tests.faults.hostile import clients

Answer = Callable[[RecordDict, dict[str, Tensor], dict[str, float]], RecordDict | None]
BAD = 2
PREFIX = "base_model.model.layer.q."


def start() -> AdapterState:
    return {"layer.q": LoraModule(torch.ones(2, 3), torch.zeros(4, 2), 4.0)}


def honest(client: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t + 0.1 * (client + 1) for n, t in tensors.items()}


def toy_app(bad: Answer | None = None) -> ClientApp:
    """Clients that add a constant; client `BAD` answers through `bad`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = message.content[messages.ORDER]
        assert isinstance(order, ConfigRecord)
        client = int(context.node_config["partition-id"])
        tensors = honest(client, messages.unpack(message.content.array_records[messages.ADAPTER]))
        metrics = {"examples": 4.0 + client, "tokens": 5.0, "steps": 1.0, "loss": 2.0}
        answer = messages.train_answer(order, tensors, metrics, in_process=True)
        if bad and client == BAD:
            changed = bad(answer, tensors, metrics)
            answer = answer if changed is None else changed
        return Message(answer, reply_to=message)

    return app


def federation(config: Config, folder: Path, app: ClientApp, **extra: Any) -> Federation:
    return Federation(
        config=config,
        algorithm=methods.create(config),
        grid=extra.pop("grid", None) or LocalGrid(app, config.federation.clients),
        registered=extra.pop("registered", dict.fromkeys(range(config.federation.clients), 50)),
        run_id="run",
        folder=folder,
        **extra,
    )


@pytest.fixture
def config(settings: Callable[..., Settings]) -> Config:
    return settings(federation={"clients": 4, "rounds": 1}).config


def replace_adapter(answer: RecordDict, tensors: dict[str, Tensor]) -> None:
    answer[messages.ADAPTER] = messages.pack(tensors, in_process=True)


def _with(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Answer:
    def bad(answer: RecordDict, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        replace_adapter(answer, change(dict(tensors)))

    return bad


def _metric(**changes: float) -> Answer:
    def bad(answer: RecordDict, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        answer[messages.METRICS] = MetricRecord({**metrics, **changes})

    return bad


def _identity(**changes: Any) -> Answer:
    def bad(answer: RecordDict, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        claims = dict(answer[messages.IDENTITY])
        answer[messages.IDENTITY] = ConfigRecord({**claims, **changes})

    return bad


def _nan(tensors: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    tensors[PREFIX + "lora_A.weight"] = (
        tensors[PREFIX + "lora_A.weight"].clone().index_fill_(0, torch.tensor([1]), value)
    )
    return tensors


def _raise(*_: Any) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _only(name: str) -> Answer:
    def bad(answer: RecordDict, tensors: dict[str, Tensor], metrics: dict[str, float]) -> RecordDict:
        answer.pop(name)
        return answer

    return bad


def _put(name: str, value: Callable[[Tensor], Tensor]) -> Answer:
    return _with(lambda t: {**t, PREFIX + name: value(t[PREFIX + name])})


A, B = "lora_A.weight", "lora_B.weight"
CASES: dict[str, tuple[Answer, str, str]] = {
    "nan": (_with(lambda t: _nan(t, math.nan)), "non_finite", "lora_A"),
    "infinity": (_with(lambda t: _nan(t, math.inf)), "non_finite", "NaN or infinity"),
    "absurd": (
        _with(lambda t: _nan(t, 3e38)),
        "too_large",
        r"lora_A.weight has norm inf, at most 102 is accepted",
    ),
    "zero examples": (_metric(examples=0.0), "examples", "above 0"),
    "negative examples": (_metric(examples=-5.0), "examples", "-5"),
    "nan examples": (_metric(examples=math.nan), "examples", "nan"),
    "fractional examples": (_metric(examples=2.5), "examples", "whole number"),
    "missing tensor": (_with(lambda t: {n: x for n, x in t.items() if A not in n}), "keys", "missing .*lora_A"),
    "extra tensor": (_with(lambda t: {**t, "surprise": torch.ones(1)}), "keys", "unknown .*surprise"),
    "renamed tensor": (_with(lambda t: {n + "x": x for n, x in t.items()}), "keys", "2/2"),
    "broadcastable shape": (_put(A, lambda t: t[:1, :1]), "shape", r"\(1, 1\), expected \(2, 3\)"),
    "wrong rank": (_put(A, lambda t: t[:1]), "rank", "rank 1, this client's is 2"),
    "wrong dtype": (_put(B, lambda t: t.half()), "dtype", "torch.float16, expected torch.float32"),
    "announces": (_with(lambda t: t | {f"x{i}": torch.zeros(1).expand(2**60) for i in range(64)}), "keys", "unknown"),
    "stale": (_identity(round=0), "claims", "round 0.1, now is run run round 1.1"),
    "other run": (_identity(run="yesterday"), "claims", "yesterday"),
    "impostor": (_identity(client=1), "claims", "claims to be client|claims to be 1"),
    "no update": (_only(messages.ADAPTER), "malformed", "lacks its identity or its update"),
    "no identity": (_only(messages.IDENTITY), "malformed", "lacks"),
    "raises": (_raise, "error", "CUDA out of memory"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_one_bad_client_changes_nothing_but_the_record(config: Config, tmp_path: Path, name: str) -> None:
    bad, reason, said = CASES[name]
    done = run_rounds(federation(config, tmp_path / "bad", toy_app(bad)), ServerState(start()))
    others = frozenset({0, 1, 3})
    without = run_rounds(federation(config, tmp_path / "without", toy_app(), only=others), ServerState(start()))
    record = done.records[0]
    assert [(r.client, r.reason) for r in record.rejected] == [(BAD, reason)]
    assert re.search(said, record.rejected[0].detail), record.rejected[0].detail
    assert record.status == "ok"
    assert [c.client for c in record.clients] == [0, 1, 3]
    want, got = to_tensors(without.state.adapter), to_tensors(done.state.adapter)
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert record.bytes_up < 2 * without.records[0].bytes_up + 2**20


@pytest.mark.parametrize(("claimed", "registered", "used"), [(1e12, 50, 8), (50.0, 50, 8), (8.0, 3, 3)])
def test_more_examples_than_the_steps_of_the_round_have_are_capped_and_recorded(
    config: Config, tmp_path: Path, claimed: float, registered: int, used: int
) -> None:
    """Two steps of four rows use eight, or the whole of a smaller shard: no client weighs by what it only owns."""
    sizes = {**dict.fromkeys(range(4), 50), BAD: registered}

    def after(name: str, claim: float) -> Any:
        app = toy_app(_metric(examples=claim))
        return run_rounds(federation(config, tmp_path / name, app, registered=sizes), ServerState(start()))

    capped, same = after("a", claimed), after("b", used)
    assert capped.records[0].clients[BAD].examples == used
    assert capped.records[0].notes == (f"client {BAD}: {claimed:.0f} examples capped to the {used} of its steps",)
    assert same.records[0].notes == ()
    assert torch.equal(capped.state.adapter["layer.q"].a, same.state.adapter["layer.q"].a)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"steps": 3.0}, {"steps": 0}),
        ({"steps": 2.0}, {"steps": 2}),
        ({"tokens": 1025.0}, {"tokens": 0}),
        ({"tokens": 1024.0}, {"tokens": 1024}),
        ({"loss": -0.1}, {"loss": None}),
        ({"loss": 10001.0}, {"loss": None}),
        ({"loss": 9.0}, {"loss": 9.0}),
        ({"loss": -1e15, "tokens": 1e15, "steps": 1e15}, {"loss": None, "tokens": 0, "steps": 0}),
    ],
)
def test_what_a_round_of_training_cannot_come_to_is_left_out_and_noted(
    config: Config, tmp_path: Path, said: dict[str, float], kept: dict[str, Any]
) -> None:
    """Two steps of four texts of at most 128 tokens, and losses of at least 0."""
    record = run_rounds(federation(config, tmp_path, toy_app(_metric(**said))), ServerState(start())).records[0]
    assert record.clients[BAD] == replace(record.clients[BAD], **kept)
    noted = [name for name in said if kept[name] in (0, None)]
    assert len(record.notes) == len(noted)
    assert all(any(f"client {BAD}: {name} = " in note for note in record.notes) for name in noted)


def test_extra_metrics_are_ignored_and_missing_ones_are_null(config: Config, tmp_path: Path) -> None:
    extra = run_rounds(federation(config, tmp_path / "a", toy_app(_metric(surprise=7.0))), ServerState(start()))
    plain = run_rounds(federation(config, tmp_path / "b", toy_app()), ServerState(start()))
    assert extra.records == plain.records

    def no_loss(answer: RecordDict, tensors: Any, metrics: dict[str, float]) -> None:
        answer[messages.METRICS] = MetricRecord({"examples": metrics["examples"]})

    missing = run_rounds(federation(config, tmp_path / "c", toy_app(no_loss)), ServerState(start()))
    assert missing.records[0].clients[BAD].loss is None
    assert torch.equal(missing.state.adapter["layer.q"].a, plain.state.adapter["layer.q"].a)


def test_a_nan_loss_is_null_in_the_record_and_on_disk(config: Config, tmp_path: Path) -> None:
    done = run_rounds(federation(config, tmp_path, toy_app(_metric(loss=math.nan))), ServerState(start()))
    assert done.records[0].clients[BAD].loss is None
    line = read_lines(tmp_path / "rounds.jsonl")[0]
    assert line["clients"][BAD]["loss"] is None
    assert line["loss"] == 2.0


class Doubling(LocalGrid):
    """Delivers one client's reply twice, and one from a node nobody asked."""

    def exchange(self, messages: Any, take: Callable[[Message], None], timeout: float | None = None) -> Steps[None]:
        def twice(reply: Message) -> None:
            take(reply)
            if reply.metadata.src_node_id == 2 + BAD:
                take(reply)
                take(Message(reply.content, reply_to=self.create_message(RecordDict(), "train", 999, "1")))

        return super().exchange(messages, twice, timeout)


def test_duplicates_and_strangers_are_counted_not_used(config: Config, tmp_path: Path) -> None:
    app = toy_app()
    grid = Doubling(app, 4)
    done = run_rounds(federation(config, tmp_path / "a", app, grid=grid), ServerState(start()))
    plain = run_rounds(federation(config, tmp_path / "b", toy_app()), ServerState(start()))
    assert {(r.client, r.reason) for r in done.records[0].rejected} == {(BAD, "duplicate"), (-1, "unknown_client")}
    assert torch.equal(done.state.adapter["layer.q"].a, plain.state.adapter["layer.q"].a)


def _bytes(data: bytes) -> Answer:
    def bad(answer: RecordDict, tensors: dict[str, Tensor], metrics: Any) -> None:
        answer[messages.ADAPTER] = ArrayRecord({n: Array("float32", (1,), "numpy.ndarray", data) for n in tensors})

    return bad


def _numpy(shape: tuple[int, ...], kind: Any, body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def _archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones(3, np.float32))
    return buffer.getvalue()


FORGED: dict[str, tuple[bytes, str]] = {
    "no array": (b"\x93NUMPY not an array", "unreadable arrays"),
    "nothing": (b"", "magic"),
    "a zip of arrays": (_archive(), "magic"),
    "a broken zip": (b"PK\x03\x04junk", "magic"),
    "a pickle": (pickle.dumps({"a": 1}), "magic"),
    "10^15 numbers announced": (_numpy((10**15,), "<f4"), "1000000000000000"),
    "more numbers than fit 64 bits": (_numpy((2**62, 2**62), "<f4"), "in 0 bytes"),
    "no numbers of an endless axis": (_numpy((0, 10**15), "<f4"), "shape|in 0 bytes|expected"),
    "one number too few": (_numpy((2, 3), "<f4", bytes(20)), r"\(2, 3\) float32 in 20 bytes"),
    "one number too many": (_numpy((2, 3), "<f4", bytes(28)), "in 28 bytes"),
    "objects": (_numpy((1,), "|O", pickle.dumps(1)), "must be of numbers"),
    "raw bytes": (_numpy((1,), "|V8", bytes(8)), "must be of numbers"),
    "text": (_numpy((1,), "<U2", bytes(8)), "must be of numbers"),
    "complex numbers": (_numpy((1,), "<c8", bytes(8)), "must be of numbers"),
    "a structure": (_numpy((1,), [("a", "<f4")], bytes(4)), "must be of numbers"),
    "a header of code": (b"\x93NUMPY\x01\x00\x20\x00__import__('os').abort()         \n", "unreadable arrays"),
    "a header of brackets": (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "unreadable arrays"),
}


@pytest.mark.parametrize("name", list(FORGED))
def test_forged_arrays_are_refused_not_unpickled_and_not_allocated(config: Config, tmp_path: Path, name: str) -> None:
    data, said = FORGED[name]
    done = run_rounds(federation(config, tmp_path, toy_app(_bytes(data))), ServerState(start()))
    record = done.records[0]
    assert (record.status, [c.client for c in record.clients]) == ("ok", [0, 1, 3])
    assert record.rejected[0].reason in CONTENT
    assert re.search(said, record.rejected[0].detail), record.rejected[0]


def test_arrays_over_a_wire_are_read_as_numpy_wrote_them() -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.zeros(0, 3), "d": torch.tensor(1.5)}
    sent = messages.unpack(messages.pack(tensors, in_process=False))
    assert all(torch.equal(sent[n], t) and sent[n].dtype == t.dtype for n, t in tensors.items())
    columns = np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3))
    buffer = io.BytesIO()
    np.save(buffer, columns)
    record = ArrayRecord({"x": Array("float64", (2, 3), "numpy.ndarray", buffer.getvalue())})
    assert torch.equal(messages.unpack(record)["x"], torch.arange(6, dtype=torch.float64).reshape(2, 3))


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"method": {"name": "flexlora"}}, 3e38),
        ({"method": {"name": "hlora"}}, 3e38),
        ({"method": {"name": "florist"}}, 3e38),
        ({"method": {"name": "flexlora"}, "robust": {"rule": "dnc", "malicious": 1}}, 1e20),
        ({"method": {"name": "ffa_lora"}, "lora": {"dora": True}}, -100.0),
        ({"method": {"name": "ffa_lora"}, "lora": {"dora": True}}, 0.0),
    ],
)
def test_numbers_that_no_server_step_survives_cost_their_client(
    settings: Callable[..., Settings], tmp_path: Path, changes: dict[str, Any], number: float
) -> None:
    config = settings(federation={"clients": 4, "rounds": 1}, **changes).config
    algorithm = methods.create(config)
    dora = config.lora.dora
    adapter = {"layer.q": replace(start()["layer.q"], magnitude=torch.ones(4) if dora else None)}

    def mutate(reply: Message) -> Message:
        tensors = messages.unpack(reply.content.array_records[messages.ADAPTER])
        bad = {n: torch.full_like(t, number) if "magnitude" in n or not dora else t for n, t in tensors.items()}
        replace_adapter(reply.content, bad)
        return reply

    app = clients(algorithm, adapter, BAD, mutate)
    done = run_rounds(federation(config, tmp_path, app), algorithm.initial(adapter))
    record = done.records[0]
    assert (record.status, [r.client for r in record.rejected]) == ("ok", [BAD]), record
    assert not state_problem(done.state)


def test_an_update_may_be_larger_than_what_was_sent_by_a_bounded_amount(config: Config, tmp_path: Path) -> None:
    def after(size: float, begin: float) -> tuple[str, ...]:
        state = ServerState({"layer.q": replace(start()["layer.q"], a=torch.full((2, 3), begin))})
        bad = _put(A, lambda t: torch.full((2, 3), size / math.sqrt(6)))
        done = run_rounds(federation(config, tmp_path / f"{size}-{begin}", toy_app(bad)), state)
        return tuple(r.reason for r in done.records[0].rejected)

    assert after(0.99 * GROWTH, 0.0) == ()
    assert after(1.01 * GROWTH, 0.0) == ("too_large",)
    assert after(4e4 + 0.99 * GROWTH, 4e4 / math.sqrt(6)) == ()
    assert after(4e4 + 1.01 * GROWTH, 4e4 / math.sqrt(6)) == ("too_large",)


@pytest.mark.parametrize("value", [math.inf, -1.0, 1e308, 2**63, 10**400])
def test_counts_and_losses_that_cannot_be_stay_out_of_the_record(config: Config, tmp_path: Path, value: float) -> None:
    odd = _metric(loss=value if value != -1.0 else -math.inf, tokens=value, steps=value)
    record = run_rounds(federation(config, tmp_path, toy_app(odd)), ServerState(start())).records[0]
    assert record.clients[BAD] == replace(record.clients[BAD], loss=None, tokens=0, steps=0)
    assert record.loss == 2.0
    refused = run_rounds(
        federation(config, tmp_path / "b", toy_app(_metric(examples=value))), ServerState(start())
    ).records[0]
    assert [r.reason for r in refused.rejected] == ["examples"]


def test_a_client_that_exits_ends_itself_and_not_the_run(config: Config, tmp_path: Path) -> None:
    def leaves(*_: Any) -> None:
        sys.exit("goodbye")

    record = run_rounds(federation(config, tmp_path, toy_app(leaves)), ServerState(start())).records[0]
    assert (record.status, record.rejected[0].reason) == ("ok", "error")
    assert "goodbye" in record.rejected[0].detail


@pytest.mark.parametrize("text", ["x" * 5_000_000, "[/data/3]\x1b[2J\ud83d", "", " \n"])
def test_error_texts_are_bounded_and_plain_in_the_record(config: Config, tmp_path: Path, text: str) -> None:
    def fails(*_: Any) -> None:
        raise OSError(text)

    done = run_rounds(federation(config, tmp_path, toy_app(fails)), ServerState(start()))
    (rejected,) = done.records[0].rejected
    assert len(rejected.detail) < 5000
    assert all(c.isprintable() or c in "\n\t" for c in rejected.detail)
    assert (tmp_path / "rounds.jsonl").stat().st_size < 10_000
    assert read_lines(tmp_path / "rounds.jsonl")[0]["rejected"][0]["detail"] == rejected.detail


def test_too_few_good_updates_change_nothing_and_k_in_a_row_end_the_run(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config = settings(federation={"clients": 4, "rounds": 9, "min_clients": 4, "max_skipped_rounds": 2}).config
    with pytest.raises(RunFailedError, match=r"2 rounds in a row(.|\n)*client 2: error") as caught:
        run_rounds(federation(config, tmp_path, toy_app(_raise)), ServerState(start()))
    assert caught.value.exit_code != 0
    lines = read_lines(tmp_path / "rounds.jsonl")
    assert [line["status"] for line in lines] == ["skipped", "skipped"]


def test_a_round_with_too_few_updates_for_its_rule_is_skipped_and_says_so(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1, "max_skipped_rounds": 2}).config
    with pytest.raises(RunFailedError, match="no round had enough good updates"):
        run_rounds(federation(config, tmp_path, toy_app(_raise)), ServerState(start()))
    line = read_lines(tmp_path / "rounds.jsonl")[0]
    assert line["status"] == "skipped"
    assert line["notes"] == ['robust.rule = "krum" with malicious = 1 needs 5 updates per round; 4 came']


@pytest.mark.parametrize(("rule", "clients"), [("krum", 5), ("multi-krum", 5), ("trimmed", 3), ("dnc", 3)])
def test_a_reply_that_is_refused_is_one_of_the_malicious(
    settings: Callable[..., Settings], tmp_path: Path, rule: str, clients: int
) -> None:
    """A cohort of exactly the minimum goes on without the client that sent rubbish, as one without any malicious."""
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": rule}}
    config = settings(**tree, federation={"clients": clients, "rounds": 2}).config
    app = toy_app(_put(A, lambda t: t * math.nan))
    for record in run_rounds(federation(config, tmp_path, app), ServerState(start())).records:
        assert (record.status, len(record.clients)) == ("ok", clients - 1)
        assert "1 refused of the 1 malicious: robust.malicious = 0 here" in record.notes


def _nested(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.nested.nested_tensor([t, t], layout=torch.jagged) for n, t in tensors.items()}


REFUSED: dict[str, Answer] = {
    "rubbish bytes": _bytes(b"rubbish"),
    "10^15 numbers announced": _bytes(_numpy((10**15,), "<f4")),
    "a type that NumPy lacks": _with(lambda t: {n: x.to(torch.float8_e4m3fn) for n, x in t.items()}),
    "nested tensors": _with(_nested),
    "no tensors": _with(lambda t: dict.fromkeys(t, 7)),  # type: ignore[arg-type]
    "another round": _identity(round=99),
    "another exchange": _identity(phase=2),
    "another run": _identity(run="x"),
    "another client": _identity(client=0),
    "no client": _identity(client="2"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_read_or_claims_what_is_false_is_one_of_the_malicious(
    settings: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1}).config
    (record,) = run_rounds(federation(config, tmp_path, toy_app(REFUSED[name])), ServerState(start())).records
    assert [(r.client, r.reason) for r in record.rejected] in ([(BAD, "malformed")], [(BAD, "claims")])
    assert (record.status, len(record.clients)) == ("ok", 4)


def _round_zero(reply: Message) -> None:
    claims = dict(reply.content.config_records[messages.IDENTITY])
    reply.content[messages.IDENTITY] = ConfigRecord({**claims, "round": 0})


@pytest.mark.parametrize("change", [lambda reply: reply.content.clear(), _round_zero], ids=["empty", "another round"])
def test_a_second_reply_does_not_make_its_client_one_of_those_refused(
    settings: Callable[..., Settings], tmp_path: Path, change: Callable[[Message], None]
) -> None:
    """Else a client whose first reply counts would use up the malicious ones that the rule reckons with."""

    class Twice(LocalGrid):
        def exchange(self, messages: Any, take: Callable[[Message], None], timeout: float | None = None) -> Steps[None]:
            def twice(reply: Message) -> None:
                take(reply)
                change(reply)
                take(reply)

            return super().exchange(messages, twice, timeout)

    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1}).config
    grid = Twice(toy_app(), 5)
    (record,) = run_rounds(federation(config, tmp_path, toy_app(), grid=grid), ServerState(start())).records
    assert {r.reason for r in record.rejected} == {"duplicate"}
    assert not [note for note in record.notes if "refused" in note]


def _sender(reply: Message) -> Any:
    reply.metadata.__dict__["_src_node_id"] = 2 + 4
    claims = dict(reply.content.config_records[messages.IDENTITY])
    reply.content[messages.IDENTITY] = ConfigRecord({**claims, "client": 4})
    return reply


def _question(reply: Message) -> Any:
    reply.metadata.__dict__["_reply_to_message_id"] = "local-1"
    return reply


FALSE: dict[str, tuple[Callable[[Message], Any], str]] = {
    "another's name": (_sender, "node 4 that names node 6"),
    "another question": (_question, "reply to message 'local-1'"),
    "nothing": (lambda reply: None, "NoneType"),
}


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("name", list(FALSE))
def test_nobody_answers_in_the_name_of_another(
    settings: Callable[..., Settings], tmp_path: Path, name: str, faulty: bool
) -> None:
    """In one process a client makes the whole message: it is its own reply, whatever stands on it, and a false one."""
    forge, said = FALSE[name]
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1}).config
    algorithm = methods.create(config)
    grid: Any = LocalGrid(clients(algorithm, start(), BAD, forge), 5)
    grid = FaultyGrid(grid, config.federation.faults, 0) if faulty else grid
    fed = federation(config, tmp_path, toy_app(), grid=grid)
    (record,) = run_rounds(fed, algorithm.initial(start())).records
    assert [(r.client, r.reason) for r in record.rejected] == [(BAD, "malformed")]
    assert said in record.rejected[0].detail
    assert [c.client for c in record.clients] == [0, 1, 3, 4]


def test_without_a_rule_a_round_in_which_nobody_was_good_speaks_of_none(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config = settings(federation={"clients": 3, "rounds": 1}).config
    silent = federation(config, tmp_path, toy_app(_raise), only=frozenset({BAD}))
    with pytest.raises(RunFailedError, match="no round had enough good updates"):
        run_rounds(silent, ServerState(start()))
    (line,) = read_lines(tmp_path / "rounds.jsonl")
    assert (line["status"], line["notes"]) == ("skipped", [])


def test_the_record_names_whom_a_rule_left_out(settings: Callable[..., Settings], tmp_path: Path) -> None:
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1}).config
    run_rounds(federation(config, tmp_path, toy_app()), ServerState(start()))
    (line,) = read_lines(tmp_path / "rounds.jsonl")
    (note,) = line["notes"]
    assert note.startswith('robust.rule = "krum" gave no weight to the updates of clients ')
    assert len(note.rpartition("clients ")[2].split(", ")) == 4


def test_a_rule_that_no_round_could_satisfy_ends_the_run_before_it_starts(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    tree = {"method": {"name": "flexlora"}, "robust": {"rule": "krum"}}
    config = settings(**tree, federation={"clients": 5, "rounds": 1}).config
    some = {0: 50, 1: 50, 2: 0, 3: 50, 4: 50}
    with pytest.raises(RunFailedError, match="needs 5 updates per round; 4 came: the others have no examples"):
        run_rounds(federation(config, tmp_path, toy_app(), registered=some), ServerState(start()))
    assert not (tmp_path / "rounds.jsonl").exists()


def test_a_skipped_round_leaves_the_state_untouched(settings: Callable[..., Settings], tmp_path: Path) -> None:
    config = settings(federation={"clients": 4, "rounds": 2, "min_clients": 4}).config
    calls: list[int] = []

    def once(answer: RecordDict, tensors: Any, metrics: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("first round only")

    done = run_rounds(federation(config, tmp_path / "a", toy_app(once)), ServerState(start()))
    assert [r.status for r in done.records] == ["skipped", "ok"]
    one = settings(federation={"clients": 4, "rounds": 1}).config
    single = run_rounds(federation(one, tmp_path / "b", toy_app()), ServerState(start()))
    assert torch.equal(done.state.adapter["layer.q"].a, single.state.adapter["layer.q"].a)


def test_a_run_in_which_everybody_fails_is_no_success(config: Config, tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise MemoryError("killed")

    with pytest.raises(RunFailedError, match="no round had enough good updates"):
        run_rounds(federation(config, tmp_path, app), ServerState(start()))


@pytest.mark.parametrize("name", ["fedit", "flexlora"])
@pytest.mark.parametrize("what", ["download", "reply"])
def test_what_a_client_writes_into_tensors_it_holds_is_seen_by_nobody_else(
    settings: Callable[..., Settings], tmp_path: Path, name: str, what: str
) -> None:
    """In one process it holds the tensors of its order, and those of a reply that was accepted already."""
    config = settings(federation={"clients": 4, "rounds": 2}, method__name=name).config
    inner, held = toy_app(), list[dict[str, Tensor]]()

    def run(folder: str, act: bool) -> Any:
        app = ClientApp()
        held.clear()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            if context.node_config["partition-id"] == (0 if what == "download" else 3):
                download = messages.unpack(message.content.array_records[messages.ADAPTER])
                for tensors in [download] if what == "download" else held:
                    for tensor in tensors.values() if act else ():
                        tensor.fill_(7.0)
                raise RuntimeError("fails")
            reply = inner(message, context)
            held.append(messages.unpack(reply.content.array_records[messages.ADAPTER]))
            return reply

        return run_rounds(federation(config, tmp_path / folder, app), ServerState(start()))

    quiet, loud = run("quiet", act=False), run("loud", act=True)
    assert quiet.records == loud.records
    want, got = to_tensors(quiet.state.adapter), to_tensors(loud.state.adapter)
    assert all(torch.equal(want[n], got[n]) for n in want)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        *(("fedit", "growth"), ("fedit", "problem"), ("flexlora", "growth"), ("flexlora", "problem")),
        ("hetlora", "growth"),
    ],
)
def test_what_a_client_writes_into_its_reply_while_it_is_examined_changes_nothing(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    """Else it is examined as one thing and counts as another."""
    config = settings(federation={"clients": 4, "rounds": 2}, method__name=name).config
    held, copies = list[Tensor](), list[int]()

    def remember(answer: RecordDict, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        held[:] = tensors.values()

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies.append(1)
        return state.copied(tensors)

    def run(folder: str, act: bool) -> Any:
        held.clear()
        copies.clear()
        fed = federation(config, tmp_path / folder, toy_app(remember))
        upload = fed.algorithm.upload

        def watched(*given: Any) -> Any:
            expected = upload(*given)

            def reached(what: Any) -> Any:
                found = getattr(expected, when)(what)
                for tensor in held if act else ():
                    tensor.fill_(1e6)
                return found

            return replace(expected, **{when: reached})

        fed.algorithm.__dict__["upload"] = watched
        return run_rounds(fed, ServerState(start()))

    quiet = run("quiet", act=False)
    monkeypatch.setattr(screen, "copied", copied)
    loud = run("loud", act=True)
    assert len(copies) == 8
    assert quiet.records == loud.records
    want, got = to_tensors(quiet.state.adapter), to_tensors(loud.state.adapter)
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_a_state_that_was_written_into_is_not_kept_after_a_skipped_round(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config = settings(federation={"clients": 4, "rounds": 2, "min_clients": 4}).config
    state = ServerState(start())

    def reaches(*_: Any) -> None:
        state.adapter["layer.q"].a.fill_(math.nan)
        raise RuntimeError("fails")

    with pytest.raises(RunFailedError, match=r"round 1 was skipped and changed the model all the same: .*nan"):
        run_rounds(federation(config, tmp_path, toy_app(reaches)), state)
    assert not list(tmp_path.glob("**/*.safetensors"))
