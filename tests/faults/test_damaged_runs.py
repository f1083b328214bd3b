"""Files of every kind damaged at random: the reader ends well or with a named error, and writes nothing in between.

Training and evaluation files, generations and logs are in `test_damaged_data`, settings in `test_damaged_settings`,
submissions in `tests/board/test_damage`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune.board.entries import from_run
from fedtune.board.published import read as read_published
from fedtune.board.store import read_entry
from fedtune.cli.tables import paired
from fedtune.config import Settings
from fedtune.config.load import read_toml
from fedtune.config.schema import ModelSettings
from fedtune.data import packages
from fedtune.experiment.folder import open_run, unfinished
from fedtune.experiment.run import run
from fedtune.federation import checkpoint
from fedtune.io import write_json
from fedtune.lora.state import from_tensors
from fedtune.methods import ServerState
from fedtune.models.folder import FolderState, checked
from fedtune.models.load import load as load_model
from fedtune.settings import load
from fedtune.types import CorruptFileError, FedtuneError, OfflineError
from tests.faults.mutate import copies

Reader = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds with a curve."""
    wanted = settings(federation__rounds=2, federation__clients=2, eval__base=True, eval__every=1)
    return run(wanted, tmp_path_factory.mktemp("runs") / "run")[0]


def outcomes(path: Path, count: int, read: Reader, seed: int) -> dict[str, int]:
    """Read damaged copies of a file; return how many ended well and how many with a named error."""
    whole, ends = path.read_bytes(), {"well": 0, "refused": 0}
    for how, data in copies(whole, count, seed):
        path.write_bytes(data)
        try:
            read(path.parent)
            ends["well"] += 1
        except FedtuneError as err:
            ends["refused"] += 1
            said = str(err)
            assert path.name in said or str(path.parent) in said, f"{path.name}, {how}, seed {seed}: {said}"
        except Exception as err:
            raise AssertionError(f"{path.name}, {how}, seed {seed}: {type(err).__name__}: {err}") from err
        left = [p.name for p in path.parent.rglob("*.tmp")]
        assert not left, f"{path.name}, {how}: {left} is left behind"
    path.write_bytes(whole)
    return ends


def _copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def _continued(folder: Path) -> None:
    """Read all that a continued run reads before it works."""
    settings = load([read_toml(folder / "config.toml")])
    opened = open_run(folder, settings, {}, (), resume=True, force=True)
    start = from_tensors(safetensors.torch.load_file(folder / "adapter/adapter_model.safetensors"), 8.0)
    checkpoint.newest(folder, ServerState(start), opened.run_id)


def _looked_for(folder: Path) -> None:
    unfinished(folder.parent)


def _compared(folder: Path) -> None:
    run_folder = folder.parents[1] if folder.parent.name == "evals" else folder
    log = "fpb.likelihood.jsonl"
    paired(run_folder / "evals/base" / log, run_folder / "evals/federated" / log)


IN_A_RUN: dict[str, tuple[str, Reader]] = {
    "settings of a run": ("config.toml", from_run),
    "manifest": ("manifest.json", from_run),
    "manifest of a run to find": ("manifest.json", _looked_for),
    "result": ("result.json", from_run),
    "rounds": ("rounds.jsonl", from_run),
    "curve": ("curve.jsonl", from_run),
    "samples": ("evals/federated/fpb.likelihood.jsonl", lambda folder: from_run(folder.parents[1])),
    "samples to compare": ("evals/federated/fpb.likelihood.jsonl", _compared),
    "adapter's settings": ("adapter/adapter_config.json", checked),
    "adapter": ("adapter/adapter_model.safetensors", checked),
    "adapter by layers": ("adapter/adapter_model.safetensors", lambda folder: list(FolderState(folder).values())),
}
TO_CONTINUE = {
    "manifest": "manifest.json",
    "rounds": "rounds.jsonl",
    "timings": "timings.jsonl",
    "newest checkpoint": "checkpoints/round-000002/state.json",
    "newest state": "checkpoints/round-000002/state.safetensors",
}


def _in_a_run(finished: Path, scratch: Path, kind: str, count: int) -> None:
    name, read = IN_A_RUN[kind]
    ends = outcomes(_copied(finished, scratch / "run") / name, count, read, list(IN_A_RUN).index(kind))
    assert ends["refused"] > 0 or read is _looked_for


def _to_continue(finished: Path, scratch: Path, kind: str, count: int) -> None:
    """Damage a file of a run that is then opened anew; a damaged checkpoint is set aside, so each gets a fresh folder."""
    name = TO_CONTINUE[kind]
    whole = (finished / name).read_bytes()
    for number, (how, data) in enumerate(copies(whole, count, 100 + list(TO_CONTINUE).index(kind))):
        folder = _copied(finished, scratch / f"run-{number}")
        (folder / name).write_bytes(data)
        try:
            _continued(folder)
        except FedtuneError:
            pass
        except Exception as err:
            raise AssertionError(f"{name}, {how}, copy {number}: {type(err).__name__}: {err}") from err
        kept = [p.read_bytes() for p in folder.rglob(Path(name).name)]
        assert data in kept or name.endswith((".jsonl", "manifest.json")), f"{name}, {how}: is gone"


@pytest.mark.parametrize("kind", IN_A_RUN)
def test_a_damaged_file_of_a_run_is_named(finished: Path, tmp_path: Path, kind: str) -> None:
    _in_a_run(finished, tmp_path, kind, 40)


@pytest.mark.parametrize("kind", TO_CONTINUE)
def test_a_damaged_run_continues_or_is_refused_and_loses_nothing(finished: Path, tmp_path: Path, kind: str) -> None:
    _to_continue(finished, tmp_path, kind, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_A_RUN)
def test_much_damage_to_a_run(finished: Path, tmp_path: Path, kind: str) -> None:
    _in_a_run(finished, tmp_path, kind, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TO_CONTINUE)
def test_much_damage_to_a_run_that_is_continued(finished: Path, tmp_path: Path, kind: str) -> None:
    _to_continue(finished, tmp_path, kind, 500)


def _loaded(path: Path, count: int) -> None:
    """Damage a file of a model's folder that is then loaded."""
    ends = outcomes(path, count, lambda place: load_model(ModelSettings(name=str(place))), 400)
    assert ends["refused"] > 0


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    from tests.board.entries import entry

    path = tmp_path / "entry.json"
    path.write_text(json.dumps(entry(0).model_dump(mode="json")))
    assert outcomes(path, 100, lambda folder: read_entry(folder / "entry.json"), 200)["refused"] > 0


def test_a_damaged_index_of_published_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "made.jsonl").write_text(json.dumps({"gold": "neutral", "output": "neutral"}) + "\n")
    one = {"participant": "p", "domain": "finance", "task": "fpb", "model": "m", "generations_file": "made.jsonl"}
    index = [{**one, "references_file": None, "published_score": 1.0, "n": 1}]
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "facts.json").write_text(json.dumps({"p": {"commit": "c", "finance": {}}}))
    for seed, name in enumerate(("index.json", "facts.json")):
        assert outcomes(tmp_path / name, 60, lambda folder: list(read_published(folder)), 300 + seed)["refused"] > 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_folder_is_named(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    _loaded(_copied(tiny_folder, tmp_path / "model") / name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_much_damage_to_a_model_folder(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    _loaded(_copied(tiny_folder, tmp_path / "model") / name, 200)


def _no_network(package: packages.Package) -> str:
    raise OfflineError("no network")


def test_a_damaged_package_in_the_cache_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "_find_url", _no_network)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/rows.csv", "text\nx\n")
    whole = buffer.getvalue()
    package = packages.Package("a", "a-1.whl", sha256(whole).hexdigest(), "MIT")
    place = tmp_path / "packages" / package.filename
    place.parent.mkdir()
    place.write_bytes(whole)
    assert packages.read_wheel(package, "a/rows.csv") == b"text\nx\n"
    for _, data in copies(whole, 100, 600):
        place.write_bytes(data)
        with pytest.raises(FedtuneError):
            packages.read_wheel(package, "a/rows.csv")


def _tiny_gguf(path: Path) -> None:
    import gguf

    writer: Any = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_that_cannot_be_converted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.models import load as loading

    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    _tiny_gguf(tmp_path / "model.gguf")
    for _, data in copies((tmp_path / "model.gguf").read_bytes(), 15, 700):
        monkeypatch.setattr(loading, "read_wheel", lambda package, member, raw=data: raw)
        with pytest.raises(FedtuneError):
            loading.packaged_folder("packaged/smollm2-135m-instruct")
        assert not list((tmp_path / "cache/models").iterdir())


@pytest.mark.parametrize("seconds", [["x"], None, {"training": "x"}])
def test_times_that_are_no_numbers_are_refused_before_any_work(
    settings: Callable[..., Settings], tmp_path: Path, seconds: Any
) -> None:
    """They are added to when the work is done."""
    made, known = settings(), {"code": "0" * 64}
    folder = open_run(tmp_path / "run", made, known, (), resume=False, force=False)
    open_run(tmp_path / "run", made, known, (), resume=True, force=False).add_seconds("training", 1.0)
    write_json(folder.path / "manifest.json", {**folder.manifest, "seconds": seconds})
    with pytest.raises(CorruptFileError, match=r"manifest\.json: is not of its format"):
        open_run(tmp_path / "run", made, known, (), resume=True, force=False)
