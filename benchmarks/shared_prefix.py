"""Time one training step and one evaluation batch of the packaged model, with and without a shared prefix.

    python benchmarks/shared_prefix.py [--repeats 5]

Both sides do the same work on the same examples; their losses are compared before anything is timed. Prints the
ratio of medians (without / with), from runs that alternate A-B-A-B.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fedtune.cli.settings import CHECKS
from fedtune.config import load
from fedtune.models import adapter
from fedtune.models import load as models
from fedtune.training.loss import label_loss
from fedtune.training.workload import encode_shards
from fedtune.training.workload import load as load_data


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ratio(name: str, work: Callable[[bool], object], repeats: int) -> None:
    work(True), work(False)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for share in (False, True):
            times[share].append(_seconds(lambda share=share: work(share)))
    slow, fast = statistics.median(times[False]), statistics.median(times[True])
    print(f"{name:28} repeated {slow:.2f} s   shared {fast:.2f} s   ratio {slow / fast:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    config = load([{"domain": "finance"}], CHECKS).config
    adapted = adapter.attach(models.load(config.model), config.lora, seed=0)
    shards = encode_shards(load_data(config), adapted.base.tokenizer, config)
    step = shards.shards[0][: config.train.per_device_train_batch_size]
    losses = [label_loss(adapted.model, step, share_prefix=share).item() for share in (False, True)]
    print(f"summed loss of a step: repeated {losses[0]:.6f}, shared {losses[1]:.6f}")

    def train(share: bool) -> None:
        adapted.model.train()
        label_loss(adapted.model, step, share_prefix=share).backward()

    def evaluate(share: bool) -> None:
        adapted.model.eval()
        with torch.inference_mode():
            label_loss(adapted.model, shards.shards[1][:32], share_prefix=share)

    _ratio("training step, 8 sentences", train, repeats)
    _ratio("evaluation, 32 sentences", evaluate, repeats)


if __name__ == "__main__":
    main()
