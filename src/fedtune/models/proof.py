"""What may be done with a model without changing its numbers, tried on the model itself when it is loaded.

Three short texts lie in one row, two of which share their beginning, and the row is compared with each text alone in
transformers' own attention: the logits, and the gradient of the embeddings, through which that of any adapter comes.
That no text sees another, and no token what comes after it, is read off gradients, which then are exactly zero.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.models import rms_norm, sides
from fedtune.models.interface import inner, packed_pass, plain_pass, watched
from fedtune.models.packing import PackedRow, join, pack
from fedtune.types import ModelError

_PROOF = "fedtune_proof"
# tokens that the first two texts share, and of each text
SHARED, LENGTHS = 9, (18, 14, 11)
# how far a token's logits and gradient may differ, as a share of their size: rounding, and no more
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
# the same of the median token of a text where numbers have 16 bits or fewer: rounding goes through all layers,
# backwards through twice as many, and can send a token to another expert
COARSE_LOGITS, COARSE_GRADIENT = 0.1, 0.3
ENDLESS = 2**31
# how much further apart two seeds are than one is from itself, where a device does not give the same bits twice
FURTHER = 4


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        why: why texts pass through the model one at a time; empty where several may lie in one row.
        longest: tokens of a text up to which they may.
        random: the model itself draws random numbers while it trains.
        keeps: `logits_to_keep` gives the logits at some places.
    """

    why: str = ""
    longest: int = ENDLESS
    random: bool = False
    keeps: bool = False

    def packs(self, texts: Sequence[Sequence[int]]) -> bool:
        """Tell whether these texts may lie in one row."""
        return not self.why and max(map(len, texts), default=0) <= self.longest


class _Trace:
    """A pass whose gradients can be asked for. Logits are [tokens, vocabulary], gradients [tokens, hidden]."""

    def __init__(self, base: Any, run: Any) -> None:
        seen: list[Tensor] = []

        def leaf(module: Any, inputs: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1].clone()  # a layer may write into it

        with base.get_input_embeddings().register_forward_hook(leaf):
            logits = run().logits[0]
        if not seen:
            raise ModelError("its forward pass leaves its embeddings out")
        self._embedded = seen[0]
        self._logits = logits if logits.dtype == torch.float64 else logits.float()

    def logits(self, places: Sequence[int]) -> Tensor:
        """Return the logits at some places."""
        logits: Tensor = self._logits.detach()[list(places)].cpu()
        return logits

    def gradient(self, places: Sequence[int], targets: Sequence[int]) -> Tensor:
        """Return the gradient of the cross-entropy of targets, one after each place."""
        wanted = torch.tensor(targets, device=self._logits.device)
        loss = F.cross_entropy(self._logits[list(places)], wanted, reduction="sum")
        (found,) = torch.autograd.grad(loss, self._embedded, retain_graph=True, allow_unused=True)
        if found is None:
            raise ModelError("no gradient reaches its embeddings")
        if found.shape[:-1].numel() != len(self._logits):
            raise ModelError("it puts embeddings of its own beside those of a text")
        gradient: Tensor = found.reshape(len(self._logits), -1).to(self._logits.dtype).cpu()
        return gradient


def texts_for(base: Any) -> list[list[int]]:
    """Return the token ids that a model is tried on; none of them means anything special to it."""
    config = base.config.get_text_config()
    special = {v for k, v in vars(config).items() if k.endswith("token_id") and isinstance(v, int)}
    size = min(int(config.vocab_size), base.get_input_embeddings().weight.shape[0])
    plain = [i for i in range(size) if i not in special] or [0]
    draw = random.Random(0)
    texts = [[draw.choice(plain) for _ in range(length)] for length in LENGTHS]
    texts[1][:SHARED] = texts[0][:SHARED]
    return texts


def _targets(text: Sequence[int]) -> list[int]:
    return [*text[1:], text[0]]


def _places(row: PackedRow) -> list[list[int]]:
    """Return where in the row each text's tokens are."""
    texts = [span for span in row.spans if span.before or span.start >= len(row.ids) - LENGTHS[-1]]
    return [[*range(*span.prefix), *range(span.start, span.end)] for span in texts]


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Return how far each row of two tables [rows, n] is apart, as a share of its size; small rows count as larger."""
    finite = other.isfinite()
    if not torch.equal(one.isfinite(), finite):
        return torch.full((len(one),), float("inf"))
    one, other = one.where(finite, 0.0), other.where(finite, 0.0)
    norms = (other - other.mean(-1, keepdim=True)).norm(dim=-1)
    apart: Tensor = (one - other).norm(dim=-1) / (norms + 0.1 * norms.mean()).clamp_min(1e-30)
    return apart


def far(one: Tensor, other: Tensor, dtype: torch.dtype, coarse: float = COARSE_LOGITS) -> bool:
    """Tell whether two tables [rows, n] differ by more than rounding."""
    apart = distance(one, other)
    if dtype in TOLERANCE:
        return not bool((apart <= TOLERANCE[dtype]).all())
    return not float(apart.median()) <= coarse


@dataclass(frozen=True)
class _Alone:
    """What a text alone gives in transformers' own attention."""

    text: Sequence[int]
    logits: Tensor
    gradient: Tensor


def _alone(base: Any, text: Sequence[int]) -> _Alone:
    """Run a text as transformers would. Raises ModelError for logits that depend on later tokens, or are no numbers."""
    trace, every, half = _Trace(base, lambda: plain_pass(base, text)), range(len(text)), len(text) // 2
    logits = trace.logits(every)
    if logits.isnan().any():
        raise ModelError("its logits are not numbers (NaN)")
    if trace.gradient(every[:half], text[1 : half + 1])[half:].any():
        raise ModelError("its logits depend on the tokens after them: it is not a causal language model")
    return _Alone(text, logits, trace.gradient(every, _targets(text)))


def _difference(base: Any, alone: Sequence[_Alone], dtype: torch.dtype) -> str:
    """Return in what a row of all texts differs from each alone; empty if in nothing."""
    texts = [one.text for one in alone]
    row = join([pack(texts[:2], share_prefix=True), pack(texts[2:])])
    trace = _Trace(base, lambda: packed_pass(base, row))
    for one, places in zip(alone, _places(row), strict=True):
        gradient = trace.gradient(places, _targets(one.text))
        others = torch.ones(len(row.ids), dtype=torch.bool)
        others[places] = False
        if gradient[others].any():
            return "texts in one row would see each other"
        # a beginning that lies there once is the first text's
        own = slice(SHARED if one is alone[1] else 0, None)
        if far(trace.logits(places)[own], one.logits[own], dtype):
            return "the logits of a text in a row are not those of the text alone"
        if far(gradient[places][own], one.gradient[own], dtype, COARSE_GRADIENT):
            return "the gradients of a text in a row are not those of the text alone"
    return ""


def _packable(base: Any, alone: Sequence[_Alone], dtype: torch.dtype) -> tuple[str, int]:
    """Return why several texts cannot lie in one row (empty if they can), and how long they may be."""
    with watched() as watch:
        try:
            why = _difference(base, alone, dtype)
        except Exception as err:  # whatever a model's own code raises, it cannot do this
            why = str(err).split(": ")[-1] or type(err).__name__
    if not watch.calls:
        why = "its layers have an attention of their own, or none"
    # beyond a window that only a mask would have applied, texts would see too much
    limits = (watch.masks - watch.windows) | _original_lengths(base.config.get_text_config())
    return why, min(limits, default=ENDLESS)


def _original_lengths(config: Any) -> set[int]:
    """Return lengths beyond which one long text changes the position embedding of all."""
    known = getattr(config, "rope_parameters", None) or {}
    tables = [known, *(table for table in known.values() if isinstance(table, dict))]
    changing = [t for t in tables if t.get("rope_type") in ("dynamic", "longrope")]
    return {int(t.get("original_max_position_embeddings") or config.max_position_embeddings) for t in changing}


@torch.no_grad()
def _keeps(base: Any, alone: _Alone, dtype: torch.dtype, *, packs: bool) -> bool:
    """Tell whether a model gives the logits of some places when it is told which, in a packed pass as well."""
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return False
    places = [2, 3, len(alone.text) - 1]
    try:
        index = torch.tensor(places, device=next(base.parameters()).device)
        made = [plain_pass(base, alone.text, logits_to_keep=index)]
        made += [packed_pass(base, pack([alone.text]), logits_to_keep=index)] if packs else []
    except Exception:  # whatever a model's own code raises, it cannot do this
        return False
    wanted = alone.logits[places]
    tables = [output.logits[0].to("cpu", wanted.dtype) for output in made]
    return all(table.shape == wanted.shape and not far(table, wanted, dtype) for table in tables)


def _is_random(base: Any, text: Sequence[int]) -> bool:
    """Tell whether what a model gives while it trains depends on random numbers: some drop, some route by chance."""
    drops = (
        value
        for module in base.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float)
    )
    layers = (m for m in base.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    return any(p > 0 for p in drops) or any(m.p > 0 for m in layers) or _varies(base, text)


@torch.no_grad()
def _varies(base: Any, text: Sequence[int]) -> bool:
    """Tell whether a text's logits in training mode are further apart under two seeds than under one twice."""

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = plain_pass(base, text).logits[0].double()
        return found.nan_to_num()

    base.train()
    try:
        first, same, other = logits(0), logits(0), logits(1)
    except Exception:  # whatever a model's own code raises, it is not trained so
        return False
    finally:
        base.eval()
    return bool((other - first).norm() > FURTHER * (same - first).norm())


@contextlib.contextmanager
def still(base: Any) -> Iterator[None]:
    """Let a model be tried with gradients, in evaluation mode, whatever is going on around."""
    was = base.training
    base.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            yield
    finally:
        base.train(was)


def prove(model: Any, what: str = "", *, fuse: bool = False) -> Proof:
    """Try a model, and keep with it what was found.

    Args:
        model: bare or wrapped by PEFT, with adapters that add nothing yet.
        what: to call it in errors; its class by default.
        fuse: put cheaper forms in the place of its norms, and try it with them; they go again if it fails.

    Raises:
        ModelError: it is not a causal language model, or cannot score a text at all.
    """
    base, name = inner(model), what or type(inner(model)).__name__
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    with still(base):
        try:
            alone = [_alone(base, text) for text in texts_for(base)]
        except ModelError as err:
            raise ModelError(f"{name}: {err}") from err
        except Exception as err:  # whatever a model's own code raises
            raise ModelError(f"{name} cannot score a text: {type(err).__name__}: {err}") from err
        if fuse:
            rms_norm.fuse(base)
        coarse = torch.bfloat16 if getattr(base, "is_quantized", False) else dtype
        why, longest = _packable(base, alone, coarse)
        if why:
            rms_norm.restore(base)
        found = Proof(why, longest, _is_random(base, alone[0].text), _keeps(base, alone[0], coarse, packs=not why))
    setattr(base, _PROOF, found)
    return found


def proof_of(model: Any) -> Proof:
    """Return what is known of a model; it is tried now if it was not when it was loaded."""
    found = getattr(inner(model), _PROOF, None)
    with sides.without(model):
        return found if isinstance(found, Proof) else prove(model)
