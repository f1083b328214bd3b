"""What one GPU does: training lever by lever, cohorts of clients, evaluation, and memory against the prediction.

    python benchmarks/gpu.py [--shapes SmolLM2-135M,Llama-3.2-1B,Mistral-7B] [--device cuda] [--wheels FOLDER]

Needs torch, transformers and peft and no network: weights are random, in the models' true shapes, so it measures speed
and equality and no quality. What else is missing is installed from `--wheels`, a folder beside this file. The share of
peak is 4 P a token (frozen weights: forward 2 P, the gradient of the input 2 P) over `--peak`, in real tokens; padding
and recomputed tokens do not count. JSON goes to `benchmarks/results/gpu.json`; without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]
NEEDED = ("pydantic", "safetensors", "huggingface_hub", "gguf")


def ensure(wheels: Path) -> None:
    """Install what is missing from a folder of wheels, without a network."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", str(wheels), *missing]
        subprocess.run(words, check=True)


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


class Bench:
    """One model shape on one device."""

    def __init__(self, shape: str, device: str, peak: float, repeats: int) -> None:
        import torch

        from fedtune.config.schema import LoraSettings, TrainSettings

        self.torch, self.shape, self.device = torch, shape, torch.device(device)
        self.peak, self.repeats = peak, repeats
        self.lora = LoraSettings(r=32, alpha=64.0, target_modules=("q_proj", "v_proj"))
        self.train = TrainSettings(per_device_train_batch_size=16)

    def adapted(self, dtype: Any) -> Any:
        """Return the model with random weights in a precision, and its adapter."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        from fedtune.models import adapter
        from fedtune.models.load import LoadedModel
        from fedtune.models.proof import prove

        config = LlamaConfig(**SHAPES[self.shape], max_position_embeddings=4096)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False).eval()
        prove(model, fuse=True)
        return adapter.attach(LoadedModel(model, None, self.shape, "random"), self.lora, 0)

    def examples(self, seed: int, count: int = 16, mean: int = 230) -> list[Any]:
        """Return texts of lengths like those of instructions: a few long, most short, half of each a response."""
        from fedtune.objectives import Example

        generator = self.torch.Generator().manual_seed(seed)
        spread = self.torch.rand(count, generator=generator) ** 2
        lengths = (mean * (0.4 + 1.8 * spread)).int().clamp(8, 512).tolist()
        top = SHAPES[self.shape]["vocab_size"]
        texts = [self.torch.randint(0, top, (n,), generator=generator).tolist() for n in lengths]
        return [Example.labelled(ids, len(ids) // 2) for ids in texts]

    def seconds(self, work: Callable[[], Any]) -> list[float]:
        """Return the seconds of some repeats after one that warms up."""
        times = []
        for number in range(self.repeats + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times += [time.perf_counter() - started] if number else []
        return times

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def share(self, adapted: Any, tokens: int, seconds: float) -> float:
        """Return the share of the device's peak."""
        inputs = adapted.base.model.get_input_embeddings().weight.numel()
        whole = sum(p.numel() for p in adapted.base.model.parameters())
        body = whole if SHAPES[self.shape].get("tie_word_embeddings") else whole - inputs
        return 4.0 * body * tokens / seconds / self.peak

    def row(self, what: str, adapted: Any, tokens: int, times: Sequence[float], **more: Any) -> dict[str, Any]:
        """Return one measurement."""
        middle = statistics.median(times)
        row = {
            "shape": self.shape,
            "what": what,
            "seconds": list(times),
            "tokens_per_second": tokens / middle,
            "share_of_peak": self.share(adapted, tokens, middle),
            **more,
        }
        print(json.dumps({k: v for k, v in row.items() if k != "seconds"}), flush=True)
        return row

    def ladder(self) -> list[dict[str, Any]]:
        """Measure a step: the reference's procedure in float32, ours in float32, TF32 and bfloat16."""
        torch = self.torch
        examples = self.examples(1)
        tokens = sum(e.tokens for e in examples)
        rows = []
        for what, dtype, tf32, ours in (
            ("reference: padded, recomputed, all logits, float32", torch.float32, False, False),
            ("ours, float32", torch.float32, False, True),
            ("ours, TF32", torch.float32, True, True),
            ("ours, bfloat16", torch.bfloat16, False, True),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            adapted = self.adapted(dtype)
            work = self._ours(adapted, examples) if ours else self._reference(adapted, examples)
            loss = work()
            self.reset()
            rows.append(self.row(what, adapted, tokens, self.seconds(work), loss=loss, memory=self.memory(adapted)))
            del adapted, work
            self.empty()
        torch.backends.cuda.matmul.allow_tf32 = False
        return rows

    def _ours(self, adapted: Any, examples: Sequence[Any]) -> Callable[[], float]:
        from fedtune.training.executor import training
        from fedtune.training.gradients import backpropagate
        from fedtune.training.loss import Step

        def step() -> float:
            with training(adapted.model, False):
                return backpropagate(adapted, Step(examples), 2**20, exact=True)

        return step

    def _reference(self, adapted: Any, examples: Sequence[Any]) -> Callable[[], float]:
        from benchmarks.reference import Reference, padded

        from fedtune.training.executor import training

        def step() -> float:
            batch = {k: v.to(self.device) for k, v in padded(examples, 0).items()}
            with training(adapted.model, True):
                return Reference.backward(adapted.model, batch)

        return step

    def cohorts(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Measure clients a pass: short steps (finance), K clients at once against one after the other."""
        from fedtune.lora.state import to_tensors
        from fedtune.methods.requests import Train
        from fedtune.training.cohort import Cohort
        from fedtune.training.executor import Limits, Work

        adapted = self.adapted(self.torch.bfloat16 if self.device.type == "cuda" else self.torch.float32)
        start = to_tensors(adapted.state())
        most = max(sizes)
        works = []
        for client in range(most):
            steps = [self.examples(100 * client + step, mean=90) for step in range(3)]
            works.append(Work(Train(start, list(start)), steps, 1e-4, self.train, client, True))
        rows = []
        for size in sizes:
            cohort = Cohort(adapted, size, Limits(2**20))
            tokens = sum(e.tokens for w in works for step in w.steps for e in step)
            times = self.seconds(lambda cohort=cohort: cohort.run_all(works))
            rows.append(self.row(f"cohort of {size}, {most} clients x 3 steps", adapted, tokens, times))
        for row in rows:
            row["ratio"] = statistics.median(rows[0]["seconds"]) / statistics.median(row["seconds"])
        self.empty()
        return rows

    def evaluation(self, count: int = 64) -> list[dict[str, Any]]:
        """Measure the next token of prompts: one at a time, and packed with their beginning shared."""
        torch = self.torch
        from fedtune.models.attention import packed_logits

        adapted = self.adapted(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        common = self.examples(7, 1, 100)[0].texts[0].ids[:60]
        prompts = [tuple(common) + e.texts[0].ids for e in self.examples(8, count, 120)]
        tokens = sum(map(len, prompts))
        ends = [sum(map(len, prompts[: i + 1])) - 1 for i in range(count)]

        def single() -> Any:
            found = [adapted.model(input_ids=torch.tensor([p], device=self.device)).logits[0, -1] for p in prompts]
            return torch.stack(found).argmax(-1)

        def together() -> Any:
            return packed_logits(adapted.model, prompts, ends, share_prefix=True).argmax(-1)

        with torch.inference_mode():
            same = int((single() == together()).sum())
            slow, fast = self.seconds(single), self.seconds(together)
        rows = [
            self.row(f"{count} prompts, one at a time", adapted, tokens, slow),
            self.row(f"{count} prompts, packed", adapted, tokens, fast, same=f"{same} of {count}"),
        ]
        rows[1]["ratio"] = statistics.median(slow) / statistics.median(fast)
        self.empty()
        return rows

    def memory(self, adapted: Any) -> dict[str, int] | None:
        """Return the peak of the device's memory since the last reset, and what is predicted."""
        if self.device.type != "cuda":
            return None
        from fedtune.models.budget import activation_bytes

        shape = adapted.base.model.config
        width = max(p.element_size() for p in adapted.base.model.parameters())
        tokens = sum(e.tokens for e in self.examples(1))
        model = sum(p.numel() * p.element_size() for p in adapted.base.model.parameters())
        predicted = model + tokens * activation_bytes(shape, width, checkpointing=False)
        return {"peak": int(self.torch.cuda.max_memory_allocated()), "predicted": predicted}

    def reset(self) -> None:
        """Begin to watch the device's memory."""
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats()

    def empty(self) -> None:
        """Give memory back."""
        import gc

        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="SmolLM2-135M,Llama-3.2-1B,Mistral-7B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, default=989e12, help="operations a second (H200, bfloat16, dense)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cohorts", default="1,2,4,8,16")
    parser.add_argument("--wheels", type=Path, default=HERE / "wheels")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    asked = parser.parse_args()
    ensure(asked.wheels)
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: torch sees no GPU here; nothing was measured (--device cpu --shapes tiny tries the script out)"
        )
    rows: list[dict[str, Any]] = []
    for shape in asked.shapes.split(","):
        bench = Bench(shape, asked.device, asked.peak, asked.repeats)
        rows += bench.ladder() + bench.cohorts([int(k) for k in asked.cohorts.split(",")]) + bench.evaluation()
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU: a CPU"
    document = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__, "peak": asked.peak}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
