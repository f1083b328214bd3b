"""`fedtune aggregate` on folders of IA3's vectors and of whole models: the weighted mean, tensor by tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune.experiment.by_tensor import ByTensor
from fedtune.models.folder import FileTensors
from fedtune.types import ConfigError, FedtuneError, ProblemsError
from tests.cli.test_aggregate import _folder, _run
from tests.tiny import make_folder

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"


def _ia3(tiny: Path, out: Path, seed: int, **settings: Any) -> Path:
    """Let PEFT alone make and save vectors, and put random numbers into them."""
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    usual = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), IA3Config(**{**usual, **settings}))
    model.save_pretrained(out)
    torch.manual_seed(seed)
    return _changed(out, {n: torch.rand_like(t) + 0.5 for n, t in _read(out).items()})


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in safetensors.torch.load_file(file).items()}


def _changed(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _told(folder: Path, file: str = CONFIG, **fields: Any) -> Path:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
    return folder


@pytest.fixture(scope="module")
def vectors(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("ia3")
    return [_ia3(tiny_folder, root / f"c{i}", i) for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models in bfloat16; the first is in several files, the others in one."""
    from tests.tiny import make_model, make_tokenizer

    root = tmp_path_factory.mktemp("models")
    for i in range(3):
        make_model(i).bfloat16().save_pretrained(root / f"m{i}", **({"max_shard_size": "20KB"} if i == 0 else {}))
        make_tokenizer().save_pretrained(root / f"m{i}")
    return [root / f"m{i}" for i in range(3)]


def _mean(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    states = [_read(f) for f in folders]
    sums = {n: sum(w * s[n].double() for w, s in zip(weights, states, strict=True)) for n in states[0]}
    return {n: (total / sum(weights)).to(states[0][n].dtype) for n, total in sums.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["fedit", "fedkseed"])
def test_vectors_are_averaged_and_peft_computes_with_the_mean(
    method: str, vectors: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "below" / "out"
    facts = _run("--method", method, "--examples", "10,20,30", "--out", out, "--clients", *vectors)
    assert (facts["tensors"], facts["modules"], facts["rank"], facts["relative_error"]) == (4, None, None, None)
    wanted = _mean(vectors, [10, 20, 30])
    assert all(torch.equal(t, wanted[n]) for n, t in (wanted | _read(out)).items())
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    for path, tensor in wanted.items():
        name = path.removeprefix("base_model.model.").removesuffix(".ia3_l") + ".weight"
        assert torch.allclose(merged[name], before[name] * tensor)


def test_the_mean_is_evaluated(vectors: list[Path], models: list[Path], data_folder: Path, tmp_path: Path) -> None:
    import fedtune

    for name, clients in (("vectors", vectors), ("models", models)):
        fedtune.aggregate("fedit", clients[:2], tmp_path / name)
        data = {"source": "folder", "path": str(data_folder)}
        chosen: dict[str, Any] = {"data": data, "eval": {"limit": 2, "tasks": ["fpb"], "modes": ["likelihood"]}}
        [score] = fedtune.evaluate(tmp_path / name, "finance", out=tmp_path / f"{name}-evals", **chosen)
        assert score.n == 2


def _other(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def test_folders_that_are_not_alike_are_refused_by_name(vectors: list[Path], tiny_folder: Path, tmp_path: Path) -> None:
    def spoilt(name: str, change: Any) -> Path:
        folder = _other(vectors[1], tmp_path / name)
        return _changed(folder, {n: change(t) for n, t in _read(folder).items()})

    bad = {
        "has other tensors than the first": _ia3(tiny_folder, tmp_path / "layers", 1, target_modules=["down_proj"]),
        "feedforward_modules is": _told(_other(vectors[1], tmp_path / "named"), feedforward_modules="x|.*down_proj"),
        "target_modules is": _told(_other(vectors[1], tmp_path / "more"), target_modules=["q_proj", "down_proj", "k"]),
        "has NaN or infinity": spoilt("nan", lambda t: t * torch.nan),
        r"norm .*, at most 1e\+09": spoilt("large", lambda t: t * 1e12),
        "has the dtype F16, the first has F32": spoilt("half", lambda t: t.half()),
        "is I64; one of": spoilt("whole", lambda t: t.long()),
        r"not \[out, 1\], as it is not in feedforward_modules": _told(
            _other(vectors[1], tmp_path / "none"), feedforward_modules=[]
        ),
        "has no vector": _changed(_other(vectors[1], tmp_path / "bare"), {}),
        "the vector is of shape": spoilt("flat", lambda t: t.flatten()),
        "target_modules names no layer": _told(_other(vectors[1], tmp_path / "fewer"), target_modules=["down_proj"]),
        "cannot be applied to the names": _told(
            _other(vectors[1], tmp_path / "slow"), feedforward_modules="(([a-z._0-9]+)+)+!"
        ),
        'is of peft.kind = "lora", the first of "ia3"': _folder(tiny_folder, tmp_path / "lora", 1),
        'is of peft.kind = "full", the first of "ia3"': tiny_folder,
        "q_proj.ia3_l has the shape": _told(
            _ia3(make_folder(tmp_path / "wide", hidden_size=64), tmp_path / "wider", 1), base_model_name_or_path=None
        ),
    }
    for said, folder in bad.items():
        with pytest.raises(ProblemsError, match=said) as caught:
            _run("--method", "fedit", "--out", tmp_path / "out", "--clients", vectors[0], folder)
        assert str(folder) in str(caught.value)
    named = _told(_other(vectors[1], tmp_path / "no-vector"))
    _changed(named, {n + "x": t for n, t in _read(named).items()})
    with pytest.raises(ProblemsError, match="is no vector of an adapter"):
        _run("--method", "fedit", "--out", tmp_path / "out", "--clients", named)
    assert not (tmp_path / "out").exists()


def test_what_is_not_defined_for_tensors_is_refused_with_what_is(
    vectors: list[Path], models: list[Path], tmp_path: Path
) -> None:
    for kind, clients in (("ia3", vectors), ("full", models)):
        said = f'--method flora: flora is not defined with peft.kind = "{kind}"; these are: fedit, fedkseed'
        with pytest.raises(ProblemsError, match=said):
            _run("--method", "flora", "--out", tmp_path / "out", "--clients", *clients)
        words = ["--method", "fedit", "--out", tmp_path / "out", "--effective", tmp_path / "dense", "--clients"]
        with pytest.raises(ConfigError, match="--effective: there are no factors"):
            _run(*words, *clients)
    with pytest.raises(ProblemsError, match=r'--base: with peft.kind = "full" there is none'):
        _run("--method", "fedit", "--base", "x/y", "--out", tmp_path / "out", "--clients", *models)
    assert list(tmp_path.iterdir()) == []


def test_the_base_model_is_named_anew(vectors: list[Path], tmp_path: Path) -> None:
    other = _told(_other(vectors[1], tmp_path / "other"), base_model_name_or_path="an/other")
    words = ["--method", "fedit", "--out", tmp_path / "out", "--clients", vectors[0], other]
    with pytest.raises(ProblemsError, match="was trained on 'an/other'"):
        _run(*words)
    _run(*words, "--base", "the/same")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "the/same"


def test_models_in_any_number_of_files_are_averaged_in_their_dtype(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _run("--method", "fedit", "--examples", "1,2,5", "--out", tmp_path / "out", "--clients", *models)
    wanted, made = _mean(models, [1, 2, 5]), _read(tmp_path / "out")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    assert all(torch.equal(t, wanted[n]) for n, t in (wanted | made).items())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in models[0].iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in wanted.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids


def test_models_that_are_not_alike_or_not_whole_are_refused(models: list[Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    linked = _other(models[1], tmp_path / "linked")
    (linked / "generation_config.json").unlink()
    (linked / "generation_config.json").symlink_to(secret)
    code = _told(_other(models[1], tmp_path / "code"), "config.json", auto_map={"AutoModel": "x.y"})
    index = json.loads((models[0] / INDEX).read_text())["weight_map"]
    lost = _told(_other(models[0], tmp_path / "lost"), INDEX, weight_map={**index, "more": next(iter(index.values()))})
    spoilt = _other(models[1], tmp_path / "nan")
    tensors = {n: t * torch.inf for n, t in _read(spoilt).items()}
    safetensors.torch.save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    bad = {
        "a link that leads outside": linked,
        "asks for remote code": code,
        "does not name the tensors that its files have": lost,
        "has NaN or infinity": spoilt,
        "rms_norm_eps is 0.5, the first has": _told(
            _other(models[1], tmp_path / "eps"), "config.json", rms_norm_eps=0.5
        ),
        "has other tensors than the first": make_folder(tmp_path / "deep", num_hidden_layers=3),
        "has the dtype F32, the first has BF16": make_folder(tmp_path / "float32"),
        "no tokenizer": _without(_other(models[1], tmp_path / "bare"), "tokenizer*"),
        "no safetensors weights": _without(_other(models[1], tmp_path / "empty"), "*.safetensors"),
    }
    for said, folder in bad.items():
        with pytest.raises(ProblemsError, match=said) as caught:
            _run("--method", "fedit", "--out", tmp_path / "out", "--clients", models[0], folder)
        assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


def _without(folder: Path, files: str) -> Path:
    for path in folder.glob(files):
        path.unlink()
    return folder


def test_one_tensor_of_one_client_is_read_at_a_time(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most, read = 0, FileTensors.__getitem__

    def counted(self: FileTensors, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(FileTensors, "__getitem__", counted)
    _run("--method", "fedit", "--out", tmp_path / "out", "--clients", *models, *models[1:], *models[1:])
    gc.collect()
    assert len(alive) > 100
    assert most <= 3


def test_a_write_that_fails_leaves_nothing(
    vectors: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method", "fedit", "--out", tmp_path / "out", "--clients", *vectors]
    made = ByTensor.__getitem__
    monkeypatch.setattr(ByTensor, "__getitem__", lambda self, name: made(self, name) * torch.inf)
    with pytest.raises(FedtuneError, match="would have NaN or infinity; nothing is written"):
        _run(*words)
    assert list(tmp_path.iterdir()) == []
