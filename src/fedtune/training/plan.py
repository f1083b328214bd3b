"""What this machine can do, measured and reckoned at the start: threads, tokens per pass, recomputation, cohort."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedtune.config import Config
from fedtune.machine import cores
from fedtune.models.adapted import AdaptedModel
from fedtune.models.budget import activation_bytes
from fedtune.models.interface import inner
from fedtune.models.measure import free_memory, gemm_rate
from fedtune.models.packing import CALL
from fedtune.models.proof import Proof, proof_of
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Executor, Limits, Sequential, rehearse
from fedtune.types import ModelError, counted

# a machine without memory for more still trains: this many tokens pass at least
FEWEST, MOST_CPU, MOST = 512, 4096, 65_536
# the share of free memory that activations may take; the rest is for what nobody can foresee
SHARE = 0.6
# what an eager layer launches in a training step, and the seconds a launch takes on a GPU
LAUNCHES, LAUNCH_SECONDS = 90, 6e-6
LARGEST_COHORT = 16
# a cohort is worth its stacking only if it fills at least this many times a client's pass
WORTH = 1.5


@dataclass(frozen=True)
class Machine:
    """What the planner knows of a machine.

    Attributes:
        device: "cpu" or "cuda".
        cores: that this process may use.
        free: bytes of memory that training may take.
        rate: floating-point operations a second of this model's products, measured.
    """

    device: str
    cores: int
    free: int
    rate: float


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why, in words; `apart` is why texts pass through the model one at a time, if they do."""

    dtype: str
    threads: int
    tokens: int
    checkpointing: bool
    cohort: int
    bucket: int
    why: tuple[str, ...]
    apart: str = ""

    @staticmethod
    def read(document: Mapping[str, Any]) -> Plan:
        """Return a plan from a manifest."""
        return Plan(**{**document, "why": tuple(document["why"])})

    def line(self) -> str:
        """Return the plan for people."""
        how = f"{counted(self.cohort, 'client')} per pass"
        kept = "recomputed" if self.checkpointing else "kept"
        room = f"one text at a time ({self.apart})" if self.apart else f"{self.tokens} tokens per pass"
        return f"{self.dtype}, {counted(self.threads, 'thread')}, {how}, {room}, activations {kept}"


def machine(adapted: AdaptedModel) -> Machine:
    """Measure this machine with products in the model's own shapes."""
    shape = adapted.base.model.config.get_text_config()
    width = int(getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size)
    dtype = next(p.dtype for p in adapted.base.model.parameters() if p.is_floating_point())
    rate = gemm_rate(1024, int(shape.hidden_size), width, dtype, adapted.device)
    return Machine(adapted.device.type, cores(), free_memory(adapted.device), rate)


def _limits(config: Config, shape: Any, width: int, longest: int, free: int) -> tuple[int, bool, str]:
    """Return tokens per pass, whether activations are recomputed, and why."""
    asked = config.engine
    room = SHARE * free
    each = {c: activation_bytes(shape, width, checkpointing=c) + 2 * 4 * int(shape.hidden_size) for c in (False, True)}
    fits = room >= each[False] * longest
    checkpointing = not fits if asked.gradient_checkpointing == "auto" else asked.gradient_checkpointing
    why = f"activations of {longest} tokens take {each[False] * longest / 2**20:.0f} MiB of {room / 2**20:.0f} MiB"
    if asked.max_tokens_per_forward != "auto":
        return asked.max_tokens_per_forward, checkpointing, why
    return max(FEWEST, int(room // each[checkpointing])), checkpointing, why


def _cohort(
    config: Config, known: Machine, flops: float, layers: int, found: Proof, *, stackable: bool
) -> tuple[int, str]:
    """Return how many clients share a pass, and why.

    A step of few tokens leaves a GPU waiting for its launches; clients fill the gap until computing takes as long.
    """
    asked, most = config.engine, config.federation.cohort_size
    if not stackable:
        return 1, "what is trained is no low-rank adapter, so clients are not stacked"
    if found.why or found.random:
        return 1, "the model draws random numbers by itself" if found.random else "its texts pass one at a time"
    if asked.executor == "sequential":
        return 1, "asked for"
    if asked.side_by_side:
        return 1, "clients are trained in parallel on several devices"
    if asked.cohort != "auto":
        return asked.cohort, "asked for"
    launching, computing = layers * LAUNCHES * LAUNCH_SECONDS, flops / known.rate
    if known.device != "cuda":
        return (min(most, 4), "asked for") if asked.executor == "cohort" else (1, "a CPU is busy with one client")
    filled = launching / max(computing, 1e-9)
    why = f"launches take {1000 * launching:.1f} ms, computing a client's step {1000 * computing:.1f} ms"
    if filled < WORTH and asked.executor != "cohort":
        return 1, why
    return max(1, min(most, LARGEST_COHORT, round(filled) + 1)), why


def plan(config: Config, adapted: AdaptedModel, longest: int, tokens: float, known: Machine | None = None) -> Plan:
    """Choose how to train.

    Args:
        config: what is set by hand stays.
        longest: tokens of the longest example.
        tokens: of a client's step, on average.
        known: the machine; measured by default.
    """
    here = known or machine(adapted)
    model = adapted.base.model
    weights = [p for p in model.parameters() if p.is_floating_point()]
    shape, width = model.config.get_text_config(), max(p.element_size() for p in weights)
    whole = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    # of training on frozen weights: 2 a weight and token forward, and 2 for the input's gradient
    found, flops = proof_of(model), 4 * whole * tokens
    cohort, why_cohort = _cohort(config, here, flops, int(shape.num_hidden_layers), found, stackable=adapted.stackable)
    # gradients and the optimiser's two moments lie beside what is trained
    taken = 3 * sum(p.nbytes for p in adapted.slots.values())
    limit, checkpointing, why_memory = _limits(config, shape, width, longest, max(0, here.free - taken))
    if checkpointing and not inner(model).supports_gradient_checkpointing:
        if config.engine.gradient_checkpointing is True:
            raise ModelError(f"{type(inner(model)).__name__} cannot recompute its activations; leave them kept")
        checkpointing = False
    if config.engine.max_tokens_per_forward == "auto":
        # a power of two, so that a little more free memory does not change the last bits of a result
        limit = min(2 ** int(math.log2(limit)), MOST_CPU if here.device == "cpu" else MOST)
    rehearse(adapted, Limits(limit, checkpointing), exact=config.lora.dropout == 0)
    threads = config.engine.threads or here.cores
    dtype = str(weights[0].dtype).removeprefix("torch.")
    why = (f"{here.rate / 1e9:.0f} GFLOP/s in {dtype}", why_memory, f"cohort: {why_cohort}")
    # by the kind of device and not measured: it decides the last bits of a result, which must be the same tomorrow
    bucket = CALL.get(here.device, CALL["cuda"]) if config.engine.bucket == "auto" else config.engine.bucket
    return Plan(dtype, threads, limit, checkpointing, cohort, bucket, why, found.why)


def executor(chosen: Plan, adapted: AdaptedModel) -> Executor:
    """Take a plan up in this process, threads and buckets included, and return what trains by it."""
    torch.set_num_threads(chosen.threads)
    CALL[adapted.device.type] = chosen.bucket
    limits = Limits(chosen.tokens, chosen.checkpointing)
    return Cohort(adapted, chosen.cohort, limits) if chosen.cohort > 1 else Sequential(adapted, limits)
