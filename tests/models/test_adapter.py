import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.config import Settings
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.lora.state import to_tensors
from fedtune.models import budget
from fedtune.models.adapter import AdaptedModel, attach, save
from fedtune.models.folder import checked
from fedtune.models.load import load
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.models.trained import load_folder
from fedtune.types import AdapterError, CorruptFileError, ModelError
from tests.tiny import make_folder


def _attach(folder: Path, seed: int = 1, **lora: object) -> AdaptedModel:
    return attach(
        load(ModelSettings(name=str(folder))), LoraSettings.model_validate({"r": 4, "alpha": 8.0, **lora}), seed
    )


def _random(adapted: AdaptedModel) -> None:
    torch.manual_seed(5)
    for slot in adapted.slots.values():
        torch.nn.init.normal_(slot, mean=1.0 if slot.dim() == 1 else 0.0, std=0.2)


@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ("all-linear",)}])
def test_a_saved_adapter_loads_with_peft_alone(tiny_folder: Path, tmp_path: Path, lora: dict[str, object]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = _attach(tiny_folder, **lora)
    _random(adapted)
    state = adapted.state()
    save(adapted, state, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted.model.eval()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, adapted.model(input_ids=ids).logits, atol=1e-5)
    again = load_folder(load(ModelSettings(name=str(tiny_folder))), tmp_path / "adapter")
    assert all(torch.equal(t, to_tensors(state)[n]) for n, t in to_tensors(again.state()).items())


def test_the_delta_is_what_peft_adds_to_the_weight(tiny_folder: Path) -> None:
    adapted = _attach(tiny_folder, rslora=True, alpha=3.0)
    _random(adapted)
    for path, module in adapted.state().items():
        layer = adapted.model.get_base_model().get_submodule(path)
        assert torch.allclose(module.delta(), layer.get_delta_weight("default"), atol=1e-5)


def test_the_same_seed_gives_the_same_adapter(tiny_folder: Path) -> None:
    one, two, other = (to_tensors(_attach(tiny_folder, seed).state()) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_an_adapter_for_other_shapes_is_refused_with_both(tiny_folder: Path, tmp_path: Path) -> None:
    adapted = _attach(tiny_folder)
    save(adapted, adapted.state(), tmp_path / "adapter")
    wide = load(ModelSettings(name=str(make_folder(tmp_path / "tiny-llama", hidden_size=64))))
    with pytest.raises(AdapterError, match=r"shape \(4, 32\), this model needs \(4, 64\)"):
        load_folder(wide, tmp_path / "adapter")
    deep = load(ModelSettings(name=str(make_folder(tmp_path / "deep/tiny-llama", num_hidden_layers=3))))
    with pytest.raises(AdapterError, match="4 tensors missing"):
        load_folder(deep, tmp_path / "adapter")


def test_an_adapter_for_another_base_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    adapted = _attach(tiny_folder)
    save(adapted, adapted.state(), tmp_path / "adapter")
    other = load(ModelSettings(name=str(make_folder(tmp_path / "someone-else"))))
    with pytest.raises(AdapterError, match=r"was trained on '.*tiny-llama', the model given is '.*someone-else'"):
        load_folder(other, tmp_path / "adapter")


def test_pickled_linked_and_foreign_adapters_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    adapted = _attach(tiny_folder)
    folder = tmp_path / "adapter"
    save(adapted, adapted.state(), folder)
    os.rename(folder / WEIGHTS, tmp_path / "outside.safetensors")
    with pytest.raises(AdapterError, match="Convert it where you trust it"):
        checked(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle, which can run code and is not read"):
        checked(folder)
    (folder / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(AdapterError, match="leads outside the folder"):
        checked(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / WEIGHTS).unlink()
    os.rename(tmp_path / "outside.safetensors", folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(AdapterError, match="peft_type = 'LOHA'"):
        checked(folder)
    with pytest.raises(AdapterError, match="not a PEFT adapter folder"):
        checked(tmp_path)


def test_a_cut_adapter_file_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    adapted = _attach(tiny_folder)
    save(adapted, adapted.state(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(CorruptFileError, match=r"adapter_model\.safetensors: byte \d+: \d+ bytes announced; cut off"):
        checked(tmp_path)


def test_a_wrong_target_names_the_nearest_layer(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"has no 'q_prj'; did you mean \"q_proj\"\?"):
        _attach(tiny_folder, target_modules=("q_prj",))


@pytest.mark.parametrize("target", ["embed_tokens", "norm"])
def test_a_target_that_is_no_linear_layer_is_named(tiny_folder: Path, target: str) -> None:
    with pytest.raises(ModelError, match=r"is of the kind Embedding|RMSNorm"):
        _attach(tiny_folder, target_modules=(target, "q_proj"))


def test_a_refused_state_leaves_the_adapter_as_it_was(tiny_folder: Path) -> None:
    adapted = _attach(tiny_folder)
    before = to_tensors(adapted.state())
    wrong = to_tensors(_attach(tiny_folder, r=8).state())
    with pytest.raises(AdapterError, match="A has rank 8, B 8; this model has room for 4"):
        adapted.load(wrong)
    assert all(torch.equal(t, before[n]) for n, t in to_tensors(adapted.state()).items())


def test_bytes_are_predicted_from_shapes_as_published_runs_counted_them() -> None:
    """4 numel + 128 a tensor, 2 messages a client: the totals in four participants' logs (MiB)."""

    def total(hidden: int, kv: int, layers: int, rank: int, messages: int) -> float:
        tensors = {}
        for i in range(layers):
            for name, out in (("q", hidden), ("v", kv)):
                tensors[f"{i}.{name}.A"] = torch.empty(rank, hidden)
                tensors[f"{i}.{name}.B"] = torch.empty(out, rank)
        return budget.message_bytes(tensors) * messages / 1024**2

    assert total(576, 192, 30, 8, 2 * 5 * 50) == pytest.approx(886.23, abs=0.005)
    assert total(960, 320, 32, 8, 2 * 5 * 50) == pytest.approx(1570.31, abs=0.005)
    assert total(576, 192, 30, 8, 2 * 2 * 200) == pytest.approx(1417.97, abs=0.005)
    assert total(960, 320, 32, 8, 2 * 2 * 200) == pytest.approx(2512.50, abs=0.005)


def test_the_plan_counts_what_is_serialised(settings: Callable[..., Settings], tiny_folder: Path) -> None:
    from fedtune.federation.messages import pack

    adapted = _attach(tiny_folder, dora=True)
    tensors = to_tensors(adapted.state())
    planned = budget.predict(settings().config, adapted, wire=lambda round_: 2 * 4 * budget.message_bytes(tensors))
    for near in (True, False):
        assert planned.message == sum(len(a.data) for a in pack(tensors, in_process=near).values())
    assert planned.per_round == 2 * 4 * planned.message
    assert planned.total == 3 * planned.per_round
    assert planned.trainable == sum(t.numel() for t in tensors.values())
