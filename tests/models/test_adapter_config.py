"""Each field of PEFT's LoraConfig either acts as it does in PEFT or is refused by name: none is passed over."""

import dataclasses
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.config.schema import ModelSettings
from fedtune.experiment.aggregate import build
from fedtune.experiment.clients import read_clients
from fedtune.models import trained
from fedtune.models.adapter import shapes_as
from fedtune.models.adapter_config import KNOWN, read_config
from fedtune.models.load import LoadedModel, load
from fedtune.models.patterns import Pattern, malformed, try_patterns
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.models.trained import load_folder
from fedtune.types import AdapterError, CorruptFileError, FedtuneError, ProblemsError
from tests.tiny import make_folder

IDS = torch.tensor([[5, 6, 7, 8, 9, 300]])

# what acts as in PEFT: settings that an adapter is made with
APPLIED: dict[str, list[dict[str, Any]]] = {
    "r": [{"r": 2}],
    "lora_alpha": [{"lora_alpha": 3}],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "target_modules": [
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["layers.0.self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    "exclude_modules": [{"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"exclude_modules": r".*\.0\..*v_proj"}],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "layers_pattern": [{"layers_pattern": "layers", "layers_to_transform": [1]}],
    "rank_pattern": [{"rank_pattern": {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}}],
    "alpha_pattern": [{"alpha_pattern": {"v_proj": 64, "^model.layers.1.self_attn.q_proj": 0.5}}],
    "use_rslora": [{"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}],
    "use_dora": [{"use_dora": True}, {"use_dora": True, "alpha_pattern": {"v_proj": 64}}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "init_lora_weights": [{"init_lora_weights": i} for i in (False, "gaussian", "orthogonal")],
    "task_type": [{"task_type": None}, {"task_type": "CAUSAL_LM"}],
    "bias": [{"bias": "none"}],
}
# what changes nothing: written into the file of a plain adapter
DESCRIBES: dict[str, Any] = {
    "peft_type": "lora",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "99.0",
    "base_model_name_or_path": "/elsewhere/tiny-llama",
    "revision": "main",
    "inference_mode": False,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_core": "other.core",
    "qalora_group_size": 32,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 1.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
}
REFUSED: dict[str, list[Any]] = {
    "peft_type": ["LOHA", "ADALORA", None, 3],
    "task_type": ["SEQ_CLS", "SEQ_2_SEQ_LM"],
    "bias": ["all", "lora_only", None],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "a later one", 3],
    "modules_to_save": [["lm_head"], ["embed_tokens", "lm_head"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "ensure_weight_tying": [True],
    "lora_bias": [True],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
    "velora_config": [{"num_groups": 8}],
    "monteclora_config": [{"num_samples": 8}],
    "alora_invocation_tokens": [[1, 2]],
    "a_field_of_a_later_release": [True, "x", [1], {"a": 1}],
}


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> LoadedModel:
    return load(ModelSettings(name=str(tiny_folder)))


def _made(model: Path, folder: Path, **fields: Any) -> Path:
    """Write a random adapter as PEFT does."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        torch.manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tiny_folder, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def _edited(folder: Path, **fields: Any) -> Path:
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**old, **fields}))
    return folder


def _peft(model: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).eval()
        logits: torch.Tensor = adapted(input_ids=IDS).logits
        return logits


def _own(model: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        adapted = load_folder(load(ModelSettings(name=str(model))), folder)
        logits: torch.Tensor = adapted.model.eval()(input_ids=IDS).logits
        return logits


def test_every_field_of_the_installed_peft_is_known_and_tried_here() -> None:
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields - KNOWN["LORA"] == set(), "a field of this PEFT has to be applied, or refused by name"
    assert fields <= {*APPLIED, *DESCRIBES, *REFUSED}


@pytest.mark.parametrize("fields", [f for cases in APPLIED.values() for f in cases], ids=str)
def test_what_is_applied_gives_pefts_own_logits(tiny_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = _made(tiny_folder, tmp_path / "adapter", **fields)
    assert torch.allclose(_own(tiny_folder, folder), _peft(tiny_folder, folder), atol=1e-5)


@pytest.mark.parametrize("field", DESCRIBES)
def test_what_only_describes_changes_nothing(tiny_folder: Path, folder: Path, field: str) -> None:
    plain = _own(tiny_folder, folder)
    assert torch.equal(_own(tiny_folder, _edited(folder, **{field: DESCRIBES[field]})), plain)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values], ids=str)
def test_what_is_not_applied_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    _edited(folder, **{field: value})
    said = "only adapters of" if field == "peft_type" else field
    with pytest.raises(AdapterError, match=said):
        read_config(folder)
    with pytest.raises(ProblemsError, match=said):
        read_clients([folder], build("fedit", {}), 1)


@pytest.mark.parametrize("off", [None, False, [], {}, ""])
def test_a_field_of_a_later_release_that_is_off_changes_nothing(folder: Path, off: Any) -> None:
    assert read_config(_edited(folder, a_later_field=off)).r == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None),
        ("r", "4"),
        ("r", 0),
        ("r", -1),
        ("r", 4.5),
        ("r", True),
        ("r", 10**12),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", [8]),
        ("lora_dropout", None),
        ("lora_dropout", 2),
        ("target_modules", 7),
        ("target_modules", [1, 2]),
        ("target_modules", "(q_proj"),
        ("target_modules", ["q_proj"] * 5000),
        ("target_modules", ["q_proj", "a." * 1000]),
        ("target_modules", "(q_proj|" * 5000),
        ("exclude_modules", {"a": 1}),
        ("exclude_modules", [str(i) for i in range(5000)]),
        ("rank_pattern", {str(i): 2 for i in range(5000)}),
        ("alpha_pattern", {"(a|" * 5000: 2}),
        ("layers_to_transform", "all"),
        ("rank_pattern", ["v_proj"]),
        ("rank_pattern", {"v_proj": 0}),
        ("rank_pattern", {"v_proj": "2"}),
        ("rank_pattern", {"[": 2}),
        ("rank_pattern", {"(?i)v_proj": 2}),
        ("layers_pattern", "(?P<idx>layers)"),
        ("alpha_pattern", {"v_proj": None}),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("base_model_name_or_path", ["a"]),
    ],
)
def test_a_malformed_field_is_named(folder: Path, field: str, value: Any) -> None:
    _edited(folder, **{field: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field}: "):
        read_config(folder)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_a_field_that_is_not_there_is_named(folder: Path, field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != field}))
    with pytest.raises(AdapterError, match="LORA" if field == "peft_type" else field):
        read_config(folder)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", '{"r": ' + "9" * 5000 + "}", '{"lora_alpha": NaN}'])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises((AdapterError, CorruptFileError), match=r"adapter_config\.json"):
        read_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab(*.", max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab(", max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(sorted(KNOWN["LORA"] | {"other"})), JSON, max_size=4))
def test_whatever_stands_in_the_file_is_read_or_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}))
    try:
        config = read_config(tmp_path)
    except FedtuneError:
        return
    assert (config.r, config.lora_alpha) == (fields.get("r", 4), fields.get("lora_alpha", 8))


def test_a_pattern_that_peft_refuses_is_an_error_of_the_folder(tiny_folder: Path, folder: Path) -> None:
    _edited(folder, target_modules="q_proj", layers_to_transform=[1])
    with pytest.raises(AdapterError, match=r"adapter: .*layers_to_transform"):
        load_folder(load(ModelSettings(name=str(tiny_folder))), folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(((.*)*)*)*!"},
        {"target_modules": "q_proj", "exclude_modules": r"([\w.]+)+!"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(.*.*.*.*.*.*.*.*)*!": 2}},
        {"target_modules": ["q_proj"], "layers_pattern": ["((.*)*)*!"], "layers_to_transform": [0]},
    ],
)
def test_a_pattern_that_would_take_for_ever_is_refused(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(trained, "try_patterns", partial(try_patterns, seconds=1.0))
    _edited(folder, **fields)
    with pytest.raises(AdapterError, match=r"adapter: its patterns cannot be applied to the names of \d+ layers"):
        load_folder(load(ModelSettings(name=str(tiny_folder))), folder)


def test_more_patterns_than_re_keeps_are_tried_although_each_is_a_name() -> None:
    names, patterns = [f"layers.{i}.q_proj" for i in range(100)], [Pattern("r", f"x{i}", f"x{i}$") for i in range(3000)]
    try_patterns(patterns[:500], names, seconds=0)
    with pytest.raises(AdapterError, match="cannot be applied to the names of 100 layers"):
        try_patterns(patterns, names, seconds=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4096, "target_modules": "all-linear"},
        {"rank_pattern": {"v_proj": 4096}},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        {"r": 4096, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True])
def test_settings_that_ask_for_more_than_the_file_has_are_refused_before_it_is_made(
    base: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], dora: bool
) -> None:
    monkeypatch.setattr(trained, "attach_as", lambda *_, **__: pytest.fail("an adapter was made"))
    before = [name for name, _ in base.model.named_modules()]
    with pytest.raises(AdapterError, match=r"this model needs|tensors missing|only linear layers"):
        load_folder(base, _edited(folder, use_dora=dora, **fields))
    assert [name for name, _ in base.model.named_modules()] == before


def test_shapes_take_no_memory(base: LoadedModel) -> None:
    shapes = shapes_as(base, LoraConfig(r=10**12, target_modules="all-linear", use_dora=True))
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (10**12, 32)
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] == (32,)


@pytest.mark.parametrize("target", ["embed_tokens", "norm"])
def test_a_target_that_is_no_linear_layer_is_named(tiny_folder: Path, folder: Path, target: str) -> None:
    _edited(folder, target_modules=[target, "q_proj"])
    with pytest.raises(AdapterError, match=f"{target}|RMSNorm"):
        load_folder(load(ModelSettings(name=str(tiny_folder))), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_numbers_is_refused_by_tensor(folder: Path, base: LoadedModel, value: float) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = value
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=f"{name} has NaN or infinity"):
        load_folder(base, folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_another_kind_are_refused_and_not_cast(folder: Path, base: LoadedModel, kind: torch.dtype) -> None:
    tensors = {n: t.to(kind) for n, t in safetensors.torch.load_file(folder / WEIGHTS).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="one of BF16, F16, F32, F64 is wanted"):
        load_folder(base, folder)


def test_embeddings_that_peft_wrote_along_have_to_be_the_base_models(tiny_folder: Path, tmp_path: Path) -> None:
    folder = _made(tiny_folder, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    along = [n for n in tensors if "lora_" not in n]
    assert along, "PEFT writes embeddings along with an adapted head"
    tensors[along[0]] = tensors[along[0]] + 0.01
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"of its own .*merge_and_unload"):
        load_folder(load(ModelSettings(name=str(tiny_folder))), folder)


def test_another_base_is_refused_unless_it_is_insisted_on(
    tiny_folder: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _edited(folder, base_model_name_or_path="unsloth/tiny-bnb-4bit")
    with pytest.raises(AdapterError, match="give --base to insist"):
        load_folder(load(ModelSettings(name=str(tiny_folder))), folder)
    assert load_folder(load(ModelSettings(name=str(tiny_folder))), folder, insist=True)
    assert "trained on 'unsloth/tiny-bnb-4bit'" in caplog.text


def test_another_revision_of_the_base_is_said(
    tiny_folder: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _edited(folder, revision="0" * 40)
    load_folder(load(ModelSettings(name=str(tiny_folder))), folder)
    assert "trained on 0000000000000000000, this base model is sha256:" in caplog.text


def test_a_target_of_a_convolutional_model_keeps_its_orientation(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = make_folder(tmp_path / "gpt2")
    torch.manual_seed(0)
    (model / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).save_pretrained(model)
    folder = _made(model, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert torch.allclose(_own(model, folder), _peft(model, folder), atol=1e-5)


def test_a_pattern_of_very_many_classes_is_refused_before_it_is_compiled() -> None:
    many = Pattern("target_modules", "x", "(?i:[!-\uffff])" * 5000)
    assert malformed([many]) == "target_modules: has 5,000 classes of letters, at most 500 are taken"
