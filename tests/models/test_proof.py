"""What a model is tried on when it is loaded, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Config, Settings
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.evaluation.alone import batches
from fedtune.evaluation.decode import Decoder
from fedtune.models import head
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.attention import packed_logits
from fedtune.models.dropout import KeyedDropout, Keys, token_keys
from fedtune.models.interface import NAME
from fedtune.models.load import LoadedModel, load
from fedtune.models.proof import proof_of, prove
from fedtune.objectives import Example
from fedtune.training.cohort import stacks
from fedtune.training.executor import training
from fedtune.training.gradients import backpropagate
from fedtune.training.loss import Part, Step, joint_loss
from fedtune.training.plan import Machine, plan
from fedtune.types import ModelError
from tests.architectures import causal_configs, tiny
from tests.tiny import make_model, make_tokenizer

TEXTS = [list(range(5, 25)), [*range(5, 17), 60, 61], list(range(90, 99))]
SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LAPTOP = Machine("cpu", 2, 4 * 2**30, 2.4e11)
GPU = Machine("cuda", 16, 130 * 2**30, 1e15)


def alone(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([list(text)])).logits[0] for text in texts])


def adapted_of(model: Any, **lora: Any) -> AdaptedModel:
    model.requires_grad_(False)
    found = attach(LoadedModel(model, make_tokenizer(), "tiny", "x"), LoraSettings(r=2, alpha=4.0, **lora), 0)
    generator = torch.Generator().manual_seed(1)
    for slot in found.slots.values():
        slot.data.copy_(0.3 * torch.randn(slot.shape, generator=generator))
    return found


def gradients(adapted: AdaptedModel, examples: Sequence[Example], **how: Any) -> dict[str, torch.Tensor]:
    """Gradients of a step, with activations recomputed if asked."""
    with training(adapted.model, how.pop("recomputed", False)):
        for slot in adapted.slots.values():
            slot.grad = None
        backpropagate(adapted, Step(examples, key=how.pop("key", 0)), how.pop("tokens", 4096), **how)
    return {n: p.grad.clone() for n, p in adapted.slots.items() if p.grad is not None}


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(t, two[n], rtol=1e-4, atol=1e-6) for n, t in one.items())


def test_outside_a_packed_pass_a_model_is_transformers_own(tiny_folder: Path) -> None:
    model = load(ModelSettings(name=str(tiny_folder))).model
    assert model.config._attn_implementation == "sdpa"
    packed_logits(model, TEXTS, [3])
    assert model.config._attn_implementation == "sdpa" != NAME


def test_a_window_that_only_a_mask_knows_limits_the_length() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, sliding_window=64)).eval()
    assert prove(model).longest > 64
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert prove(model).longest == 64
    assert proof_of(model).packs(TEXTS)
    assert not proof_of(model).packs([*TEXTS, list(range(65))])


def test_positions_that_change_with_the_longest_text_do_so_for_nobody_else() -> None:
    """Beyond its original length one text changes the position embedding of a whole pass."""
    from transformers import Phi3Config, Phi3ForCausalLM

    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    torch.manual_seed(0)
    config = Phi3Config(
        **SMALL,
        **HEADS,
        rope_parameters=scaling,
        original_max_position_embeddings=32,
        max_position_embeddings=128,
    )
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    texts = [*TEXTS, list(range(1, 60))]
    assert proof_of(model).longest == 32
    assert torch.allclose(packed_logits(model, texts, range(sum(map(len, texts)))), alone(model, texts), atol=1e-4)
    assert batches(model, 32)
    assert not batches(model, 40)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=512, d_model=16, encoder_layers=1, decoder_layers=1, decoder_attention_heads=2)
    config.encoder_attention_heads, config.encoder_ffn_dim, config.decoder_ffn_dim = 2, 16, 16
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(ModelSettings(name=str(tmp_path)))


def dropping() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def test_a_model_that_drops_by_itself_draws_by_its_step_and_shares_nothing() -> None:
    """Equal beginnings are told apart by what is dropped in them; what is drawn hangs on nothing but the step."""
    adapted = adapted_of(dropping(), target_modules=("c_attn",))
    assert proof_of(adapted.model).random
    assert not proof_of(make_model()).random
    examples = [Example.labelled(text, 3) for text in TEXTS]
    first = gradients(adapted, examples, exact=True, key=7)
    torch.manual_seed(1234)
    again, other = gradients(adapted, examples, exact=True, key=7), gradients(adapted, examples, exact=True, key=8)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not close(first, other)
    adapted.model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        shared = joint_loss(adapted.model, [Part(examples)], share_prefix=True)[0]
        torch.manual_seed(0)
        assert torch.equal(shared, joint_loss(adapted.model, [Part(examples)])[0])


@pytest.fixture(scope="module")
def hybrid() -> AdaptedModel:
    """Convolutions between layers of attention, with dropout in the adapter."""
    return adapted_of(tiny(causal_configs()["lfm2"]), target_modules=("q_proj", "in_proj", "w1"), dropout=0.25)


@pytest.mark.parametrize("exact", [True, False])
def test_one_text_at_a_time_does_not_hang_on_passes_or_recomputing(hybrid: AdaptedModel, exact: bool) -> None:
    examples = [Example.labelled(text, 3) for text in TEXTS]
    want = gradients(hybrid, examples, exact=exact, key=5)
    assert close(want, gradients(hybrid, examples, exact=exact, key=5, tokens=1))
    assert close(want, gradients(hybrid, examples, exact=exact, key=5, recomputed=True))
    assert exact is close(want, gradients(hybrid, examples, exact=exact, key=6))


def test_the_plan_says_that_texts_pass_one_at_a_time(
    hybrid: AdaptedModel, settings: Callable[..., Settings], tiny_folder: Path
) -> None:
    config = settings(federation={"clients": 40}).config
    found = plan(config, hybrid, 64, 200.0, GPU)
    assert (found.cohort, found.apart) == (1, proof_of(hybrid.model).why)
    assert f"one text at a time ({found.apart})" in found.line()
    usual = plan(config, attach(load(ModelSettings(name=str(tiny_folder))), config.lora, 0), 64, 200.0, LAPTOP)
    assert usual.apart == ""
    assert "tokens per pass" in usual.line()


def test_an_adapter_that_no_gradient_reaches_is_refused_before_training(
    tiny_folder: Path, settings: Callable[..., Settings]
) -> None:
    config = settings().config
    adapted = attach(load(ModelSettings(name=str(tiny_folder))), config.lora, 0)
    cut = adapted.model.get_base_model().model.norm
    hook = cut.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ModelError, match=r"cannot be trained"):
        plan(config, adapted, 64, 200.0, LAPTOP)
    hook.remove()
    plan(config, adapted, 64, 200.0, LAPTOP)


def test_a_model_whose_weights_let_no_gradient_through_is_trained_all_the_same(
    tiny_folder: Path, settings: Callable[..., Settings]
) -> None:
    config = settings().config
    adapted = attach(load(ModelSettings(name=str(tiny_folder))), config.lora, 0)
    with torch.no_grad():
        adapted.model.get_base_model().model.norm.weight.zero_()
    plan(config, adapted, 64, 200.0, LAPTOP)


def test_adapters_that_cannot_stand_side_by_side_are_trained_one_after_the_other(
    tiny_folder: Path, tiny_config: Config
) -> None:
    adapted = attach(load(ModelSettings(name=str(tiny_folder))), tiny_config.lora, 0)
    assert stacks(adapted)
    del adapted.model.fedtune_stacks
    layer = next(iter(adapted.layers.values()))
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(1),))
    layer.register_forward_hook(lambda module, inputs, output: output.flip(1))
    assert not stacks(adapted)


def test_dropout_in_a_layer_that_sees_other_rows_than_tokens_is_refused() -> None:
    keys = Keys()
    layer = KeyedDropout(0.5, 0, keys).train()
    with keys.of(token_keys([1], [0], [[4]], torch.device("cpu"))):
        assert layer(torch.ones(1, 4, 8)).shape == layer(torch.ones(4, 8)[None]).shape
        for shape in ((1, 3, 8), (2, 4, 8), (1, 4, 4, 2)):
            with pytest.raises(ModelError, match=r"lora\.dropout"):
                layer(torch.ones(shape))


def test_a_batch_that_would_decode_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches(make_model())
    monkeypatch.setattr(Decoder, "_compact", lambda self: None)
    monkeypatch.setattr(Decoder, "_prefix", lambda self, rows, cache: 0)
    assert batches(make_model()), "neither is needed for the numbers"
    monkeypatch.setattr("fedtune.evaluation.decode._moved", lambda states, width: states.roll(1, 2))
    assert not batches(make_model())


def test_a_head_whose_logits_are_capped_far_beyond_a_small_models_is_seen() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    for cap in (None, 1e4):
        torch.manual_seed(0)
        model = (
            Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=cap)).eval().requires_grad_(False)
        )
        assert head.has_plain_head(model) is (cap is None)


@pytest.mark.parametrize("chunk", [1, 300, 2**22])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba"])
def test_log_probabilities_in_chunks_are_those_of_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    """With a plain head, with one that does more, and one text at a time."""
    model = make_model() if kind == "llama" else tiny(causal_configs()[kind])
    monkeypatch.setattr(head, "CHUNK", chunk)
    keep = [3, 4, 11, 19, 25, 34, 40]
    wanted = [(0, 7), (0, 8), (0, 7), (2, 1), (3, 50), (5, 9), (6, 2), (6, 3)]
    with torch.no_grad():
        found = head.log_probabilities(model, TEXTS, keep, wanted, share_prefix=True)
        table = alone(model, TEXTS)[keep].log_softmax(-1)
    assert torch.allclose(found, torch.stack([table[i, token] for i, token in wanted]), atol=1e-4)


def test_logits_of_some_places_are_tried_in_the_pass_that_they_are_asked_of() -> None:
    """This model gives them for a text alone, and raises in a packed pass."""
    model = tiny(causal_configs()["got_ocr2"])
    with torch.no_grad():
        found = packed_logits(model, TEXTS[:2], [19, 31])
    assert torch.allclose(found, alone(model, TEXTS[:2])[[19, 31]], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("phimoe", {}, True),
        ("mixtral", {"router_jitter_noise": 0.02}, True),
        ("mixtral", {}, False),
        ("mamba", {}, False),
        ("llama", {}, False),
    ],
)
def test_a_model_that_routes_by_chance_is_random_as_one_that_drops_is(
    kind: str, changes: dict[str, Any], found: bool
) -> None:
    model = tiny(causal_configs()[kind], **changes)
    state = torch.random.get_rng_state()
    assert prove(model).random is found
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
