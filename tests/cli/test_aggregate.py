"""`fedtune aggregate` on folders that stock PEFT wrote, against dense matrices."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.experiment.aggregate import Aggregated, aggregate, build, dense_update, write
from fedtune.methods import METHODS, ServerState
from fedtune.methods.traits import cuts
from fedtune.models.folder import FolderState
from fedtune.types import AdapterError, ConfigError, FedtuneError, ProblemsError
from tests.tiny import make_folder


def _folder(tiny: Path, out: Path, seed: int, **settings: Any) -> Path:
    """Let PEFT alone make and save an adapter with random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clients")
    return [_folder(tiny_folder, root / f"c{i}", i) for i in range(3)]


def _run(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["aggregate", *map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def _mean(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    states = [dict(FolderState(f)) for f in folders]
    return {p: sum(w / sum(weights) * s[p].delta() for w, s in zip(weights, states, strict=True)) for p in states[0]}  # type: ignore[misc]


def test_fedit_averages_the_factors_and_writes_what_peft_loads(
    folders: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    facts = _run("--method", "fedit", "--examples", "10,20,30", "--out", tmp_path / "out", "--clients", *folders)
    assert facts["weights"] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    states, made = [dict(FolderState(f)) for f in folders], dict(FolderState(tmp_path / "out"))
    for path, module in made.items():
        assert torch.allclose(
            module.a, sum(w * s[path].a for w, s in zip(facts["weights"], states, strict=True)), atol=1e-6
        )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.allclose(layer.get_delta_weight("default"), made["model.layers.0.self_attn.q_proj"].delta(), atol=1e-5)
    assert facts["relative_error"] > 0.1


def test_flexlora_takes_mixed_ranks_alphas_and_scales(tiny_folder: Path, tmp_path: Path) -> None:
    mixed = [
        _folder(tiny_folder, tmp_path / "a", 1, r=2, lora_alpha=4),
        _folder(tiny_folder, tmp_path / "b", 2, r=6, lora_alpha=6, use_rslora=True),
    ]
    ideal = _mean(mixed, [1.0, 3.0])
    dense = tmp_path / "effective.safetensors"
    words = ["--method", "flexlora", "--examples", "1,3", "--effective", dense, "--clients", *mixed]
    facts = _run("--out", tmp_path / "out", *words)
    assert facts["rank"] == 6
    effective = safetensors.torch.load_file(dense)
    assert set(effective) == set(ideal)
    for path, module in dict(FolderState(tmp_path / "out")).items():
        assert torch.allclose(effective[path], module.delta(), atol=1e-5)
        tail = torch.linalg.svdvals(ideal[path])[6:].norm()
        assert torch.allclose((effective[path] - ideal[path]).norm(), tail, atol=1e-4)
    whole = _run("--out", tmp_path / "whole", "--set", "rank=8", *words)
    assert (whole["rank"], whole["relative_error"]) == (8, pytest.approx(0, abs=1e-5))


def test_methods_with_a_frozen_factor_want_it_common(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match=r"lora_A.weight differs from the first folder's; ffa_lora keeps it frozen"):
        _run("--method", "ffa_lora", "--out", tmp_path / "out", "--clients", *folders)
    shared = []
    first = safetensors.torch.load_file(folders[0] / "adapter_model.safetensors")
    for i, folder in enumerate(folders):
        own = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        made = tmp_path / f"s{i}"
        made.mkdir()
        (made / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        mixed = {n: first[n] if "lora_A" in n else t for n, t in own.items()}
        safetensors.torch.save_file(mixed, made / "adapter_model.safetensors")
        shared.append(made)
    for method in ("ffa_lora", "rolora", "fedsvd"):
        facts = _run("--method", method, "--out", tmp_path / method, "--clients", *shared)
        assert facts["relative_error"] == pytest.approx(0, abs=1e-5), method


def test_all_reasons_against_bad_folders_are_listed(folders: list[Path], tiny_folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    (pickled / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ProblemsError) as caught:
        _run("--method", "fedit", "--out", tmp_path / "out", "--clients", folders[0], pickled, tmp_path / "absent")
    assert "is a pickle" in str(caught.value)
    assert f"{tmp_path / 'absent'}: no such folder" in str(caught.value)
    other = _folder(tiny_folder, tmp_path / "other", 1, target_modules=["q_proj"])
    small = _folder(tiny_folder, tmp_path / "small", 1, r=2)
    with pytest.raises(ProblemsError) as caught:
        _run("--method", "fedit", "--out", tmp_path / "out", "--clients", folders[0], other, small)
    assert "adapts other layers" in str(caught.value)
    assert "rank 2, the first has 4; mixed ranks: flora, flexlora" in str(caught.value)
    with pytest.raises(ProblemsError, match="adapts other layers"):
        _run("--method", "fedit", "--out", tmp_path / "out", "--global", other, "--clients", *folders)
    assert not (tmp_path / "out").exists()


def test_wrong_words_name_the_right_ones(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='did you mean "flexlora"'):
        _run("--method", "flexlra", "--out", tmp_path / "out", "--clients", *folders)
    with pytest.raises(ConfigError, match='lora_fair has no such setting; did you mean "ridge"'):
        _run("--method", "lora_fair", "--set", "rige=1", "--out", tmp_path / "out", "--clients", *folders)
    with pytest.raises(ConfigError, match="must be 3 whole numbers above 0"):
        _run("--method", "fedit", "--examples", "1,2", "--out", tmp_path / "out", "--clients", *folders)
    for wrong in ("round=abc", "round=0", "rank=1.5"):
        with pytest.raises(ConfigError, match=f"--set {wrong}: must be a whole number"):
            _run("--method", "flexlora", "--set", wrong, "--out", tmp_path / "out", "--clients", *folders)

    for method in ("fedit", "lora_fair", "flora", "fedmomentum", "fedask"):
        with pytest.raises(ConfigError, match=f"{method} does not cut its result to a rank; these do: .*flexlora"):
            _run("--method", method, "--set", "rank=2", "--out", tmp_path / "out", "--clients", *folders)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if cuts(kind)])
def test_a_rank_that_is_asked_for_is_the_results(method: str, folders: list[Path], tmp_path: Path) -> None:
    words = ["--method", method, "--set", "rank=2", "--out", tmp_path / "out", "--clients", *folders]
    assert _run(*words)["rank"] == 2
    assert {m.rank for m in dict(FolderState(tmp_path / "out")).values()} == {2}


def _dense(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "fedmomentum", "fedask"])
def test_exact_methods_write_one_adapter_that_peft_loads(
    folders: list[Path], tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """What goes into the base in a run is part of the folder here, in whatever rank that takes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = ["--examples", "1,2,3", "--effective", tmp_path / "dense.safetensors", "--clients", *folders]
    facts = _run("--method", method, "--out", tmp_path / "out", *words)
    ideal, dense = _mean(folders, [1.0, 2.0, 3.0]), _dense(tmp_path / "dense.safetensors")
    assert facts["relative_error"] < 1e-5
    assert facts["rank"] > 4
    assert all(torch.allclose(dense[p], ideal[p], atol=1e-5) for p in ideal)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out")
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    assert torch.allclose(layer.get_delta_weight("default"), ideal["model.layers.1.self_attn.v_proj"], atol=1e-5)


@pytest.mark.parametrize("method", ["flora", "rbla", "hetlora", "fedilora", "hlora", "florist", "fedmomentum"])
def test_mixed_ranks_from_the_command_line(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    mixed = [
        _folder(tiny_folder, tmp_path / "a", 1, r=2, lora_alpha=4),
        _folder(tiny_folder, tmp_path / "b", 2, r=6, lora_alpha=6, use_rslora=True),
    ]
    facts = _run("--method", method, "--examples", "1,3", "--out", tmp_path / "out", "--clients", *mixed)
    made = dict(FolderState(tmp_path / "out"))
    assert facts["rank"] == next(iter(made.values())).rank
    assert (facts["relative_error"] < 1e-5) is (method in ("flora", "fedmomentum"))


def test_scales_are_folded_into_b(folders: list[Path], tiny_folder: Path, tmp_path: Path) -> None:
    """Another alpha is another way to write the same update; the mean of factors takes it at its face value."""
    first = safetensors.torch.load_file(folders[0] / "adapter_model.safetensors")
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    halved = {n: t / 2 if "lora_B" in n else t for n, t in first.items()}
    safetensors.torch.save_file(halved, other / "adapter_model.safetensors")
    _run("--method", "fedit", "--out", tmp_path / "one", "--clients", folders[0], folders[1])
    _run("--method", "fedit", "--out", tmp_path / "two", "--clients", other, folders[1])
    one, two = dict(FolderState(tmp_path / "one")), dict(FolderState(tmp_path / "two"))
    assert all(torch.allclose(one[p].delta(), two[p].delta(), atol=1e-6) for p in one)


def test_personal_methods_write_a_folder_for_each_client(folders: list[Path], tmp_path: Path) -> None:
    facts = _run("--method", "fedsa_lora", "--out", tmp_path / "out", "--clients", *folders)
    assert facts["relative_error"] is None
    assert [Path(f).name for f in facts["adapters"]] == ["client-0", "client-1", "client-2"]
    states = [dict(FolderState(f)) for f in folders]
    shared = dict(FolderState(tmp_path / "out"))
    assert not any(m.b.any() for m in shared.values())
    for i, folder in enumerate(facts["adapters"]):
        made = dict(FolderState(Path(folder)))
        for path, module in made.items():
            assert torch.equal(module.b, states[i][path].b)
            assert torch.allclose(module.a, torch.stack([s[path].a for s in states]).mean(0), atol=1e-6)
    with pytest.raises(ConfigError, match="no single global model"):
        _run("--method", "fedalt", "--out", tmp_path / "no", "--effective", tmp_path / "x", "--clients", *folders)
    assert not (tmp_path / "no").exists()


def test_dora_adapters_with_their_base(tiny_folder: Path, tmp_path: Path) -> None:
    """FFA-DoRA on folders PEFT wrote: the dense weights it gives are the mean of the clients' dense weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    clients = [_folder(tiny_folder, tmp_path / f"d{i}", i, use_dora=True) for i in range(2)]
    first = safetensors.torch.load_file(clients[0] / "adapter_model.safetensors")
    second = safetensors.torch.load_file(clients[1] / "adapter_model.safetensors")
    stretched = {n: t * 1.3 if "magnitude" in n else first[n] if "lora_A" in n else t for n, t in second.items()}
    safetensors.torch.save_file(stretched, clients[1] / "adapter_model.safetensors")
    with pytest.raises(ProblemsError, match="needs its base model's weights; give --base MODEL"):
        _run("--method", "ffa_lora", "--out", tmp_path / "no", "--clients", *clients)
    words = ["--examples", "1,3", "--base", tiny_folder, "--effective", tmp_path / "dense.safetensors"]

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
        plain = model.merge_and_unload()
        return {n.removesuffix(".weight"): t.detach().clone() for n, t in plain.named_parameters() if "_proj" in n}

    base = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    one, two = weights(clients[0]), weights(clients[1])
    for method in ("ffa_lora", "flexlora", "fedsvd"):
        more = ["--set", "rank=8"] if method == "flexlora" else []
        _run("--method", method, "--out", tmp_path / method, *words, *more, "--clients", *clients)
        dense, merged = _dense(tmp_path / "dense.safetensors"), weights(tmp_path / method)
        for path, update in dense.items():
            ideal = 0.25 * one[path] + 0.75 * two[path]
            assert torch.allclose(merged[path], ideal, atol=1e-5), method
            assert torch.allclose(base[path + ".weight"] + update, ideal, atol=1e-5), method


def test_a_running_sum_holds_one_client_at_a_time(folders: list[Path]) -> None:
    """FedIT over folders reads layers when it needs them; nothing keeps what was read."""
    import weakref

    from fedtune.experiment.aggregate import aggregate, build

    alive: list[weakref.ref[Any]] = []
    most = 0

    class Counted(FolderState):
        def __getitem__(self, path: str) -> Any:
            nonlocal most
            module = super().__getitem__(path)
            alive.append(weakref.ref(module))
            most = max(most, sum(r() is not None for r in alive))
            return module

    counts = []
    for number in (3, 12):
        most = 0
        alive.clear()
        clients = [Counted(folders[i % 3]) for i in range(number)]
        aggregate(build("fedit", {}), clients, [1.0] * number)
        counts.append(most)
    layers = len(FolderState(folders[0]))
    assert counts[1] <= max(12 + 1, 2 * layers + 1) + layers
    assert counts[1] < 12 * layers


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_aggregates_folders_with_a_common_a(folders: list[Path], tmp_path: Path, method: str) -> None:
    """With one factor common even a mean of factors is exact, so every global model is the clients' mean."""
    first = safetensors.torch.load_file(folders[0] / "adapter_model.safetensors")
    shared = []
    for i, folder in enumerate(folders):
        own = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        made = tmp_path / f"s{i}"
        made.mkdir()
        (made / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        mixed = {n: first[n] if "lora_A" in n else t for n, t in own.items()}
        safetensors.torch.save_file(mixed, made / "adapter_model.safetensors")
        shared.append(made)
    facts = _run("--method", method, "--examples", "1,2,3", "--out", tmp_path / "out", "--clients", *shared)
    assert all((Path(f) / "adapter_model.safetensors").exists() for f in facts["adapters"])
    # weights by norm, or a layer repaired towards the start, are not the weights of the examples
    if METHODS[method].models != "own" and method not in ("hetlora", "fedilora"):
        assert facts["relative_error"] == pytest.approx(0, abs=1e-5)


def _named(folder: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return out


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"base_model_name_or_path": "tiny"}, {"base_model_name_or_path": "mistralai/Another-7B"}, "'tiny'"),
        ({"revision": "a" * 40}, {"revision": "b" * 40}, "at bbbbbbb"),
    ],
)
def test_adapters_of_two_base_models_are_refused_unless_it_is_insisted_on(
    folders: list[Path], tmp_path: Path, one: dict[str, str], two: dict[str, str], said: str
) -> None:
    clients = [_named(folders[0], tmp_path / "a", **one), _named(folders[1], tmp_path / "b", **two)]
    words = ["--method", "fedit", "--clients", clients[0], clients[1], "--out", tmp_path / "out"]
    with pytest.raises(ProblemsError, match=rf"b: was trained on (.|\n)*{said}(.|\n)*give --base MODEL"):
        _run(*words)
    assert not (tmp_path / "out").exists()
    _run(*words, "--base", "the/same")
    made = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == "the/same"


def test_the_global_adapter_has_to_stand_on_the_clients_base_too(folders: list[Path], tmp_path: Path) -> None:
    start = _named(folders[0], tmp_path / "start", base_model_name_or_path="mistralai/Another-7B")
    with pytest.raises(ProblemsError, match="Another-7B"):
        _run("--method", "fedit", "--clients", *folders[:2], "--global", start, "--out", tmp_path / "out")


def test_a_path_of_another_machine_is_the_same_base(folders: list[Path], tmp_path: Path) -> None:
    names = ("/home/a/tiny", "tiny", None)
    clients = [_named(folders[i], tmp_path / f"c{i}", base_model_name_or_path=n) for i, n in enumerate(names)]
    assert _run("--method", "fedit", "--clients", *clients, "--out", tmp_path / "out")["clients"] == 3


@pytest.mark.parametrize("way", ["same", "dots", "link", "global", "other"])
def test_nothing_that_is_there_is_overwritten(folders: list[Path], tmp_path: Path, way: str) -> None:
    clients = [Path(shutil.copytree(f, tmp_path / f"c{i}")) for i, f in enumerate(folders)]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "link").symlink_to(clients[1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    out = {
        "same": clients[0],
        "dots": tmp_path / "x/../c0",
        "link": tmp_path / "link",
        "global": clients[2],
        "other": tmp_path / "other",
    }
    words = ["--method", "fedit", "--clients", *clients[:2], "--global", clients[2], "--out", out[way]]
    with pytest.raises(ConfigError, match="exists, and nothing" if way == "other" else "is the input"):
        _run(*words)
    assert all(p.read_bytes() == data for p, data in before.items())
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_the_dense_update_is_not_written_into_a_client(folders: list[Path], tmp_path: Path) -> None:
    client = Path(shutil.copytree(folders[0], tmp_path / "c"))
    file = client / "adapter_model.safetensors"
    words = ["--method", "fedit", "--clients", client, folders[1], "--out", tmp_path / "out", "--effective", file]
    with pytest.raises(ConfigError, match="inside an input"):
        _run(*words)


def test_an_empty_folder_may_be_the_result(folders: list[Path], tmp_path: Path) -> None:
    assert _run("--method", "fedit", "--clients", *folders, "--out", tmp_path)["clients"] == 3


@pytest.mark.parametrize(
    ("change", "said"), [({"num_hidden_layers": 1}, "has no layer model.layers.1"), ({"hidden_size": 64}, "are of")]
)
def test_a_base_that_the_adapters_do_not_fit_is_named(
    tiny_folder: Path, tmp_path: Path, change: dict[str, int], said: str
) -> None:
    client = _folder(tiny_folder, tmp_path / "client", 0, use_dora=True)
    other = make_folder(tmp_path / "other", **change)
    with pytest.raises(AdapterError, match=said):
        _run("--method", "flexlora", "--clients", client, client, "--base", other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_client_is_said_to_be_alone_and_none_is_refused(folders: list[Path], tmp_path: Path) -> None:
    words = ["--method", "fedit", "--out", str(tmp_path / "out"), "--clients", str(folders[0])]
    done = CliRunner().invoke(app, ["aggregate", *words], catch_exceptions=False)
    assert "fedit: 1 adapter (nothing to average it with) of 4 layers" in done.output
    made, own = dict(FolderState(tmp_path / "out")), dict(FolderState(folders[0]))
    assert all(torch.allclose(made[path].delta(), own[path].delta()) for path in own)
    for clients, examples in ([], []), ([own], []), ([own], [0]):
        with pytest.raises(ConfigError, match=r"clients: [01] clients with examples"):
            aggregate(build("fedit", {}), clients, examples)


def _spoilt(
    folder: Path, out: Path, value: float | None = None, kind: torch.dtype | None = None, **fields: Any
) -> Path:
    """Copy an adapter with another value everywhere, another dtype, or other settings."""
    shutil.copytree(folder, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    tensors = safetensors.torch.load_file(out / "adapter_model.safetensors")
    tensors = {n: t if value is None else torch.full_like(t, value) for n, t in tensors.items()}
    safetensors.torch.save_file(
        {n: t.to(kind or t.dtype) for n, t in tensors.items()}, out / "adapter_model.safetensors"
    )
    return out


@pytest.mark.parametrize("method", ["fedit", "flexlora", "hlora"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [False, True])
def test_a_dtype_of_one_client_rounds_nobody_else(
    method: str, kind: torch.dtype, first: bool, folders: list[Path], tmp_path: Path
) -> None:
    """What all have is kept; where they differ, the result is what it would be of the same numbers in float32."""
    narrow = [_spoilt(f, tmp_path / f"narrow-{f.name}", kind=kind) for f in folders[:2]]
    wide = _spoilt(narrow[0], tmp_path / "wide", kind=torch.float32)

    def result(name: str, *clients: Path) -> dict[str, torch.Tensor]:
        _run("--method", method, "--out", tmp_path / name, "--clients", *(clients if first else clients[::-1]))
        return safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")

    mixed, all_wide = result("mixed", narrow[0], folders[1]), result("all-wide", wide, folders[1])
    assert all(torch.equal(mixed[n], t) and t.dtype == torch.float32 for n, t in all_wide.items())
    assert {t.dtype for t in result("all-narrow", *narrow).values()} == {kind}


@pytest.mark.parametrize("first", [False, True])
def test_layers_that_lie_the_other_way_round_are_refused(first: bool, folders: list[Path], tmp_path: Path) -> None:
    turned = _spoilt(folders[0], tmp_path / "turned", fan_in_fan_out=True)
    clients = [turned, *folders[1:]] if first else [*folders[1:], turned]
    with pytest.raises(ProblemsError, match=r"fan_in_fan_out = .*, the first folder says the other"):
        _run("--method", "flexlora", "--out", tmp_path / "out", "--clients", *clients)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "fields", "said"),
    [
        (3e38, {}, r"lora_A.weight: norm .*, at most 1e\+09"),
        (1e20, {}, r"lora_A.weight: norm .*, at most 1e\+09"),
        (1e5, {"lora_alpha": 1e6}, r"alpha and the factors of .*q_proj: norm .*, at most 1e\+09"),
        (None, {"lora_alpha": 1e308}, "lora_alpha: .*less than or equal to 1000000"),
        (None, {"lora_alpha": 1e-320}, "lora_alpha: .*greater than or equal to 0.000001"),
    ],
)
@pytest.mark.parametrize("method", ["fedit", "flexlora"])
@pytest.mark.parametrize("first", [False, True])
def test_absurd_numbers_are_refused_with_the_folder_they_are_in(
    method: str,
    first: bool,
    value: float | None,
    fields: dict[str, Any],
    said: str,
    folders: list[Path],
    tmp_path: Path,
) -> None:
    bad = _spoilt(folders[0], tmp_path / "bad", value, **fields)
    clients = [bad, *folders[1:]] if first else [*folders[1:], bad]
    with pytest.raises(ProblemsError, match=f"bad: .*{said}"):
        _run("--method", method, "--out", tmp_path / "out", "--clients", *clients)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", ["shared", "own", "dense"])
def test_what_is_not_finite_is_not_written(spoilt: str, folders: list[Path], tmp_path: Path) -> None:
    good = dict(FolderState(folders[0]))
    bad = {path: replace(module, b=module.b * torch.inf) for path, module in good.items()}
    made = Aggregated(ServerState(bad if spoilt != "own" else good, 1), [good, bad], (0.5, 0.5), 0.0)
    with pytest.raises(AdapterError, match="would have NaN or infinity; nothing is written"):
        dense_update(made) if spoilt == "dense" else write(made, folders[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("err", [torch.linalg.LinAlgError("did not\nconverge"), OverflowError("too large")])
def test_a_step_that_fails_on_numbers_is_an_error_of_the_adapters(
    err: Exception, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build("flexlora", {})
    monkeypatch.setattr(type(method), "server_step", Mock(side_effect=err))
    with pytest.raises(AdapterError, match=r"flexlora cannot aggregate these adapters' values: (did not conv|too lar)"):
        aggregate(method, [dict(FolderState(folders[0]))], [1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1e5, 1e-25, 0.0])
def test_numbers_within_the_bounds_give_numbers_or_a_named_error(
    method: str, value: float, folders: list[Path], tmp_path: Path
) -> None:
    bad = _spoilt(folders[0], tmp_path / "bad", value, lora_alpha=1e-3)
    words = ["aggregate", "--method", method, "--out", str(tmp_path / "out"), "--clients", str(bad), str(bad)]
    done = CliRunner().invoke(app, [*words, str(folders[1] if method in ("fedit", "flexlora") else bad)])
    if done.exception and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, FedtuneError), done.exception
        assert not (tmp_path / "out").exists()
    else:
        files = list((tmp_path / "out").rglob("*.safetensors"))
        assert files
        assert all(bool(torch.isfinite(t).all()) for f in files for t in safetensors.torch.load_file(f).values())


@pytest.mark.parametrize(
    "words", [("--examples", "1,1," + "9" * 400), ("-s", "round=" + "9" * 400), ("-s", "rank=99999")]
)
def test_counts_are_bounded(words: tuple[str, str], folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most|from . to") as caught:
        _run("--method", "flexlora", "--out", tmp_path / "out", "--clients", *folders, *words)
    assert len(str(caught.value)) < 400
