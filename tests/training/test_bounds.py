"""What one reply may do to a model leaves it one that can be trained."""

import pytest
import torch

from fedtune.config.schema import LoraSettings, TrainSettings
from fedtune.lora.state import to_tensors
from fedtune.methods.sound import GROWTH
from fedtune.models.adapter import attach
from fedtune.models.load import LoadedModel
from fedtune.models.proof import prove
from fedtune.objectives import Example
from fedtune.training.executor import Sequential, Work
from tests import architectures

CASES = {
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", CASES)
def test_training_from_a_mean_with_the_largest_reply_stays_finite(kind: str) -> None:
    """Every factor is as large as one of four clients can make it, in adapters of scale 16."""
    model = architectures.tiny(architectures.causal_configs()[kind], scale=0.1)
    model.requires_grad_(False)
    prove(model)
    lora = LoraSettings(r=4, alpha=64.0, target_modules=CASES[kind])
    adapted = attach(LoadedModel(model, None, "x", "y"), lora, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in to_tensors(adapted.layout).items()}
    start = {n: t * (GROWTH / 4) / t.norm() for n, t in drawn.items()}
    texts = [[Example.labelled(range(10 + k, 60 + k), 5) for k in range(2)]] * 3
    trained = Sequential(adapted).run(Work(start, list(start), texts, 5e-5, TrainSettings(max_grad_norm=1.0), 0, True))
    assert all(bool(t.isfinite().all()) for t in trained.values())
