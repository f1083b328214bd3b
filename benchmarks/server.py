"""Time and memory of the server's side of product-space methods, against dense matrices.

    python benchmarks/server.py [--clients 20] [--rank 32] [--layers 32]

Adapters in the shapes of Mistral-7B (q 4096 x 4096 and v 1024 x 4096). For each method all layers are aggregated and
the time and the growth of the process's peak memory are taken. Then one q and one v layer are cut to rank r by the
dense way (sum the products, `torch.linalg.svd`) and by ours, alternating, on the same numbers; the script prints the
ratio and by how much the two results differ. JSON goes to `benchmarks/results/server.json`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune.io import write_json
from fedtune.lora import product
from fedtune.lora.state import AdapterState, LoraModule
from fedtune.methods import METHODS, ServerState
from fedtune.methods.aggregation import aggregate
from fedtune.results.manifest import machine, versions

SHAPES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}
TIMED = ("fedit", "flora", "fedex_lora", "flexlora", "fedmomentum")


class Made(Mapping[str, LoraModule]):
    """A client's adapter whose layers are drawn when they are asked for, as a folder's are read."""

    def __init__(self, client: int, rank: int, layers: int) -> None:
        self.client, self.rank = client, rank
        self.paths = [f"model.layers.{i}.self_attn.{name}" for i in range(layers) for name in SHAPES]

    def __getitem__(self, path: str) -> LoraModule:
        out, inner = SHAPES[path.rsplit(".", 1)[-1]]
        generator = torch.Generator().manual_seed(hash((self.client, path)) % 2**31)
        a = torch.randn(self.rank, inner, generator=generator) / inner**0.5
        return LoraModule(a, torch.randn(out, self.rank, generator=generator) * 0.01, 2.0 * self.rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def peak() -> float:
    """Return the process's peak memory so far in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def dense(modules: list[LoraModule], rank: int) -> Tensor:
    """The plain way: build the mean product, decompose it, keep the first values."""
    mean = torch.stack([m.delta() for m in modules[:1]]).sum(0) / len(modules)
    for module in modules[1:]:
        mean += module.delta() / len(modules)
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def factored(modules: list[LoraModule], rank: int) -> Tensor:
    """Our way, multiplied out at the end so that the results can be compared."""
    return product.truncate(product.stack(modules, [1.0] * len(modules)), rank).dense()


def compare(clients: list[AdapterState], rank: int, repeats: int) -> dict[str, float]:
    """Return seconds of both ways for one q and one v layer together, their ratio and their difference."""
    times: dict[str, list[float]] = {"dense": [], "factored": []}
    gap = 0.0
    paths = list(clients[0])[:2]
    modules = [[c[path] for c in clients] for path in paths]
    for _ in range(repeats):
        times["dense"].append(seconds(lambda: [dense(m, rank) for m in modules]))
        times["factored"].append(seconds(lambda: [factored(m, rank) for m in modules]))
    for m in modules:
        one, two = dense(m, rank), factored(m, rank)
        gap = max(gap, float((one - two).norm() / one.norm()))
    slow, fast = (statistics.median(times[k]) for k in ("dense", "factored"))
    return {"dense_seconds": slow, "factored_seconds": fast, "ratio": slow / fast, "relative_difference": gap}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    clients: list[AdapterState] = [Made(i, asked.rank, asked.layers) for i in range(asked.clients)]
    one = sum(m.a.nbytes + m.b.nbytes for m in clients[0].values()) / 1024**3
    found: dict[str, dict[str, float]] = {}
    drawing = seconds(lambda: [None for c in clients for _ in c.values()])
    for name in TIMED:
        before, method = peak(), METHODS[name](METHODS[name].Parameters())
        start = {path: clients[0][path] for path in clients[0]}
        took = seconds(lambda m=method, s=start: aggregate(m, clients, [1.0] * len(clients), ServerState(s))[0])  # type: ignore[misc]
        found[name] = {"seconds": took - drawing, "peak_growth_gib": peak() - before}
        grown = f"{found[name]['peak_growth_gib']:.2f} GiB more at the peak"
        print(f"{name:12} {took - drawing:7.1f} s for {len(clients[0])} layers of {len(clients)} clients, {grown}")
    against = compare(clients, asked.rank, asked.repeats)
    print(f"all clients' factors are {one * len(clients):.2f} GiB")
    print(
        f"one q and one v layer: dense {against['dense_seconds']:.1f} s, factored {against['factored_seconds']:.2f} s, "
        f"{against['ratio']:.0f} times faster; results differ by {against['relative_difference']:.1e} of their norm"
    )
    write_json(
        Path(__file__).parent / "results/server.json",
        {"settings": vars(asked), "methods": found, "dense": against, "machine": machine(), "versions": versions()},
    )


if __name__ == "__main__":
    main()
