import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.data import packages
from fedtune.models import attention
from fedtune.models.adapter import attach
from fedtune.models.load import disarm_cpu_4bit, load, packaged_folder
from fedtune.models.source import check_folder
from fedtune.types import ModelError, OfflineError
from tests.tiny import make_folder


def test_a_folder_loads_frozen_in_float32_with_a_revision_of_its_own(tiny_folder: Path) -> None:
    loaded = load(ModelSettings(name=str(tiny_folder)))
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert loaded.revision.startswith("sha256:")
    assert load(ModelSettings(name=str(tiny_folder))).revision == loaded.revision


def test_other_weights_are_another_revision(tiny_folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", seed=1)
    assert load(ModelSettings(name=str(other))).revision != load(ModelSettings(name=str(tiny_folder))).revision


def test_pickles_and_remote_code_are_refused_with_the_way_out(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_folder(folder)
    config = json.loads((tiny_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code(.|\n)*safe_serialization"):
        load(ModelSettings(name=str(folder)))
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelError, match="auto_map"):
        load(ModelSettings(name=str(folder)))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "processor_config.json"])
def test_code_named_by_any_settings_is_never_run(
    tiny_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would ask on the terminal, and run the file after a yes."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / name).write_text(json.dumps({**old, **code}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import *\n")
    with pytest.raises(ModelError, match=f"{name} asks for remote code"):
        load(ModelSettings(name=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lay the tiny model into a cache as the commit `main` is at, and go offline; return the commit."""
    commit = "c" * 40
    shutil.copytree(tiny_folder, tmp_path / "models--some--model/snapshots" / commit)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return commit


@pytest.mark.parametrize("revision", ["", "main", "c" * 40])
def test_a_hub_model_is_recorded_by_its_commit_whatever_was_asked_for(hub: str, revision: str) -> None:
    assert load(ModelSettings(name="some/model", revision=revision)).revision == hub


def test_a_hub_model_is_told_to_run_no_code_with_and_without_a_revision(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked = []

    def watched(kind: Any) -> None:
        real = kind.from_pretrained

        def call(name: str, **options: Any) -> Any:
            asked.append((options["trust_remote_code"], options["revision"]))
            return real(name, **options)

        monkeypatch.setattr(kind, "from_pretrained", call)

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        watched(kind)
    load(ModelSettings(name="some/model"))
    assert {trust for trust, _ in asked} == {False}
    # whatever follows is of the commit that was found first
    assert asked[0] == (False, None)
    assert {revision for _, revision in asked[1:]} == {hub}


class Unpickled(Exception):
    """Something that must not be unpickled was."""


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Unpickled

    monkeypatch.setattr("torch.load", refuse)


def _weights_elsewhere(folder: Path, by: str, name: str) -> None:
    """Let a model's folder name another file as its weights, a pickle or not by its ending."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, folder / name, metadata={"format": "pt"})
    else:
        torch.save(weights, folder / name)
    if by == "index":
        (folder / "model.safetensors").rename(folder / "decoy.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return
    # by the configuration itself, by a part of it, or by another that it names
    config = json.loads((folder / "config.json").read_text())
    named = {"transformers_weights": name}
    other = {"whole": named, "part": {"text_config": named}, "other": {"configuration_files": ["config.4.0.json"]}}
    (folder / "config.json").write_text(json.dumps(config | other[by]))
    (folder / "config.4.0.json").write_text(json.dumps(config | named))


ELSEWHERE = [
    *(("index", n) for n in ("w.bin", "README.md", ".w.safetensors", "sub/w.safetensors", "../w.safetensors")),
    *((by, n) for by in ("whole", "part", "other") for n in ("adapter_model.bin", ".w.safetensors")),
    ("whole", "sub/w.safetensors"),
]


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("by", "name"), ELSEWHERE)
def test_weights_of_other_names_or_places_are_never_loaded(
    tiny_folder: Path, tmp_path: Path, by: str, name: str
) -> None:
    """They would be unpickled, or would be no part of what identifies the model."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    _weights_elsewhere(folder, by, name)
    with pytest.raises(ModelError, match=r"weight_map names|names other files to load"):
        load(ModelSettings(name=str(folder)))


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("by", "name"), [("index", "w.bin"), ("whole", "adapter_model.bin"), ("part", "w.bin")])
def test_a_hub_model_that_names_pickles_is_refused_before_one_is_loaded(
    hub: str, tmp_path: Path, by: str, name: str
) -> None:
    _weights_elsewhere(tmp_path / "models--some--model/snapshots" / hub, by, name)
    with pytest.raises(ModelError, match=r"weight_map names|names other files to load"):
        load(ModelSettings(name="some/model"))


def test_a_tokenizer_in_another_folder_is_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "sub").mkdir()
    (folder / "tokenizer.json").rename(folder / "sub/tokenizer.4.0.json")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["fast_tokenizer_files"] = ["sub/tokenizer.4.0.json"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="fast_tokenizer_files names other files to load"):
        load(ModelSettings(name=str(folder)))


def test_shards_in_the_folder_load_as_the_whole_does(tiny_folder: Path, tmp_path: Path) -> None:
    whole = load(ModelSettings(name=str(tiny_folder)))
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    whole.model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load(ModelSettings(name=str(folder)))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_call_that_could_fetch_code_forbids_it() -> None:
    """A call without `trust_remote_code` asks on the terminal; data sets with code are not loaded at all any more."""
    import ast

    import fedtune

    loose = []
    for path in Path(fedtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                given = {k.arg for k in node.keywords} | {getattr(k.value, "id", "") for k in node.keywords}
                if not given & {"trust_remote_code", "common"}:
                    loose.append(f"{path.name}:{node.lineno}")
    assert not loose


def test_a_truncated_weight_file_is_an_error_of_ours(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "cut"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="base model"):
        load(ModelSettings(name=str(folder)))


def test_a_hub_model_offline_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"HF_HUB_OFFLINE is set(.|\n)*copy HF_HOME"):
        load(ModelSettings(name="Qwen/Qwen2.5-0.5B"))


def test_bfloat16_when_asked(tiny_folder: Path) -> None:
    loaded = load(ModelSettings(name=str(tiny_folder), dtype="bfloat16"))
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    adapted = attach(loaded, LoraSettings(r=2), 0)
    assert all(p.dtype == torch.float32 for p in adapted.slots.values())


def _quantised(folder: Path, bits: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return load(ModelSettings(name=str(folder), quantization=bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_still_learns_after_an_evaluation(tmp_path: Path, bits: int) -> None:
    """On some CPUs a 4-bit layer turns inference-only in its first evaluation; then every gradient is 0."""
    folder = make_folder(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    loaded = _quantised(folder, bits)
    adapted = attach(loaded, LoraSettings(r=4), 0)
    texts, keep = [[5, 6, 7, 8], [9, 10, 11]], [0, 1, 2, 4, 5]
    adapted.model.eval()
    with torch.inference_mode():
        attention.packed_logits(adapted.model, texts, keep)
    adapted.model.train()
    attention.packed_logits(adapted.model, texts, keep).float().square().sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in adapted.slots.values() if p.grad is not None) > 0


def test_the_trap_is_disarmed_in_every_4bit_layer(tmp_path: Path) -> None:
    loaded = _quantised(make_folder(tmp_path / "wide", hidden_size=128, intermediate_size=256), 4)
    count = disarm_cpu_4bit(loaded.model)
    assert count == 14
    layers = [m for m in loaded.model.modules() if type(m).__name__ == "Linear4bit"]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_without_bitsandbytes_the_remedy_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'fedtune\[quantization\]'"):
        load(ModelSettings(name=str(tiny_folder), quantization=4))


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 6}),
        ("Gemma2", {"sliding_window": 6}),
        ("Gemma3", {"sliding_window": 6}),
        ("Phi3", {"pad_token_id": 0}),
    ],
)
def test_the_packed_pass_is_the_plain_one_on_every_architecture(kind: str, extra: dict[str, Any]) -> None:
    import transformers

    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**SHAPE, **HEADS, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    prefix = list(range(10, 22))
    texts = [[*prefix, 30 + i, 40, 50 + i, 7][: 14 + i % 3] for i in range(4)]
    keep = list(range(sum(map(len, texts))))
    with torch.no_grad():
        plain = torch.cat([model(input_ids=torch.tensor([t])).logits[0] for t in texts])
        for share in (False, True):
            assert torch.allclose(attention.packed_logits(model, texts, keep, share_prefix=share), plain, atol=2e-5)


@pytest.mark.packaged
def test_the_packaged_model_is_converted_exactly_and_once(packaged: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    from fedtune.models.load import packaged_folder

    packaged(packages.SMOLLM2)
    folder = packaged_folder("packaged/smollm2-135m-instruct")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert packaged_folder("packaged/smollm2-135m-instruct") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not getattr(model, "is_quantized", False)
    loaded = load(ModelSettings())
    text = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert loaded.tokenizer.decode(int(loaded.model(**text).logits[0, -1].argmax())).strip() == "Paris"


def test_runs_that_start_together_convert_a_packaged_model_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    converted: list[int] = []
    begun = threading.Event()

    def slow(raw: bytes, target: Path) -> None:
        converted.append(len(raw))
        begun.wait(0.5)
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")

    def second() -> Path:
        begun.set()
        return packaged_folder(name)

    name = "packaged/smollm2-135m-instruct"
    monkeypatch.setattr("fedtune.models.load.read_wheel", lambda package, member: b"raw")
    monkeypatch.setattr("fedtune.models.load._convert_gguf", slow)
    with ThreadPoolExecutor(3) as pool:
        found = [
            future.result() for future in (pool.submit(packaged_folder, name), pool.submit(second), pool.submit(second))
        ]
    assert len(set(found)) == 1
    assert converted == [3]


def test_a_full_disk_under_a_conversion_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def full(raw: bytes, target: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("fedtune.models.load.read_wheel", lambda package, member: b"raw")
    monkeypatch.setattr("fedtune.models.load._convert_gguf", full)
    with pytest.raises(ModelError, match=r"cannot be written: .*No space left on device.*FEDTUNE_CACHE"):
        packaged_folder("packaged/smollm2-135m-instruct")


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "part", "table"])
def test_an_implementation_that_is_code_of_a_repository_is_refused(
    tiny_folder: Path, tmp_path: Path, where: str
) -> None:
    folder, kernel = Path(shutil.copytree(tiny_folder, tmp_path / "model")), "kernels-community/attention@abc"
    config = json.loads((folder / "config.json").read_text())
    named = {
        "part": {"text_config": {"attn_implementation": kernel}},
        "table": {"attn_implementation": {"text_config": kernel}},
    }
    (folder / "config.json").write_text(json.dumps(config | named.get(where, {where: kernel})))
    with pytest.raises(ModelError, match="code of a repository and never run"):
        load(ModelSettings(name=str(folder)))
