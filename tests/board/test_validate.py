"""A submission of a real tiny run is good; each attack on it is refused with its reason."""

import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedtune import spaces
from fedtune.board import samples, sets
from fedtune.board.adapter import adapter_problems
from fedtune.board.entries import from_run
from fedtune.board.store import duplicate, write_entry
from fedtune.board.submit import pack
from fedtune.board.traffic import _too_few, byte_problems
from fedtune.board.validate import check, impossible
from fedtune.cli import app
from fedtune.config import Settings
from fedtune.config.load import read_toml
from fedtune.experiment.run import run
from fedtune.io import file_sha256
from fedtune.types import ConfigError, CorruptFileError, DataError
from tests.board.entries import score

# one worker makes the runs, once
pytestmark = pytest.mark.xdist_group("submission")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "s")
    return tmp_path / "s"


def reasons(path: Path) -> str:
    return "\n".join(str(p) for _, _, problems in check(path) for p in problems)


def _json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def relist(packed: Path) -> None:
    """Make the listed hashes those of the files, as a careful cheat would."""

    def listed(entry: Any) -> None:
        entry["files"] = {n: file_sha256(packed / n) for n in entry["files"] if (packed / n).exists()}

    _json(packed / "entry.json", listed)


def test_a_real_submission_is_good_as_folder_and_as_zip(good: Path, tmp_path: Path) -> None:
    assert reasons(good) == ""
    archive = shutil.make_archive(str(tmp_path / "s"), "zip", good)
    assert reasons(Path(archive)) == ""
    done = CliRunner().invoke(app, ["validate", str(good)])
    assert done.exit_code == 0
    assert "seed-1: good" in done.output
    names = {p.name for p in (good / "seed-1").iterdir()}
    assert {"entry.json", "README.md", "adapter", "evals", "rounds.jsonl", "config.toml", ".eval_results"} <= names


def test_a_submission_does_not_say_where_the_rows_lie(good: Path, runs: list[Path]) -> None:
    path = read_toml(runs[0] / "config.toml")["data"]["path"]
    assert Path(path).is_absolute()
    packed = [p for p in (good / "seed-1").rglob("*") if p.is_file()]
    texts = [gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in packed]
    assert not [p for p, text in zip(packed, texts, strict=True) if path.encode() in text]


def test_a_run_whose_reasons_quote_markup_is_packed_and_good(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "<|user|> " + "x" * 400 + " {instruction}\n### Response: {response}"
    short = {"federation": {"clients": 2, "rounds": 1}, "eval": {"base": False, "modes": ["likelihood"], "limit": 4}}
    folder = run(
        settings(protocol="flowertune-paper", prompt={"template": template}, train={"max_length": 1024}, **short),
        tmp_path / "run",
    )[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["unranked"] = ["continued although something had changed: data.rows: 24 -> 25"]  # by --force-resume
    (folder / "manifest.json").write_text(json.dumps(manifest))
    pack([folder], tmp_path / "packed", "a team")
    entry = from_run(folder)
    assert any("\u2039|user|\u203a" in reason for reason in entry.unranked)
    assert "continued although something had changed: data.rows: 24 \u2192 25" in entry.unranked
    assert "the entry does not say" not in reasons(tmp_path / "packed")


def test_the_card_is_for_the_hub(good: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(good / "seed-1/README.md")
    assert card.data.library_name == "peft"
    shown = [(r.dataset_type, r.dataset_config, r.metric_value) for r in card.data.eval_results]
    scores = json.loads((good / "seed-1/entry.json").read_text())["arms"][-1]["scores"]
    assert shown == [(s["task"], s["mode"], s["score"]) for s in scores]
    assert len({(task, mode) for task, mode, _ in shown}) == len(shown)
    assert "fedtune run --config config.toml --seed 1" in card.text
    shaped = json.loads((good / "seed-1/results_lm_eval.json").read_text())
    assert shaped["results"]["fpb_likelihood"]["sample_len"] == 24


def test_runs_that_do_not_belong_together_are_not_packed(
    runs: list[Path], settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="same seed"):
        pack([runs[0], runs[0]], tmp_path / "x", "t")
    other = run(settings(federation={"clients": 2, "rounds": 1}, eval={"limit": 2}), tmp_path / "other")[0]
    with pytest.raises(DataError, match="not of one recipe"):
        pack([runs[0], other], tmp_path / "x", "t")
    pack(runs, tmp_path / "y", "t")
    with pytest.raises(DataError, match="is not empty"):
        pack(runs, tmp_path / "y", "t")
    with pytest.raises(ConfigError, match="write plain text"):
        CliRunner().invoke(
            app, ["submit", str(runs[0]), "--out", str(tmp_path / "z"), "--team", "<b>x</b>"], catch_exceptions=False
        )
    _json(runs[0] / "manifest.json", lambda m: m.update(status="cancelled"))
    try:
        with pytest.raises(DataError, match="the run is cancelled"):
            from_run(runs[0])
    finally:
        _json(runs[0] / "manifest.json", lambda m: m.update(status="complete"))


def _edit_scores(packed: Path, value: float) -> None:
    def better(document: Any) -> None:
        document["arms"][-1]["scores"][0]["score"] = value

    _json(packed / "entry.json", better)
    _json(packed / "result.json", better)


def edited_score(packed: Path) -> None:
    _edit_scores(packed, 23 / 24)
    relist(packed)


def impossible_score(packed: Path) -> None:
    _edit_scores(packed, 0.5994)
    relist(packed)


def _rewrite_log(packed: Path, change: Callable[[dict[str, Any]], None], mode: str = "likelihood") -> None:
    path = packed / f"evals/federated/fpb.{mode}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    for r in rows[1:]:
        change(r)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode(), mtime=0))


def samples_judged_kindly(packed: Path) -> None:
    _rewrite_log(packed, lambda r: r.update(correct=True))
    _edit_scores(packed, 1.0)
    relist(packed)


def texts_judged_kindly(packed: Path) -> None:
    _rewrite_log(packed, lambda r: r.update(correct=True, predicted=r["gold"]), "official")
    relist(packed)


def locked_key(packed: Path) -> None:
    text = (packed / "config.toml").read_text()
    (packed / "config.toml").write_text(text.replace("max_steps = 2", "max_steps = 9"))
    relist(packed)


def wrong_hash(packed: Path) -> None:
    (packed / "README.md").write_text("something else")


def missing_seed(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e.update(seed=None))


def too_few_bytes(packed: Path) -> None:
    lines = [json.loads(line) for line in (packed / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["bytes_up"] //= 10
    (packed / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    total = sum(x["bytes_up"] for x in lines)
    _json(packed / "entry.json", lambda e: e["costs"].update(bytes_up=total))
    _json(packed / "result.json", lambda r: r.update(bytes_up=total))
    relist(packed)


def bytes_that_do_not_add_up(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e["costs"].update(bytes_up=1))


def hidden_losses(packed: Path) -> None:
    lines = [json.loads(line) for line in (packed / "rounds.jsonl").read_text().splitlines()]
    lines[0]["clients"] = lines[0]["clients"][:1]
    (packed / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    relist(packed)


def fewer_rounds(packed: Path) -> None:
    text = (packed / "rounds.jsonl").read_text().splitlines(keepends=True)[:1]
    (packed / "rounds.jsonl").write_text("".join(text))
    relist(packed)


def markup(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e.update(team="<script>alert(1)</script>"))


def pickle_inside(packed: Path) -> None:
    (packed / "adapter/adapter_model.bin").write_bytes(b"\x80\x04")


def link_outside(packed: Path) -> None:
    (packed / "secret.json").symlink_to("/etc/passwd")


def giant(packed: Path) -> None:
    with open(packed / "evals/huge.jsonl", "wb") as file:
        file.truncate(1024**3)


def bomb(packed: Path) -> None:
    (packed / "evals/bomb.jsonl.gz").write_bytes(gzip.compress(bytes(300 * 1024**2), compresslevel=9))


def empty_rows(packed: Path) -> None:
    log = packed / "evals/federated/fpb.official.jsonl.gz"
    log.write_bytes(gzip.compress(b"{}\n" * 2000, compresslevel=9))
    relist(packed)


def wide_row(packed: Path) -> None:
    log = packed / "evals/federated/fpb.official.jsonl.gz"
    log.write_bytes(gzip.compress(b"[" + b"{}," * 23_000_000 + b"{}]", compresslevel=1))
    relist(packed)


def large_entry(packed: Path) -> None:
    with open(packed / "entry.json", "a") as file:
        file.write(" " * (17 * 1024**2))


def other_base(packed: Path) -> None:
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="mistralai/Mistral-7B"))
    relist(packed)


def cut_adapter(packed: Path) -> None:
    path = packed / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    relist(packed)


def spoilt_adapter(packed: Path) -> None:
    path = packed / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # a NaN of 32 bits
    relist(packed)


def extra_file(packed: Path) -> None:
    (packed / "notes.md").write_text("hello")


def other_items(packed: Path) -> None:
    path = packed / "evals/federated/fpb.likelihood.jsonl.gz"
    first, *rest = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
    header = json.loads(first)
    header["items"] = "0" * 64
    path.write_bytes(gzip.compress((json.dumps(header) + "\n" + "".join(rest)).encode(), mtime=0))
    relist(packed)


def claimed_privacy(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e.update(privacy={"unit": "client", "epsilon": 1.0, "delta": 1e-5}))


def smaller_base(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e.update(base_millions=1.0))


def turned_bits(packed: Path) -> None:
    _json(packed / "entry.json", lambda e: e["answers"]["federated/fpb/likelihood"].update(bits="////"))


def hidden_reason(packed: Path) -> None:
    for name in ("entry.json", "result.json"):
        _json(packed / name, lambda e: e.update(unranked=[]))
    relist(packed)


def _remake(packed: Path) -> None:
    """Make the entry again from the files, as a careful cheat would."""
    files = {str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()} - {"entry.json"}
    entry = from_run(packed).model_copy(update={"files": {n: file_sha256(packed / n) for n in files}})
    (packed / "entry.json").write_text(json.dumps(entry.model_dump(mode="json")))


def bits_by_a_value(packed: Path) -> None:
    _rewrite_log(packed, lambda r: r.update(value=1.0))
    _remake(packed)


def no_adapter(packed: Path) -> None:
    shutil.rmtree(packed / "adapter")
    _remake(packed)


def small_adapter(packed: Path) -> None:
    from safetensors.numpy import save_file

    names = [f"base_model.model.x.lora_{factor}.weight" for factor in "AB"]
    save_file({n: np.zeros((1, 1), np.float32) for n in names}, packed / "adapter/adapter_model.safetensors")
    _remake(packed)


def _tensors(packed: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.numpy import load_file, save_file

    path = packed / "adapter/adapter_model.safetensors"
    save_file({n: np.ascontiguousarray(t) for n, t in change(load_file(path)).items()}, path)
    _remake(packed)


def whole_weights(packed: Path) -> None:
    _tensors(packed, lambda t: {**t, "base_model.model.lm_head.weight": np.ones((300, 32), np.float32)})


def weights_beside(packed: Path) -> None:
    shutil.copy(packed / "adapter/adapter_model.safetensors", packed / "adapter/model.safetensors")
    _remake(packed)


def factors_that_do_not_multiply(packed: Path) -> None:
    _tensors(packed, lambda t: {n: np.repeat(v, 1 + n.endswith("B.weight"), axis=1) for n, v in t.items()})


def one_factor(packed: Path) -> None:
    _tensors(packed, lambda t: dict(sorted(t.items())[1:]))


def large_rank(packed: Path) -> None:
    _tensors(packed, lambda t: {n: np.repeat(v, 16, axis=int(n.endswith("B.weight"))) for n, v in t.items()})
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(r=64))
    _remake(packed)


def rank_of_another_config(packed: Path) -> None:
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(r=8))
    _remake(packed)


def whole_numbers(packed: Path) -> None:
    _tensors(packed, lambda t: {n: v.astype(np.int8) for n, v in t.items()})


def other_names(packed: Path) -> None:
    _tensors(packed, lambda t: {n.replace("self_attn.q_proj", "mlp.up_proj"): v for n, v in t.items()})


def other_scale(packed: Path) -> None:
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(lora_alpha=800.0))
    _remake(packed)


def narrowed(packed: Path) -> None:
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(layers_to_transform=[0]))
    _remake(packed)


def dora_without_magnitudes(packed: Path) -> None:
    _json(packed / "adapter/adapter_config.json", lambda c: c.update(use_dora=True))
    _remake(packed)


def _rounds(packed: Path, change: Callable[[list[Any]], None]) -> None:
    lines = [json.loads(line) for line in (packed / "rounds.jsonl").read_text().splitlines()]
    change(lines)
    (packed / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def bytes_below_zero(packed: Path) -> None:
    def moved(lines: list[Any]) -> None:
        lines[1]["bytes_up"] += lines[0]["bytes_up"] + 10**6
        lines[0]["bytes_up"] = -(10**6)

    _rounds(packed, moved)
    _remake(packed)


def hidden_skip(packed: Path) -> None:
    _rounds(packed, lambda lines: lines[0].update(status="skipped"))
    _remake(packed)


def client_twice(packed: Path) -> None:
    _rounds(packed, lambda lines: lines[0].update(cohort=[0, 1, 1]))
    _remake(packed)


def nobody_asked(packed: Path) -> None:
    empty = {"cohort": [], "clients": [], "bytes_up": 0, "bytes_down": 0}
    _rounds(packed, lambda lines: [line.update(empty) for line in lines])
    _json(packed / "result.json", lambda r: r.update(bytes_up=0, bytes_down=0, lost_clients=0))
    _remake(packed)


def one_asked(packed: Path) -> None:
    _rounds(packed, lambda lines: lines[1].update(cohort=[0], clients=lines[1]["clients"][:1]))
    _remake(packed)


def no_round_counts(packed: Path) -> None:
    _rounds(packed, lambda lines: [line.update(status="skipped") for line in lines])
    _json(packed / "result.json", lambda r: r.update(skipped_rounds=2))
    _remake(packed)


def nobody_answered(packed: Path) -> None:
    _rounds(packed, lambda lines: lines[0].update(clients=[]))
    _json(packed / "result.json", lambda r: r.update(lost_clients=2))
    _remake(packed)


def uneven_shards(packed: Path) -> None:
    _json(packed / "result.json", lambda r: r["data"].update(clients=[1, r["data"]["rows"] - 1]))
    _remake(packed)


def other_size(packed: Path) -> None:
    _json(packed / "result.json", lambda r: r.update(trainable_parameters=7))
    _remake(packed)


def arm_elsewhere(packed: Path) -> None:
    shutil.copytree(packed / "evals/base", packed / "evals/elsewhere")
    _json(packed / "result.json", lambda r: r["arms"].insert(0, {**r["arms"][0], "name": "elsewhere"}))
    _remake(packed)


def second_log(packed: Path) -> None:
    log = packed / "evals/federated/fpb.official.jsonl.gz"
    (packed / "evals/federated/fpb.official.jsonl").write_bytes(gzip.decompress(log.read_bytes()))
    _remake(packed)


def unpacked_log(packed: Path) -> None:
    log = packed / "evals/federated/fpb.official.jsonl.gz"
    log.with_suffix("").write_bytes(gzip.decompress(log.read_bytes()))
    log.unlink()
    _remake(packed)


def log_of_nothing(packed: Path) -> None:
    (packed / "evals/federated/more").mkdir()
    (packed / "evals/federated/more/fpb.official.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    _remake(packed)


def base_without_samples(packed: Path) -> None:
    shutil.rmtree(packed / "evals/base")

    def withheld(result: Any) -> None:
        for s in result["arms"][0]["scores"]:
            kept = {key: s[key] for key in ("task", "mode", "metric", "n", "items_sha256")}
            s.clear()
            s.update(kept, score=None, withheld="out of time")

    _json(packed / "result.json", withheld)
    assert any("base model: fpb (likelihood): has no score: out of" in reason for reason in from_run(packed).unranked)
    _remake(packed)


def not_json(packed: Path) -> None:
    (packed / "entry.json").write_text("{")


ATTACKS = [
    (edited_score, "the samples give"),
    (impossible_score, "is not k/24 for any whole k"),
    (samples_judged_kindly, "samples are judged wrongly"),
    (texts_judged_kindly, "predicted is 'positive', it gives"),
    (locked_key, "entry.config: is"),
    (wrong_hash, "README.md: is not the file that was listed"),
    (missing_seed, "entry.seed: is None"),
    (too_few_bytes, "fedit on these layers takes at least"),
    (bytes_that_do_not_add_up, "the rounds add up to"),
    (hidden_losses, "lost replies in the rounds: 1"),
    (fewer_rounds, "has 1 rounds, the entry says 2"),
    (markup, "write plain text"),
    (pickle_inside, "never a pickle"),
    (link_outside, "is a link"),
    (giant, "at most 16,777,216 are taken"),
    (bomb, "line 1 has more than 8,388,608 bytes"),
    (empty_rows, "unpacks to more lines than the 1,212 items that the set has"),
    (wide_row, "line 1 has more than 8,388,608 bytes"),
    (large_entry, "entry.json: 17,"),
    (other_base, "was made for 'mistralai/Mistral-7B'"),
    (cut_adapter, "cut off"),
    (spoilt_adapter, "has NaN or infinity"),
    (extra_file, "notes.md: is present but not listed"),
    (other_items, "its samples are of other items"),
    (claimed_privacy, "the settings have no differential privacy"),
    (smaller_base, "entry.base_millions: is 1.0"),
    (turned_bits, "entry.answers: is"),
    (hidden_reason, "does not say that this makes it unranked"),
    (not_json, "entry.json"),
    (bits_by_a_value, "it has value, which no such sample has"),
    (no_adapter, "adapter_model.safetensors: is missing; fedit leaves an adapter"),
    (small_adapter, "has a layer of rank 1, the settings say 4"),
    (bytes_below_zero, "round 1: its bytes are no count"),
    (hidden_skip, "says 0, 1 rounds were skipped"),
    (client_twice, "round 1: a client is there twice"),
    (arm_elsewhere, "'elsewhere' is neither the base model"),
    (unpacked_log, "fpb.official.jsonl: is not packed"),
    (log_of_nothing, "more/fpb.official.jsonl.gz: belongs to no score, client or round"),
    (base_without_samples, "base/fpb (likelihood): has no samples"),
    (nobody_asked, "round 1: 0 clients answered; without 1 a round is skipped"),
    (one_asked, "[1, 2] clients were asked per round, the settings ask 2"),
    (no_round_counts, "in no round did the model change"),
    (nobody_answered, "round 1: 0 clients answered"),
    (uneven_shards, "are no equal shards"),
    (whole_weights, "base_model.model.lm_head.weight is no factor of an adapter"),
    (weights_beside, "adapter/model.safetensors: is no part of the adapter"),
    (factors_that_do_not_multiply, "they do not multiply"),
    (one_factor, "they do not multiply"),
    (large_rank, "has a layer of rank 64, the settings say 4"),
    (rank_of_another_config, "adapter_config.json: r is 8, model.layers.0"),
    (whole_numbers, "is I8, one of"),
    (other_names, "target_modules and the layers in the file are not the same: q_proj"),
    (other_scale, "lora_alpha is 800.0, the settings say"),
    (narrowed, "layers_to_transform is set; a run sets none"),
    (dora_without_magnitudes, "the settings say dora = false"),
    (other_size, "trainable_parameters: is 7, its layers have"),
]


@pytest.mark.parametrize(("attack", "said"), ATTACKS, ids=[a.__name__ for a, _ in ATTACKS])
def test_an_attack_is_refused_with_its_reason(copy: Path, attack: Callable[[Path], None], said: str) -> None:
    attack(copy / "seed-1")
    assert said in reasons(copy)
    done = CliRunner().invoke(app, ["validate", str(copy), "--json"])
    assert done.exit_code == 4
    assert any(r["problems"] for r in json.loads(done.output))
    assert not next(r["problems"] for r in json.loads(done.output) if r["run"] == "seed-2")


def test_all_logs_of_a_run_have_a_bound(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.board.log_size.MAX_LOGS", 1000)
    assert "seed-1: its logs unpack to more than 1,000 bytes in all" in reasons(good)


def test_two_logs_of_one_evaluation_are_never_both_read(copy: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"fpb\.official\.jsonl: stands beside fpb\.official\.jsonl\.gz"):
        second_log(copy / "seed-1")
    relist(copy / "seed-1")
    assert "fpb.official.jsonl: is not packed" in reasons(copy)


@pytest.mark.parametrize("name", ["fpb.official.jsonl", "fpb.official.jsonl.GZ", "fpb.official.json"])
def test_a_log_that_is_not_measured_is_never_read(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    log = copy / "seed-1/evals/federated/fpb.official.jsonl.gz"
    log.rename(log.with_name(name))
    relist(copy / "seed-1")
    shutil.rmtree(copy / "seed-2")
    for reader in (sets, samples):
        monkeypatch.setattr(reader, "read_text_file", lambda *_: pytest.fail("is read without having been measured"))
    assert name in reasons(copy)


@pytest.mark.parametrize("name", ["evals/desktop.ini", ".DS_Store", "__MACOSX/x", "adapter/._x"])
def test_a_link_by_the_name_of_what_a_file_manager_leaves_is_a_link(copy: Path, tmp_path: Path, name: str) -> None:
    """What it leads to is measured by nobody, and one of these names is that of an arm too."""
    link = copy / "seed-1" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    assert f"{name}: is a link; submit the file itself" in reasons(copy)
    link.unlink()
    link.write_text("left by a file manager")
    assert reasons(copy) == ""


def test_the_same_run_twice_is_found(copy: Path) -> None:
    shutil.copytree(copy / "seed-1", copy / "seed-9")
    assert "has the seed or the samples of" in reasons(copy)


def test_the_same_samples_packed_anew_are_found(copy: Path, tmp_path: Path) -> None:
    one, two = copy / "seed-1", copy / "seed-2"
    for path in (one / "evals").rglob("*.gz"):
        raw = gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7)
        (two / path.relative_to(one)).write_bytes(raw)
    arms = json.loads((one / "result.json").read_text())["arms"]
    _json(two / "result.json", lambda r: r.update(arms=arms))
    _remake(two)
    assert "has the seed or the samples of seed-1" in reasons(copy)
    write_entry(tmp_path / "store", from_run(one))
    assert duplicate(tmp_path / "store", from_run(two)) is not None


def test_a_base_model_on_a_part_of_the_set_has_no_rank(good: Path) -> None:
    entry = from_run(good / "seed-1")
    base, whole = (arm.model_copy(update={"name": name}) for arm, name in ((entry.arms[0], "base"), (entry.main, "x")))
    assert "base model: fpb (likelihood): 24 items, the whole set has" in " ".join(
        sets.reasons(good / "seed-1", "finance", [whole.model_copy(update={"scores": []}), base])
    )


def test_another_hash_of_the_items_does_not_keep_runs_from_being_paired(copy: Path) -> None:
    before = from_run(copy / "seed-1").answers
    _json(copy / "seed-1/result.json", lambda r: [s.update(items_sha256="0" * 64) for s in r["arms"][-1]["scores"]])
    assert from_run(copy / "seed-1").answers == before


def test_an_adapter_of_the_zoo_has_the_layers_of_its_base_model(good: Path) -> None:
    known = from_run(good / "seed-1").model_copy(update={"base": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    found = [str(p) for p in adapter_problems(good / "seed-1", known)]
    last = [path for path in spaces.of(known.settings).on_base(known) or {} if path.startswith("model.layers.29.")]
    assert last == ["model.layers.29.self_attn.q_proj", "model.layers.29.self_attn.v_proj"]
    assert any("layers are not the 60 that the settings adapt" in line for line in found)
    assert any("takes at least" in str(p) for p in byte_problems(good / "seed-1", known))


@pytest.mark.parametrize("method", ["rolora", "fedit"])
def test_a_method_that_alternates_may_have_sent_the_smaller_factor_more_often(good: Path, method: str) -> None:
    """Three rounds of q and v with grouped queries: B, A, B is less than three times the mean of both."""
    known = from_run(good / "seed-1").model_copy(update={"method": method})
    rank, rounds = known.settings.lora.r, [{"cohort": [0], "clients": [{}]}] * 3
    whole = 4 * rank * (4096 + 1024)
    up = 4 * rank * (1024 + 4096 + 1024) if method == "rolora" else 3 * whole
    for less, found in ((0, 0), (up * 0.9, 1)):
        costs = known.costs.model_copy(update={"bytes_up": int(up - less), "bytes_down": 3 * whole})
        entry = known.model_copy(update={"costs": costs})
        assert len(list(_too_few([(4096, 1024)], entry, rounds))) == found


@pytest.mark.parametrize("name", ["../outside.json", "/etc/evil.json", "a/../../b.json"])
def test_an_archive_that_leads_outside_is_not_unpacked(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, "{}")
    assert "leads outside the archive" in reasons(archive)
    assert not (tmp_path.parent / "outside.json").exists()
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    assert "is not a zip archive" in reasons(tmp_path / "no.zip")
    os.mkdir(tmp_path / "empty")
    assert "has no entry.json" in reasons(tmp_path / "empty")


def test_impossible_scores_of_five_hundred_questions() -> None:
    assert impossible(score(300, 500).model_copy(update={"score": 0.5994})) == "0.5994 is not k/500 for any whole k"
    assert impossible(score(300, 500)) == ""
    assert "between 0 and 1" in impossible(score(300, 500).model_copy(update={"score": 1.2}))


def test_a_good_submission_goes_into_the_store_and_onto_the_page(good: Path, copy: Path, tmp_path: Path) -> None:
    store = tmp_path / "results"
    done = CliRunner().invoke(app, ["board", "add", str(good), "--store", str(store)])
    assert done.exit_code == 0, done.output
    assert len(list(store.rglob("seed-*.json"))) == 2
    built = CliRunner().invoke(app, ["board", "build", str(store), "--out", str(tmp_path / "site")])
    assert "1 row of 2 entries" in built.output
    edited_score(copy / "seed-2")
    refused = CliRunner().invoke(app, ["board", "add", str(copy), "--store", str(tmp_path / "none")])
    assert refused.exit_code == 4
    assert not (tmp_path / "none").exists()


def test_the_first_rounds_are_run_again(good: Path, copy: Path, data_folder: Path) -> None:
    same = CliRunner().invoke(app, ["verify", str(good / "seed-1"), "--rounds", "2", "--data", str(data_folder)])
    assert same.exit_code == 0, same.output
    assert "2 rounds run again: the same" in same.output
    assert "round 1/2" in same.output
    lines = [json.loads(line) for line in (copy / "seed-1/rounds.jsonl").read_text().splitlines()]
    lines[0]["clients"][0]["loss"] *= 0.9
    (copy / "seed-1/rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    other = CliRunner().invoke(app, ["verify", str(copy / "seed-1"), "--rounds", "1", "--data", str(data_folder)])
    assert other.exit_code == 4
    assert "client 0 had loss" in other.output


def test_a_report_says_what_to_doubt(runs: list[Path]) -> None:
    done = CliRunner().invoke(app, ["report", str(runs[0])])
    assert done.exit_code == 0, done.output
    page = (runs[0] / "report.html").read_text()
    for part in ("What a reader should doubt", "not ranked", "<svg", "majority class", "bytes up, down", "One seed"):
        assert part in page, part
    assert "<script" not in page
    CliRunner().invoke(app, ["report", str(runs[0]), "--md"])
    assert (runs[0] / "report.md").read_text().startswith("# finance:")
