"""What methods do inside a model: side adapters, cores, second adapters, smaller ranks, exact DoRA."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.domains.base import Item
from fedtune.evaluation import official
from fedtune.evaluation.generate import Decoding, complete
from fedtune.lora import base_delta, dora
from fedtune.lora.product import Product
from fedtune.lora.state import PREFIX, fresh, to_tensors, with_rank, with_tensors
from fedtune.methods import ClientUpdate, RoundContext, ServerState
from fedtune.methods.requests import Correction, Gradients, Train
from fedtune.models.adapted import base_weight
from fedtune.models.adapter import AdaptedModel, attach, save
from fedtune.models.attention import packed_logits, text_features
from fedtune.models.load import load
from fedtune.training.client import LocalWork
from fedtune.training.cohort import Cohort
from fedtune.types import AdapterError
from tests.clients import begun_by
from tests.training.programs import all_asked, asked, ran
from tests.training.test_client import SHARD, _stock_training

TEXTS = [example.texts[0].ids for example in SHARD[:4]]
KEEP = list(range(sum(map(len, TEXTS))))


@pytest.fixture(scope="module")
def config(settings: Callable[..., Settings]) -> Config:
    return settings(train={"max_steps": 3, "per_device_train_batch_size": 5, "learning_rate_max": 1e-2}).config


def adapted(config: Config, **changes: Any) -> AdaptedModel:
    base = load(ModelSettings(name=config.model.name))
    return attach(base, config.lora.model_copy(update=changes), seed=3)


def local(
    model: AdaptedModel, config: Config, client: int = 1, round_: int = 1, phase: int = 1, **more: Any
) -> LocalWork:
    return LocalWork(
        model, SHARD, more.get("layout", model.layout), more.get("kept", {}), config, (client, round_, phase)
    )


def noisy(model: AdaptedModel, seed: int = 0, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + size * torch.randn(t.shape, generator=generator) for n, t in to_tensors(model.layout).items()}


@torch.no_grad()
def logits(model: AdaptedModel, *, share: bool = True) -> Tensor:
    model.model.eval()
    return packed_logits(model.model, TEXTS, KEEP, share_prefix=share)


def test_side_adapters_do_what_one_peft_adapter_does(config: Config, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(config)
    state = with_tensors(model.layout, noisy(model))
    moved = {p: Product(0.1 * torch.randn(m.b.shape[0], 3), torch.randn(3, m.a.shape[1])) for p, m in state.items()}
    pieces = base_delta.append((), 1, moved)
    model.load(to_tensors(state))
    without = logits(model)
    model.load({**to_tensors(state), **base_delta.side_tensors(moved)})
    beside = logits(model)
    assert not torch.allclose(without, beside, atol=1e-2)
    save(model, base_delta.as_adapter(state, pieces), tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), tmp_path).eval()
    with torch.no_grad():
        alone = torch.cat([stock(input_ids=torch.tensor([t])).logits[0] for t in TEXTS])
    assert torch.allclose(beside, alone, atol=1e-4)
    with model.model.disable_adapter(), model.sides.off():
        plain = logits(model)
    with torch.no_grad():
        untouched = load(ModelSettings(name=config.model.name)).model
        assert torch.allclose(plain, packed_logits(untouched, TEXTS, KEEP), atol=1e-6)
    model.load(to_tensors(state))
    assert torch.equal(logits(model), without)


def test_side_adapters_are_right_on_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny import make_tokenizer

    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = attach(load(ModelSettings(name=str(tmp_path))), LoraSettings(r=2, target_modules=("c_attn",)), seed=0)
    path, module = next(iter(model.layout.items()))
    assert module.conv1d
    moved = {path: Product(torch.randn(module.b.shape[0], 2), torch.randn(2, module.a.shape[1]))}
    before, norms = logits(model), model.row_norms(to_tensors(model.layout))
    model.load({**to_tensors(model.layout), **base_delta.side_tensors(moved)})
    beside = logits(model)
    weight = model.layers[path].get_base_layer().weight
    assert torch.allclose(norms[path], weight.norm(dim=0))
    with torch.no_grad():
        weight += moved[path].dense().T
    model.load(to_tensors(model.layout))
    assert torch.allclose(logits(model), beside, atol=1e-4)
    assert not torch.allclose(before, beside, atol=1e-2)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}])
def test_a_client_of_a_smaller_rank_trains_as_stock_peft_of_that_rank(config: Config, kind: dict[str, Any]) -> None:
    wide, narrow = adapted(config, r=4, **kind), adapted(config, r=2, **kind)
    start = {p: with_rank(m, 2) for p, m in wide.layout.items()}
    assert all(m.scale == narrow.layout[p].scale for p, m in start.items())
    narrow.load(to_tensors(start))
    want = _stock_training(config, narrow, 2)
    work = LocalWork(wide, SHARD, start, {}, config, (1, 2, 1))
    tensors = to_tensors(start)
    got = asked(work, Train(tensors, list(tensors)))
    assert all(torch.allclose(got[n], want[n], atol=2e-4) for n in want)
    assert {t.shape for t in got.values()} == {t.shape for t in tensors.values()}
    assert all(not p[2:].any() for n, p in wide.slots.items() if "lora_A" in n)


def test_a_core_sits_between_the_factors(config: Config) -> None:
    model = adapted(config)
    tensors = noisy(model)
    cores = {p: torch.randn(m.rank, m.rank) for p, m in model.layout.items()}
    model.load({**tensors, **{f"{PREFIX}{p}.lora_R.weight": c for p, c in cores.items()}})
    cored = logits(model)
    merged = {
        n: t @ cores[n.removeprefix(PREFIX).rsplit(".lora", 1)[0]] if "lora_B" in n else t for n, t in tensors.items()
    }
    model.load(merged)
    assert torch.allclose(cored, logits(model), atol=1e-5)


def _full_gradients(model: AdaptedModel, config: Config) -> dict[str, Tensor]:
    """The dense gradient of every adapted weight at the base model, by plain autograd."""
    work = local(model, config)
    weights = {p: layer.get_base_layer().weight for p, layer in model.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    asked(work, Gradients(to_tensors(model.layout), [next(iter(model.slots))]))
    found = {p: weight.grad.detach().clone() for p, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return found


def test_fed_sbs_sketches_are_those_of_the_dense_gradient(config: Config) -> None:
    model = adapted(config)
    method = methods.build(config.model_copy(update={"method": config.method.model_copy(update={"name": "fed_sb"})}))
    gradients = _full_gradients(model, config)
    work = local(model, config)
    sketches = ran(work, method.fit(work.context, to_tensors(model.layout))).payload
    probe = method._probe(model.layout, 1)  # type: ignore[attr-defined]
    for path, gradient in gradients.items():
        scale = model.layout[path].scale
        right, left = sketches[f"{PREFIX}{path}.lora_B.weight.1"], sketches[f"{PREFIX}{path}.lora_A.weight.1"]
        assert torch.allclose(right, scale * gradient @ probe[path].a.T, atol=1e-5)
        assert torch.allclose(left, scale * probe[path].b.T @ gradient, atol=1e-5)
        assert right.abs().max() > 1e-4


def test_a_router_weighs_the_own_and_the_other_adapter_token_by_token(config: Config) -> None:
    model = adapted(config)
    own, path = noisy(model), next(iter(model.layout))
    layer, module = model.layers[path], model.layout[path]
    other_a, other_b = torch.randn(4, module.a.shape[1]), torch.randn(module.b.shape[0], 4)
    router = torch.randn(2, module.a.shape[1])
    names = {"other_A": other_a, "other_B": other_b, "router": router}
    model.load({**own, **{f"{PREFIX}{path}.{role}.weight": t for role, t in names.items()}})
    model.model.eval()
    x = torch.randn(1, 5, module.a.shape[1])
    gates = F.linear(x, router).softmax(-1)
    a, b = own[f"{PREFIX}{path}.lora_A.weight"], own[f"{PREFIX}{path}.lora_B.weight"]
    want = F.linear(x, base_weight(layer)) + module.scale * (
        gates[..., :1] * F.linear(F.linear(x, a), b) + gates[..., 1:] * F.linear(F.linear(x, other_a), other_b)
    )
    with torch.no_grad():
        assert torch.allclose(layer(x), want, atol=1e-5)


def test_a_mixture_by_similarity_is_each_texts_own(config: Config) -> None:
    """Packed, one by one, and generated: a text's weight depends on nothing but itself."""
    model = adapted(config)
    tensors = noisy(model)
    other = {n.replace(".lora_", ".other_"): t for n, t in noisy(model, seed=1).items()}
    prompts = [text.ids[: text.start] for example in SHARD[:4] for text in example.texts]
    anchors = text_features(model.model, prompts[1:3])
    model.load({**tensors, **other, "mix.anchors": anchors, "mix.weight": torch.tensor(0.5)})
    keeps = [range(len(prompt) - 1, len(text)) for prompt, text in zip(prompts, TEXTS, strict=True)]
    starts = [sum(map(len, TEXTS[:i])) for i in range(len(TEXTS))]
    every = [start + i for start, own in zip(starts, keeps, strict=True) for i in own]
    with torch.no_grad():
        packed = packed_logits(model.model.eval(), TEXTS, every, share_prefix=True)
        single = torch.cat([packed_logits(model.model, [t], own) for t, own in zip(TEXTS, keeps, strict=True)])
    assert torch.allclose(packed, single, atol=1e-5)
    weights = model.sides.similarity(text_features(model.model, prompts))
    assert 0 <= float(weights.min()) < float(weights.max()) <= 0.5
    model.load({**tensors, **other, "mix.weight": weights[1]})
    with torch.no_grad():
        fixed = packed_logits(model.model, [TEXTS[1]], keeps[1])
    begin = len(keeps[0])
    assert torch.allclose(packed[begin : begin + len(keeps[1])], fixed, atol=1e-5)
    tokenizer = model.base.tokenizer
    model.load({**tensors, **other, "mix.anchors": anchors, "mix.weight": torch.tensor(0.5)})
    questions, stops = ["What is", "### Response: a longer prompt"], [(), ()]
    decoding = Decoding(new_tokens=6)
    both = [c for part in complete(model.model, tokenizer, questions, stops, decoding) for c in part]
    alone = [c for p in questions for part in complete(model.model, tokenizer, [p], [()], decoding) for c in part]
    assert both == alone


def test_official_answers_are_the_mixtures(config: Config) -> None:
    """Every pass of `generate` weighs the adapters by the texts of its own rows, and none goes without."""
    model = adapted(config)
    other = {n.replace(".lora_", ".other_"): t for n, t in noisy(model, seed=1).items()}
    anchors = text_features(model.model, TEXTS[:2])
    model.load({**noisy(model), **other, "mix.anchors": anchors, "mix.weight": torch.tensor(0.5)})
    model.model.eval()
    prompts = [f"What is the sentiment of {word}? Answer: " for word in ("news", "this", "a longer text")]
    texts = [model.base.tokenizer(p)["input_ids"] for p in prompts]
    want = model.sides.similarity(torch.cat([text_features(model.model, [t]) for t in texts]))
    seen: list[Any] = []
    next(iter(model.layers.values())).register_forward_hook(
        lambda *_: seen.append(model.sides.mix) if model.sides.active else None
    )
    items = [Item(prompt=p, question="q", answers=("negative", "positive"), gold=0) for p in prompts]
    assert len(next(official.sentiment(model.model, model.base.tokenizer, items, 3))) == 3
    assert len(seen) > 1
    assert all(torch.allclose(mix.flatten(), want, atol=1e-6) for mix in seen)
    seen.clear()
    several = [Item(prompt="Is it so?", question="q", answers=("maybe so", "no"), gold=0)]
    list(official.choose(model.model, model.base.tokenizer, several))
    assert len(seen) > 1
    assert all(mix is not None for mix in seen)
    with pytest.raises(AdapterError, match="depends on the text"):
        model.model(torch.tensor([list(texts[0])]))


def _weights(model: AdaptedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's effective weight of every layer, dense."""
    found = {}
    for path, module in with_tensors(model.layout, tensors).items():
        moved = base_weight(model.layers[path]) + module.delta()
        assert module.magnitude is not None
        found[path] = module.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    return found


@pytest.mark.parametrize(
    ("name", "exact"), [("ffa_lora", True), ("flexlora", True), ("fedsvd", True), ("lora_fair", False)]
)
def test_dora_through_the_map_is_the_mean_of_the_clients_weights(config: Config, name: str, exact: bool) -> None:
    """On a real DoRA model, with the clients' tensors as they would be after training; large rank for the SVD."""
    chosen = config.model_copy(
        update={
            "lora": config.lora.model_copy(update={"dora": True, "r": 16}),
            "method": config.method.model_copy(update={"name": name}),
        }
    )
    model = adapted(config, dora=True, r=16)
    algorithm = methods.create(chosen)
    state = algorithm.initial(model.layout)
    start = dora.to_magnitudes(to_tensors(state.adapter), model.row_norms(to_tensors(state.adapter)))
    assert all(torch.allclose(start[n], t, atol=1e-6) for n, t in to_tensors(model.layout).items())
    sent, effective = [], []
    for client, weight in ((0, 1.0), (1, 3.0)):
        trained = {
            n: start[n] * (1 + 0.2 * torch.rand(t.shape)) if "magnitude" in n else t
            for n, t in noisy(model, seed=client, size=0.02).items()
        }
        trained = {n: t if algorithm.method.trainable(1, n) else start[n] for n, t in trained.items()}
        if name in ("flexlora", "lora_fair"):
            trained = {
                n: torch.where(torch.arange(t.shape[1]) < 6, t, 0) if "lora_B" in n else t for n, t in trained.items()
            }
        payload = algorithm.method.payload(trained, start, 1)
        mapped = dora.to_wire(payload, model.row_norms({**start, **payload}))
        sent.append(ClientUpdate(client, mapped, weight))
        effective.append({p: weight / 4 * w for p, w in _weights(model, trained).items()})
    after = algorithm.server_step(sent, state, RoundContext(1))
    tensors = to_tensors(after.adapter)
    got = _weights(model, dora.to_magnitudes(tensors, model.row_norms(tensors)))
    gap = max(float((got[p] - effective[0][p] - effective[1][p]).norm() / got[p].norm()) for p in got)
    assert (gap < 1e-6) is exact, gap
    again = algorithm.server_step([sent[0], ClientUpdate(1, sent[0].tensors, 3.0)], state, RoundContext(1))
    tensors = to_tensors(again.adapter)
    fixed = _weights(model, dora.to_magnitudes(tensors, model.row_norms(tensors)))
    assert all(torch.allclose(fixed[p], effective[0][p] * 4, atol=1e-5) for p in fixed) or not exact


@pytest.mark.parametrize(("value", "said"), [(0.0, "0"), (float("nan"), "nan")])
def test_a_vanishing_relative_magnitude_is_refused(value: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"mean relative magnitude falls to {said}"):
        dora.divided([{PREFIX + "q.lora_magnitude_vector": torch.full((3,), value)}], [1.0])


@pytest.mark.parametrize("name", ["fedalt", "feddpa", "fedsa_lora"])
def test_a_clients_own_model_is_what_it_trained(config: Config, name: str) -> None:
    """After a round, `begin` with what was kept gives back the tensors that the training ended with."""
    chosen = config.model_copy(update={"method": config.method.model_copy(update={"name": name})})
    model, algorithm = adapted(config), methods.create(chosen)
    state = algorithm.initial(model.layout)
    work = local(model, chosen)
    fitted = ran(work, algorithm.work(work.context, algorithm.view(state, 1)))
    after = algorithm.server_step([ClientUpdate(1, fitted.payload, 1.0)], state, RoundContext(1))
    mine = begun_by(algorithm, model.layout, algorithm.view(after, 1), fitted.kept, 2)
    for tensor_name, tensor in fitted.payload.items():
        assert torch.allclose(mine[tensor_name], tensor)
    for tensor_name, tensor in fitted.kept.items():
        assert tensor_name.startswith("fedalt/") or torch.equal(mine[tensor_name], tensor)
    model.load(mine)
    assert not torch.equal(logits(model), logits_of(model, to_tensors(model.layout)))


def logits_of(model: AdaptedModel, tensors: dict[str, Tensor]) -> Tensor:
    model.load(tensors)
    return logits(model)


def test_masks_and_corrections_act_on_gradients(config: Config) -> None:
    model = adapted(config)
    start = to_tensors(model.layout)
    names = [n for n in start if "lora_B" in n]
    masks = {n: torch.zeros_like(start[n]).index_fill_(1, torch.tensor([1]), 1.0) for n in names}
    got = asked(local(model, config), Train(start, names, masks=masks))
    for name in names:
        assert torch.equal(got[name][:, 0], start[name][:, 0])
        assert not torch.equal(got[name][:, 1], start[name][:, 1])
    sgd = config.model_copy(
        update={"train": config.train.model_copy(update={"optimizer": "sgd", "max_grad_norm": 1e9})}
    )
    plain = asked(local(model, sgd), Train(start, names))
    push = {n: torch.ones_like(start[n]) for n in names}
    pushed = asked(local(model, sgd), Train(start, names, correction=push))
    first = local(model, sgd)
    for name in names:
        moved = (plain[name] - pushed[name]).mean()
        assert float(moved) == pytest.approx(first.rate * first.steps, rel=0.05)


@pytest.mark.parametrize("size", [1, 2])
def test_a_correction_learns_the_gradients_that_steps_are_made_of(config: Config, size: int) -> None:
    """Alone and beside another client: what the parameters moved by is their sum, and the correction."""
    model, train = adapted(config), {"optimizer": "sgd", "max_grad_norm": 0.05}
    sgd = config.model_copy(update={"train": config.train.model_copy(update=train)})
    start = {n: t + 0.01 if "lora_B" in n else t for n, t in to_tensors(model.layout).items()}
    names = [n for n in start if "lora_B" in n]
    cohort = Cohort(model, size)
    works = [LocalWork(model, SHARD, model.layout, {}, sgd, (c, 1, 1)) for c in range(2)]
    pushes = [Correction({n: torch.full_like(start[n], 1e-3 * (c + 1)) for n in names}) for c in range(2)]
    requests = [Train(start, names, correction=push) for push in pushes]
    for work, push, after in zip(works, pushes, all_asked(works, requests, cohort), strict=True):
        for name in names:
            told = (start[name] - after[name]) / work.rate - work.steps * push[name]
            assert push.sums[name].norm() > 0
            # what moved is a difference of float32 numbers near 0.01, with three digits at this rate
            assert float((push.sums[name].cpu() - told).norm()) < 5e-3 * float(told.norm())
    assert bool(cohort.stacked) is (size > 1)


def test_the_rest_of_a_fresh_adapter_is_the_layouts(config: Config) -> None:
    model = adapted(config)
    new = fresh(model.layout, 1, 1)
    assert {n: t.shape for n, t in to_tensors(new).items()} == {n: t.shape for n, t in to_tensors(model.layout).items()}
    assert ServerState(new).round == 0


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_what_the_server_has_arrives_in_the_model(config: Config, name: str) -> None:
    """A canary in the server's state is found in the resident model after a download, whatever the method sends."""
    chosen = config.model_copy(update={"method": config.method.model_copy(update={"name": name})})
    model, algorithm = adapted(config), methods.create(chosen)
    state = algorithm.initial(model.layout)
    sent, phase = {}, 0
    while state.round < 1:
        phase += 1
        work = local(model, chosen, round_=1, phase=phase, kept=sent.get("kept", {}))
        fitted = ran(work, algorithm.work(work.context, algorithm.view(state, 1)))
        sent = {"kept": {**sent.get("kept", {}), **fitted.kept}}
        update = [ClientUpdate(1, fitted.payload, 1.0)]
        state = algorithm.server_step(update, state, RoundContext(1))
    frozen_a = {"ffa_lora", "fedkseed", "flora", "rac_lora", "fed_sb"}
    path = next(iter(state.adapter))
    if name not in frozen_a:
        canary = 7.0
        marked = {**state.adapter, path: replace(state.adapter[path], a=torch.full_like(state.adapter[path].a, canary))}
        state = replace(state, adapter=marked)
    begun = begun_by(algorithm, model.layout, algorithm.view(state, 99), {}, 2)
    model.load(begun)
    now = {**model.slots, **model.sides.parameters()}
    held = [n for n in begun if n in now]
    assert set(held) >= {n for n in begun if not n.startswith("mix.")}
    assert all(torch.equal(now[n].detach(), begun[n].to(now[n].dtype)) for n in held)
    if name not in frozen_a:
        found = now[f"{PREFIX}{path}.{'other_A' if name == 'fedalt' else 'lora_A'}.weight"]
        assert bool((found == 7.0).all())


def test_a_run_is_the_pure_functions_on_the_same_updates(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """One round of the loop = the clients' work and the server step called by hand."""
    import safetensors.torch

    from fedtune.experiment.run import run
    from fedtune.training import workload
    from fedtune.types import derive_seed

    made = settings(method={"name": "flexlora"}, federation={"rounds": 1}, eval={"limit": 2})
    path, _ = run(made, tmp_path / "run")
    got = safetensors.torch.load_file(path / "checkpoints/round-000001/state.safetensors")
    model = attach(load(made.config.model), made.config.lora, derive_seed(made.config.seed, "adapter"))
    algorithm, shards = (
        methods.create(made.config),
        workload.encode_shards(workload.load(made.config), model.base.tokenizer, made.config),
    )
    state = algorithm.initial(model.layout)
    sent = []
    for client, shard in enumerate(shards.shards):
        work = LocalWork(model, shard, model.layout, {}, made.config, (client, 1, 1))
        sent.append(
            ClientUpdate(
                client, ran(work, algorithm.work(work.context, algorithm.view(state, client))).payload, work.examples
            )
        )
    after = to_tensors(algorithm.server_step(sent, state, RoundContext(1)).adapter)
    assert all(torch.equal(got[n], after[n]) for n in after)


def test_side_adapters_stay_in_float32_beside_a_bfloat16_base(config: Config) -> None:
    """An update that bfloat16 weights would swallow is felt, and no weight is touched."""
    model = adapted(config)
    model.model.to(torch.bfloat16)
    path, module = next(iter(model.layout.items()))
    weight = base_weight(model.layers[path]).clone()
    small = 1e-4 * weight.float().norm() / (module.b.shape[0] * module.a.shape[1]) ** 0.5
    left, right = small * torch.ones(module.b.shape[0], 1), torch.ones(1, module.a.shape[1])
    model.load({**to_tensors(model.layout), **base_delta.side_tensors({path: Product(left, right)})})
    assert model.sides.parameters()[f"{PREFIX}{path}.base_A.weight"].dtype == torch.float32
    assert torch.equal(base_weight(model.layers[path]), weight)
    x = torch.ones(1, 1, module.a.shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        layer = model.layers[path]
        added = F.linear(F.linear(x.float(), right), left)
        plain = layer.get_base_layer()(x)
        assert torch.equal(layer(x), plain + added.to(torch.bfloat16))
    folded = (weight + (left @ right).to(torch.bfloat16)).float() - weight.float()
    assert float((folded - left @ right).norm()) > 0.5 * float((left @ right).norm())
