"""Algebra in product space: on sums of s B A, through their factors, never as a dense matrix.

A `Product` is L R with L [out, n] and R [n, in]; n is the sum of the ranks that went in. Singular values and
vectors of L R come from two thin QR decompositions and the SVD of an n x n core, in float32 or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import LoraModule


@dataclass(frozen=True)
class Product:
    """A matrix as left [out, n] times right [n, in]."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the matrix [out, in]; for tests and exports."""
        return self.left @ self.right


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def stack(modules: Sequence[LoraModule], weights: Sequence[float]) -> Product:
    """Return sum_i w_i s_i B_i A_i / sum_i w_i as stacked factors, without any error (FLoRA, arXiv 2409.05976).

    Each module's own scale is used, so ranks and alphas may differ; the weight goes on one factor only.
    """
    total = float(sum(weights))
    left = torch.cat([_wide(m.b) for m in modules], dim=1)
    right = torch.cat([_wide(m.a) * (w / total * m.scale) for m, w in zip(modules, weights, strict=True)], dim=0)
    return Product(left, right)


def svd(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD (U [out, n], S [n], Vh [n, in]) of a product, n at most min(out, in, inner)."""
    left_basis, left_core = torch.linalg.qr(product.left)
    right_basis, right_core = torch.linalg.qr(product.right.T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T)
    n = min(u.shape[0], vh.shape[0])
    return left_basis @ u[:, :n], s[:n], vh[:n] @ right_basis.T


def truncate(product: Product, rank: int) -> Product:
    """Return the best approximation of a rank (Eckart-Young), as (U S, Vh), padded with zeros if it has less."""
    u, s, vh = svd(product)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    missing = rank - s.shape[0]
    left = torch.cat([u * s, u.new_zeros(u.shape[0], missing)], dim=1)
    return Product(left, torch.cat([vh, vh.new_zeros(missing, vh.shape[1])], dim=0))


def inner(one: LoraModule, two: LoraModule) -> float:
    """Return the Frobenius inner product of two modules' deltas through r x r products."""
    middle = _wide(two.b).T @ _wide(one.b)
    return float(one.scale * two.scale * (middle * (_wide(two.a) @ _wide(one.a).T)).sum())


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition."""
    u, _, vh = torch.linalg.svd(matrix)
    orthogonal: Tensor = u @ vh
    return orthogonal


def rotation_to(moving: Tensor, reference: Tensor, blend: float = 1.0) -> Tensor:
    """Return the orthogonal R [r, r] with the smallest ||R^T moving - reference|| (orthogonal Procrustes).

    Args:
        moving: [r, k].
        reference: [r, k].
        blend: below 1 the rotation goes only part of the way from the identity.
    """
    turn = nearest_orthogonal(_wide(moving) @ _wide(reference).T)
    if blend == 1:
        return turn
    return nearest_orthogonal((1 - blend) * torch.eye(turn.shape[0], dtype=turn.dtype) + blend * turn)


def ridge_factors(modules: Sequence[LoraModule], weights: Sequence[float], ridge: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) with A the weighted mean and B the mean plus the ridge correction towards the ideal product.

    The correction D minimises ||M/s - (mean B + D) mean A||^2 + ridge ||D||^2 (arXiv 2411.14961, with the squared
    distance instead of the cosine); s is the first module's scale.
    """
    mean = weighted_mean(({"a": _wide(m.a), "b": _wide(m.b)} for m in modules), weights)
    a, b = mean["a"], mean["b"]
    ideal = stack(modules, weights)
    projected = (ideal.left @ (ideal.right @ a.T)) / modules[0].scale - b @ (a @ a.T)
    gram = a @ a.T + ridge * torch.eye(a.shape[0], dtype=a.dtype)
    return a, b + torch.linalg.solve(gram, projected.T).T


def regauge(module: LoraModule, gauge: Tensor) -> LoraModule:
    """Return the same delta in another gauge: (B G, G^-1 A)."""
    return replace(module, b=module.b @ gauge, a=torch.linalg.solve(gauge, module.a))
