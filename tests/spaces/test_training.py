"""What is trained in each space is what stock PEFT, or plain PyTorch, trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import methods, spaces
from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.lora.state import to_tensors
from fedtune.models.adapted import AdaptedModel
from fedtune.models.adapter import attach_ia3
from fedtune.models.head import has_plain_head
from fedtune.models.load import load
from fedtune.models.merge import folded
from fedtune.models.rms_norm import FusedRMSNorm
from fedtune.models.trained import load_folder
from fedtune.training.executor import Sequential, place
from fedtune.types import AdapterError, ModelError
from tests.tiny import make_folder
from tests.training.test_client import SHARD, _padded_loss, _stock_training, fit

KINDS = ("ia3", "full")
IDS = torch.tensor([[5, 6, 7, 8, 9, 300]])


def attached(config: Config) -> AdaptedModel:
    base = load(ModelSettings(name=config.model.name))
    return spaces.of(config).attach(base, config, 3)


@pytest.fixture
def config(made: Callable[..., Settings]) -> Callable[[str], Config]:
    train = {"max_steps": 4, "per_device_train_batch_size": 5, "learning_rate_max": 1e-2}
    return lambda kind: made(kind, train=train).config


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_trains_what_plain_pytorch_trains(config: Callable[[str], Config], kind: str) -> None:
    chosen = config(kind)
    adapted = attached(chosen)
    start = to_tensors(adapted.layout)
    done = fit(adapted, SHARD, start, methods.create(chosen), chosen, client=1, round_=1)
    place(adapted, start, list(start))
    stock = _stock_training(chosen, adapted, round_=1)
    assert done.payload.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.allclose(done.payload[name], tensor, atol=2e-4), name
        assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_tensor_has_the_gradient_of_the_padded_loss(config: Callable[[str], Config], kind: str) -> None:
    from fedtune.methods.requests import Train
    from fedtune.training.executor import Work

    chosen = config(kind)
    adapted = attached(chosen)
    start = to_tensors(adapted.layout)
    seen: dict[str, Tensor] = {}

    def look(now: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in now.items() if p.grad is not None})

    asked = Train(start, list(start), term=look)  # type: ignore[arg-type]
    work = Work(asked, [SHARD[:3]], 1e-3, chosen.train, 0, True)
    assert Sequential(adapted).run_all([work])[0].error is None
    place(adapted, start, list(start))
    loss = _padded_loss(adapted.model, SHARD[:3]) / sum(e.labels for e in SHARD[:3])
    loss.backward()  # type: ignore[no-untyped-call]
    for name, slot in adapted.slots.items():
        assert slot.grad is not None
        assert float(seen[name].norm()) > 0, name
        assert torch.allclose(seen[name], slot.grad, atol=1e-5), name


def test_full_parameters_train_through_the_models_own_norms_and_head(config: Callable[[str], Config]) -> None:
    adapted = attached(config("full"))
    start = to_tensors(adapted.layout)
    place(adapted, start, list(start))
    assert not any(isinstance(m, FusedRMSNorm) for m in adapted.model.modules())
    assert not has_plain_head(adapted.model)
    with torch.no_grad():
        assert has_plain_head(adapted.model)
        before = adapted.model(IDS).logits
        adapted.load({n: t + 0.1 for n, t in start.items()})
        assert not torch.allclose(adapted.model(IDS).logits, before)
        with adapted.as_base():
            assert torch.equal(adapted.model(IDS).logits, before)
    base = adapted.detach()
    assert any(isinstance(m, FusedRMSNorm) for m in base.model.modules())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert has_plain_head(base.model)


def test_tied_weights_are_one_tensor(made: Callable[..., Settings], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny-llama", tie_word_embeddings=True)
    adapted = attached(made("full", model={"name": str(folder)}).config)
    tied = [n for n in adapted.slots if "lm_head" in n or "embed_tokens" in n]
    assert len(tied) == 1
    assert sum(t.numel() for t in to_tensors(adapted.layout).values()) == sum(
        p.numel() for p in adapted.model.parameters()
    )


def test_nothing_is_folded_into_weights_that_are_no_low_rank_change(config: Callable[[str], Config]) -> None:
    for kind in KINDS:
        with folded(attached(config(kind))) as is_folded:
            assert not is_folded


@pytest.mark.parametrize("own", [{}, {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}])
def test_an_ia3_folder_is_stock_pefts_and_comes_back(
    made: Callable[..., Settings], tiny_folder: Path, tmp_path: Path, own: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = made("ia3", peft={"kind": "ia3", **own}).config
    adapted = attached(config)
    torch.manual_seed(5)
    for slot in adapted.slots.values():
        torch.nn.init.normal_(slot, mean=1.0, std=0.3)
    spaces.of(config).save(adapted, adapted.state(), tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter").eval()
    adapted.model.eval()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=IDS).logits, adapted.model(input_ids=IDS).logits, atol=1e-5)
    stock.save_pretrained(tmp_path / "again")
    again = load_folder(load(ModelSettings(name=str(tiny_folder))), tmp_path / "again")
    got = to_tensors(again.state())
    assert all(torch.equal(t, got[n]) for n, t in to_tensors(adapted.state()).items())


def test_an_ia3_folder_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from fedtune.models.adapter import save

    adapted = attach_ia3(load(ModelSettings(name=str(tiny_folder))), (), ())
    save(adapted, adapted.state(), tmp_path / "adapter")
    deep = load(ModelSettings(name=str(make_folder(tmp_path / "tiny-llama", num_hidden_layers=3))))
    with pytest.raises(AdapterError, match="tensors missing"):
        load_folder(deep, tmp_path / "adapter")


def test_a_wrong_target_names_the_nearest_layer(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"peft.target_modules: .* has no 'k_prj'; did you mean \"k_proj\"\?"):
        attach_ia3(load(ModelSettings(name=str(tiny_folder))), ["k_prj"], ())
