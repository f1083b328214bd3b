"""Every causal architecture of transformers, tiny and random: equal to transformers one text at a time, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtune.config import Config
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.domains.base import Item
from fedtune.evaluation import generate, likelihood
from fedtune.evaluation.alone import batches
from fedtune.models.adapter import attach
from fedtune.models.load import LoadedModel, load
from fedtune.models.proof import proof_of, prove
from fedtune.objectives import Example
from fedtune.training.executor import training
from fedtune.training.gradients import backpropagate
from fedtune.training.loss import Step
from fedtune.types import FedtuneError, ModelError
from tests.architectures import causal_configs, tiny
from tests.tiny import make_tokenizer

# several texts in one row are right for these, and have to stay possible: they are what people train
PACKED = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "beam",
    "biogpt",
    "bitnet",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "deepseek_v3",
    "diffllama",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "fuyu",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "got_ocr2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "kolibri1",
    "laguna",
    "llama",
    "longcat_flash",
    "mellum",
    "minicpm3",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "moshi",
    "moss_transcribe_diarize",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
    "whisper",
    "youtu",
]
ORDINARY = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "smollm3",
    "granite",
]
# one of each kind of fault: convolution, state space, linear attention, ALiBi, an attention of its own that no interface
# reaches, sinks, windows that only a mask knows, positions of its own
APART = ("lfm2", "mamba", "jamba", "qwen3_next", "bloom", "stablelm", "falcon", "gpt_oss", "llama4_text", "bart")
REFUSED = ("bert", "roberta", "xlnet", "cpmant")
KINDS = causal_configs()
# encoders that are causal where their configuration says so
DECODER = " as a decoder"
BOTH = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xmod",
]
PACKED_DECODERS = ("bert", "bert-generation", "electra", "ernie", "roc_bert")
GREEDY = {"max_new_tokens": 9, "do_sample": False}
PREFIX = "Below is an instruction that describes a task. "
ITEMS = [
    Item(f"{PREFIX}{text}", f"{PREFIX}{text}", ("negative", "neutral", "positive"), 0)
    for text in ("What is the sentiment of this news?", "Which one? A. first B. second", "yes no maybe")
]


def made(kind: str) -> Any:
    name = kind.removesuffix(DECODER)
    return tiny(KINDS[name], **({"is_decoder": True} if name != kind else {}))


def folder_of(kind: str, folder: Path) -> Path:
    model = made(kind)
    # an ordinary base has no settings of decoding of its own
    model.generation_config = type(model.generation_config)(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """The same model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


def check_likelihood(loaded: LoadedModel, truth: Any, config: Config) -> None:
    found = [s for batch in likelihood.score(loaded.model, loaded.tokenizer, ITEMS, str, config) for s in batch]
    for item, scores in zip(ITEMS, found, strict=True):
        for candidate, score in zip(likelihood._candidates(item, str, loaded.tokenizer, config), scores, strict=True):
            with torch.no_grad():
                logs = logits_of(truth, candidate.ids).log_softmax(-1)[candidate.start - 1 : -1]
            own = logs.gather(1, torch.tensor(candidate.ids[candidate.start :])[:, None]).mean()
            assert score == pytest.approx(float(own), rel=1e-4, abs=1e-3)


def greedy(model: Any, ids: Any) -> Any:
    """Decode without a cache: some classes' own cache gives other tokens than their own pass over the text."""
    for _ in range(9):
        token = logits_of(model, ids[0].tolist())[-1].argmax()
        ids = torch.cat([ids, token[None, None]], 1)
        if int(token) == 2:
            break
    return ids


def check_decoding(loaded: LoadedModel, truth: Any) -> None:
    prompts = [item.prompt for item in ITEMS]
    made = generate.complete(
        loaded.model, loaded.tokenizer, prompts, [()] * 3, generate.Decoding(length=256, new_tokens=9)
    )
    found = [texts[0] for batch in made for texts in batch]
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            own = greedy(truth, ids) if batches(loaded.model) else truth.generate(inputs=ids, **GREEDY)
        assert text == loaded.tokenizer.decode(own[0][ids.shape[1] :], skip_special_tokens=True)


def linear_layers(model: Any) -> tuple[str, ...]:
    """Return the names of plain linear layers but the head's."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}
    others = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) not in (nn.Linear, Conv1D) or m is head}
    # which PEFT refuses in every model with Mamba's layers
    refused = {"out_proj"} if any("mamba" in type(m).__name__.lower() for m in model.modules()) else set()
    return tuple(sorted(names - others - refused))


def check_training(loaded: LoadedModel, truth: Any) -> None:
    """The loss of a step and every gradient of an adapter, against stock PEFT on one text at a time."""
    from peft import get_peft_model

    adapted = attach(loaded, LoraSettings(r=2, alpha=4.0, target_modules=linear_layers(loaded.model)), 0)
    generator = torch.Generator().manual_seed(1)
    for slot in adapted.slots.values():
        slot.data.copy_(0.3 * torch.randn(slot.shape, generator=generator))
    stock = get_peft_model(truth, adapted.model.peft_config["default"])
    stock.load_state_dict({n: p for n, p in adapted.model.state_dict().items() if "lora_" in n}, strict=False)
    tokens = [loaded.tokenizer(item.prompt)["input_ids"] for item in ITEMS]
    examples = [Example.labelled(ids, start) for ids, start in zip(tokens, (12, 15, 11), strict=True)]
    with training(adapted.model, False):
        loss = backpropagate(adapted, Step(examples), 4096, exact=True)
    texts = [text for example in examples for text in example.texts]
    total = sum(text.labels for text in texts)
    stock.train()
    own = torch.stack(
        [
            F.cross_entropy(logits_of(stock, t.ids)[t.start - 1 : -1], torch.tensor(t.ids[t.start :]), reduction="sum")
            for t in texts
        ]
    )
    (own.sum() / total).backward()
    assert loss == pytest.approx(float(own.sum()) / total, rel=1e-4)
    expected = {n.replace(".default", ""): p.grad for n, p in stock.named_parameters() if p.requires_grad}
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert set(adapted.slots) == set(expected)
    for name, slot in adapted.slots.items():
        if expected[name] is None:
            assert slot.grad is None
            continue
        assert slot.grad is not None
        assert torch.allclose(slot.grad, expected[name], rtol=1e-3, atol=1e-4 * largest), name


def outcome(kind: str, folder: Path, config: Config) -> str:
    """Hold a model against transformers in everything that is done with it; return what way it went."""
    folder_of(kind, folder)
    try:
        loaded = load(ModelSettings(name=str(folder), dtype="float32"))
    except ModelError as err:
        return f"refused: {err}"
    how = f"apart: {proof_of(loaded.model).why}" if proof_of(loaded.model).why else "packed"
    truth = plain(folder)
    check_likelihood(loaded, truth, config)
    check_decoding(loaded, truth)
    try:
        check_training(loaded, truth)
    except FedtuneError as err:
        return f"{how}; not trained: {err}"
    return how


@pytest.mark.parametrize("kind", APART)
def test_what_a_row_would_change_passes_one_text_at_a_time(kind: str, tmp_path: Path, tiny_config: Config) -> None:
    assert outcome(kind, tmp_path, tiny_config).startswith("apart")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_causal_model_is_refused(kind: str, tmp_path: Path) -> None:
    folder_of(kind, tmp_path)
    with pytest.raises(ModelError, match=r"not a causal language model|embeddings of its own"):
        load(ModelSettings(name=str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [k for k in ORDINARY if k in KINDS])
def test_ordinary_models_keep_the_packed_pass(kind: str, dtype: torch.dtype) -> None:
    found = prove(tiny(KINDS[kind]).to(dtype), fuse=True)
    assert (found.why, found.longest >= 2**31) == ("", True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*sorted(KINDS), *(k + DECODER for k in BOTH)])
def test_every_architecture_is_equal_or_refused(kind: str, tmp_path: Path, tiny_config: Config) -> None:
    try:
        made(kind)
    except Exception as err:
        pytest.skip(f"cannot be made tiny: {type(err).__name__}: {err}")
    way = outcome(kind, tmp_path, tiny_config)
    assert (way == "packed") is (kind in PACKED or kind in {k + DECODER for k in PACKED_DECODERS}), way
