"""A model that is not wholly its checkpoint's is refused before anything is computed, and the cause is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fedtune.config.schema import ModelSettings
from fedtune.models.checks import check_complete
from fedtune.models.load import load
from fedtune.types import CorruptFileError, ModelError
from tests.architectures import causal_configs, tiny
from tests.tiny import make_folder

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def _rewrite(folder: Path, change: Change) -> Path:
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})
    return folder


def _config(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def _refused(folder: Path, match: str, **settings: Any) -> None:
    with pytest.raises(ModelError, match=match):
        load(ModelSettings(name=str(folder), **settings))


@pytest.mark.parametrize(
    ("prefix", "cause"),
    [
        ("foo.", r"begin with 'foo\.'$"),
        ("module.", "DataParallel"),
        ("_orig_mod.", "compiled model"),
        ("base_model.model.", "merge_and_unload"),
    ],
)
def test_the_checkpoint_of_a_wrapper_is_named_for_what_it_is(folder: Path, prefix: str, cause: str) -> None:
    _rewrite(folder, lambda t: {prefix + n: v for n, v in t.items()})
    _refused(folder, rf"would be random: .*(\n|.)*{cause}")


def test_a_model_saved_with_its_adapter_is_refused(folder: Path) -> None:
    def with_adapter(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        q = "model.layers.0.self_attn.q_proj."
        moved = {(q + "base_layer.weight" if n == q + "weight" else n): v for n, v in t.items()}
        return {**moved, q + "lora_A.default.weight": torch.ones(4, 32), q + "lora_B.default.weight": torch.ones(32, 4)}

    _refused(_rewrite(folder, with_adapter), "q_proj.*merge_and_unload")


def test_one_missing_tensor_is_named_and_a_tied_head_is_not_missing(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    _refused(_rewrite(folder, lambda t: {n: v for n, v in t.items() if n != name}), f"lack 1 tensors.*{name}")


def test_a_head_that_is_not_tied_has_to_be_there(folder: Path) -> None:
    _refused(_config(folder, tie_word_embeddings=False), "lack 1 tensors.*lm_head.weight")


def test_other_shapes_are_named_with_both(folder: Path) -> None:
    _refused(_config(folder, intermediate_size=48), r"_proj\.weight is \(.*64.*\), expected \(.*48")


@pytest.mark.parametrize("extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_what_would_be_dropped_from_the_models_own_layers_is_refused(folder: Path, extra: str) -> None:
    _refused(_rewrite(folder, lambda t: {**t, extra: torch.ones(4)}), f"makes no use of: {extra}")


@pytest.mark.parametrize("extra", ["vision_tower.patch.weight", "v_head.summary.weight", "score.weight"])
def test_parts_that_are_no_language_model_are_left_out_and_said(
    folder: Path, extra: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(ModelSettings(name=str(_rewrite(folder, lambda t: {**t, extra: torch.ones(4)}))))
    assert extra in caplog.text


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt_neo", ("attn.attention.bias", "attn.attention.masked_bias")),
        ("gptj", ("attn.bias", "attn.masked_bias")),
        ("codegen", ("attn.causal_mask",)),
        ("gpt2", ("attn.bias", "attn.masked_bias")),
        ("gpt_bigcode", ("attn.bias",)),
    ],
)
def test_masks_that_a_checkpoint_keeps_are_no_weights(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    model = tiny(causal_configs()[kind])
    info = {"missing_keys": set(), "mismatched_keys": set()}
    check_complete("it", model, {**info, "unexpected_keys": {f"transformer.h.1.{name}" for name in names}})
    with pytest.raises(ModelError, match="bias2"):
        check_complete("it", model, {**info, "unexpected_keys": {"transformer.h.1.mlp.c_proj.bias2"}})


def test_names_of_very_many_parts_are_held_against_a_models() -> None:
    model = tiny(causal_configs()["gpt2"])
    info = {"missing_keys": set(), "mismatched_keys": set()}
    long = "part." * 200_000 + "weight"
    check_complete("it", model, {**info, "unexpected_keys": {long}})
    with pytest.raises(ModelError, match="makes no use of: transformer"):
        check_complete("it", model, {**info, "unexpected_keys": {f"transformer.h.1.{long}"}})
    whole = {**info, "missing_keys": {"a.weight", "b.a.weight"}, "unexpected_keys": {"module.a.weight"}}
    with pytest.raises(ModelError, match=r"begin with 'module\.': a DataParallel wrapper"):
        check_complete("it", model, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        t["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return t

    kind = str(dtype).removeprefix("torch.")
    _refused(_rewrite(folder, spoil), "model.layers.1.mlp.up_proj.weight has NaN or infinity", dtype=kind)


def test_a_missing_shard_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="40KB")
    assert load(ModelSettings(name=str(folder)))
    last = max(folder.glob("*.safetensors"))
    last.unlink()
    _refused(folder, f"{last.name} is named in .* and is not there")


def test_a_tokenizer_larger_than_the_model_is_refused_and_one_more_pad_is_not(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    size = len(tokenizer)
    small = make_folder(folder.with_name("small"), vocab_size=size - 1)
    tokenizer.save_pretrained(small)
    assert load(ModelSettings(name=str(small))).tokenizer.pad_token_id == size - 1
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(small)
    _refused(small, rf"1 tokens beyond the model's {size - 1} .*'<\|extra\|>' is number {size}")


@pytest.mark.parametrize(
    ("token", "loads"), [("<image_soft_token>", True), ("<|im_start|>", False), ("<turn>", False), ("<eos>", False)]
)
def test_a_special_token_without_a_row_is_let_be_where_no_prompt_has_it(folder: Path, token: str, loads: bool) -> None:
    """As Gemma 3 has one for images beyond the rows of its small models; a text with it is refused and no other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if token == "<|im_start|>":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
        )
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    if token == "<eos>":
        tokenizer.eos_token = token
    tokenizer.chat_template = "<turn>{{ messages }}"
    small = make_folder(folder.with_name("small"), vocab_size=size)
    tokenizer.save_pretrained(small)
    if not loads:
        _refused(small, rf"1 tokens beyond the model's {size} .*is number {size}")
        return
    base = load(ModelSettings(name=str(small)))
    ids = torch.tensor([base.tokenizer(f"What is this {token}?")["input_ids"]])
    with pytest.raises(ValueError, match=rf"token {size}, for which the model has none of its {size} rows"):
        base.model(input_ids=ids)
    assert base.model(input_ids=ids.clamp(max=size - 1)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_settings_that_are_not_json_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(CorruptFileError, match=f"{name}: line 1"):
        load(ModelSettings(name=str(folder)))


def test_an_infinity_in_the_settings_is_no_damage(folder: Path) -> None:
    assert load(ModelSettings(name=str(_config(folder, time_step_limit=[0.0, float("inf")]))))


@pytest.mark.parametrize("depth", [300, 100_000])
def test_settings_nested_deep_are_searched_or_refused(folder: Path, depth: int) -> None:
    (folder / "x_config.json").write_text("[" * depth + '{"auto_map": 1}' + "]" * depth)
    with pytest.raises((ModelError, CorruptFileError), match=r"x_config\.json"):
        load(ModelSettings(name=str(folder)))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    _refused(folder, "its weight_map is not an object of file names")


def test_a_folder_without_tokenizer_says_so(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    _refused(folder, "no tokenizer; add the model's own")


def test_an_adapter_is_no_base_model(folder: Path) -> None:
    """Transformers would put the adapter on the model, or load another base model, without a word."""
    (folder / "adapter_config.json").write_text("{}")
    _refused(folder, "is an adapter and no base model: fedtune eval")


@pytest.mark.parametrize("asked", [0, 8])
def test_a_quantised_folder_is_what_the_settings_say_or_refused(folder: Path, asked: int) -> None:
    _config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    _refused(
        folder, f"stored in 4 bits and model.quantization is {asked}; set model.quantization=4", quantization=asked
    )


def test_another_way_of_quantising_is_refused_by_name(folder: Path) -> None:
    _config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(folder, "quantised by gptq, which is not supported")


def test_a_folder_stored_in_4_bits_loads_as_such(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = make_folder(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    first = load(ModelSettings(name=str(plain), quantization=4))
    stored = tmp_path / "stored"
    first.model.save_pretrained(stored)
    first.tokenizer.save_pretrained(stored)
    again = load(ModelSettings(name=str(stored), quantization=4))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(first.model(input_ids=ids).logits, again.model(input_ids=ids).logits, atol=1e-4)
