"""Algebra in product space: on sums of s B A, through their factors, never as a dense matrix.

A `Product` is L R with L [out, n] and R [n, in]; n is the sum of the ranks that went in. Singular values and
vectors of L R come from two thin QR decompositions and the SVD of an n x n core, in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora.algebra import weighted_mean, wide
from fedtune.lora.state import LoraModule

if TYPE_CHECKING:
    from torch import Tensor

# below this ratio of Cholesky's diagonal a Gram matrix in float64 no longer carries float32's digits
SINGULAR = 1e-4


@dataclass(frozen=True)
class Product:
    """A matrix as left [out, n] times right [n, in]."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the matrix [out, in]; for tests and exports."""
        return self.left @ self.right

    @property
    def inner(self) -> int:
        """How many columns the left factor has: at least the matrix's rank."""
        return int(self.left.shape[1])

    @property
    def full(self) -> int:
        """The largest rank that a matrix of its shape has."""
        return min(self.left.shape[0], self.right.shape[1])


def stack(modules: Sequence[LoraModule], weights: Sequence[float]) -> Product:
    """Return sum_i w_i s_i B_i A_i / sum_i w_i as stacked factors, without any error (FLoRA, arXiv 2409.05976).

    Each module's own scale is used, so ranks and alphas may differ; the weight goes on one factor only.
    """
    total = float(sum(weights))
    left = torch.cat([wide(m.b) for m in modules], dim=1)
    right = torch.cat([wide(m.a) * (w / total * m.scale) for m, w in zip(modules, weights, strict=True)], dim=0)
    return Product(left, right)


def svd(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD (U [out, n], S [n], Vh [n, in]) of a product, n at most min(out, in, inner)."""
    fast = _svd_by_gram(product) if product.left.dtype == torch.float32 else None
    return fast or _svd_by_qr(product)


def _svd_by_qr(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    left_basis, left_core = torch.linalg.qr(product.left)
    right_basis, right_core = torch.linalg.qr(product.right.T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T)
    n = min(u.shape[0], vh.shape[0])
    return left_basis @ u[:, :n], s[:n], vh[:n] @ right_basis.T


def _svd_by_gram(product: Product) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the SVD of a float32 product through n x n Gram matrices in float64; None if those are near singular.

    With L = Q T (Cholesky of L^T L), the eigenvectors W of T (R R^T) T^T give U = Q W = L T^-1 W, and S Vh = U^T L R.
    Faster than two QR decompositions; squaring costs half of float64's digits, which leaves what float32 has.
    """
    left, right = product.left.double(), product.right.double()
    lower, failed = torch.linalg.cholesky_ex(left.T @ left)
    diagonal = lower.diagonal()
    if bool(failed) or not bool(diagonal.min() > SINGULAR * diagonal.max()):
        return None
    upper = lower.T
    _, w = torch.linalg.eigh(upper @ (right @ right.T) @ lower)
    w = w.flip(1)[:, : product.full]
    u = left @ torch.linalg.solve_triangular(upper, w, upper=True)
    rows = (w.T @ upper) @ right
    s = rows.norm(dim=1)
    vh = rows / s.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return u.float(), s.float(), vh.float()


def split(product: Product, rank: int) -> tuple[Product, Product]:
    """Return the best approximation of a rank (Eckart-Young) as (U S, Vh), and what it leaves out.

    The first is padded with zeros if the product has less rank; the second has as many columns as it needs.
    """
    u, s, vh = svd(product)
    needed = int((s > s.max() * torch.finfo(s.dtype).eps).sum())
    best = padded(Product(u[:, :rank] * s[:rank], vh[:rank]), rank)
    return best, Product(u[:, rank:needed] * s[rank:needed], vh[rank:needed])


def padded(product: Product, rank: int) -> Product:
    """Return the same product with zeros up to a rank; a layer narrower than the rank has fewer directions than it."""
    missing, pad = max(0, rank - product.inner), torch.nn.functional.pad
    return Product(pad(product.left, (0, missing)), pad(product.right, (0, 0, 0, missing)))


def truncate(product: Product, rank: int) -> Product:
    """Return the best approximation of a rank (Eckart-Young), as (U S, Vh), padded with zeros if it has less."""
    return split(product, rank)[0]


def energy_rank(values: Tensor, energy: float) -> int:
    """Return how many of the largest singular values have squares that sum to an energy; all if none do."""
    # rounding must not ask for one value more where all of them are wanted
    short = values.square().cumsum(0) < energy * (1 - 1e-6)
    return min(len(values), int(short.sum()) + 1)


def of(module: LoraModule) -> Product:
    """Return a module's delta as a product, in the orientation of B A."""
    return Product(wide(module.b) * module.scale, wide(module.a))


def precise(module: LoraModule) -> Product:
    """Return a module's delta as a product in float64, so that small differences of two of them keep their digits."""
    return Product(module.b.double() * module.scale, module.a.double())


def balanced(module: LoraModule) -> LoraModule:
    """Return the same delta in float64, with factors of equal norms that depend on nothing but the delta."""
    u, s, vh = _svd_by_qr(precise(module))
    rank = min(module.rank, s.shape[0])  # a delta of a smaller layer has no more values than that
    root = (s[:rank] / module.scale).sqrt()
    new = replace(module, a=vh.new_zeros(module.a.shape), b=u.new_zeros(module.b.shape))
    new.b[:, :rank], new.a[:rank] = u[:, :rank] * root, vh[:rank] * root[:, None]
    return new


def size(module: LoraModule) -> float:
    """Return ||s B A|| as s sqrt(tr(B^T B A A^T)) in float64: the cheapest way, for a single delta."""
    a, b = module.a.double(), module.b.double()
    return module.scale * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def total(*products: Product) -> Product:
    """Return the sum of products, by stacking them."""
    return Product(torch.cat([p.left for p in products], dim=1), torch.cat([p.right for p in products], dim=0))


def minus(product: Product) -> Product:
    """Return the product with the opposite sign."""
    return Product(-product.left, product.right)


def orthonormal(product: Product) -> Product:
    """Return the same matrix in float64 with orthonormal rows on the right: the left factor's norms are the matrix's.

    What two terms of a difference have in common cancels here, once, among factors of float64; sums of squares and
    inner products made of the result have no large terms any more that would have to cancel.
    """
    left_basis, left_core = torch.linalg.qr(product.left.double())
    right_basis, right_core = torch.linalg.qr(product.right.double().T)
    return Product(left_basis @ (left_core @ right_core.T), right_basis.T)


def norm(product: Product) -> float:
    """Return the Frobenius norm, in float64 and without cancellation or a dense matrix."""
    return float(orthonormal(product).left.norm())


def compressed(product: Product, cap: int = 0) -> Product:
    """Return the product with no more columns than its numerical rank, and than `cap` where that is above 0.

    Without a cap nothing is lost beyond rounding: only singular values below machine precision are dropped.
    """
    u, s, vh = svd(product)
    rank = max(1, int((s > s.max() * torch.finfo(s.dtype).eps).sum()))
    rank = min(rank, cap) if cap else rank
    return Product(u[:, :rank] * s[:rank], vh[:rank])


def residual(modules: Sequence[LoraModule], weights: Sequence[float]) -> Product:
    """Return M - s mean(B) mean(A) in N - 1 blocks of the rank (FedEx-LoRA, arXiv 2410.09432, equation 7).

    The residual is s sum_i b_i a_i with b_i = sqrt(w_i)(B_i - mean B) and a_i likewise. An orthogonal mixing of the
    N blocks whose first column is sqrt(w) makes the first block of both stacks vanish.

    Args:
        modules: of equal rank and scale.
        weights: of each; they need not sum to 1.
    """
    shares = torch.tensor(weights, dtype=torch.float64) / float(sum(weights))
    mean = weighted_mean(({"a": wide(m.a), "b": wide(m.b)} for m in modules), weights)
    roots = shares.sqrt().to(mean["a"].dtype)
    count = len(modules)
    mixing = torch.linalg.qr(torch.cat([roots[:, None], torch.eye(count, dtype=roots.dtype)], dim=1))[0][:, 1:]
    spread_a = roots[:, None, None] * torch.stack([wide(m.a) - mean["a"] for m in modules])
    spread_b = roots[:, None, None] * torch.stack([wide(m.b) - mean["b"] for m in modules])
    right = torch.einsum("ij,irk->jrk", mixing, spread_a).flatten(0, 1)
    left = torch.einsum("ij,ior->ojr", mixing, spread_b).flatten(1, 2)
    return Product(left * modules[0].scale, right)


def gram(products: Sequence[Mapping[str, Product]]) -> Tensor:
    """Return the inner products [n, n] of n sets of products, summed over their names, in float64.

    Each product is first given orthonormal rows, so that a difference may be far smaller than its two terms.
    """
    table = torch.zeros(len(products), len(products), dtype=torch.float64)
    for name in products[0]:
        clean = [orthonormal(p[name]) for p in products]
        for i, one in enumerate(clean):
            for j, two in enumerate(clean[: i + 1]):
                table[i, j] += ((two.left.T @ one.left) * (two.right @ one.right.T)).sum()
    return table + table.tril(-1).T


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition."""
    u, _, vh = torch.linalg.svd(matrix)
    return torch.matmul(u, vh)


def rotation_to(moving: Tensor, reference: Tensor, blend: float = 1.0) -> Tensor:
    """Return the orthogonal R [r, r] with the smallest ||R^T moving - reference|| (orthogonal Procrustes; both [r, k]).

    With `blend` below 1 the rotation goes only part of the way from the identity.
    """
    turn = nearest_orthogonal(wide(moving) @ wide(reference).T)
    if blend == 1:
        return turn
    return nearest_orthogonal((1 - blend) * torch.eye(turn.shape[0], dtype=turn.dtype) + blend * turn)


def ridge_factors(modules: Sequence[LoraModule], weights: Sequence[float], ridge: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) with A the weighted mean and B the mean plus the ridge correction towards the ideal product.

    The correction D minimises ||M/s - (mean B + D) mean A||^2 + ridge ||D||^2 (arXiv 2411.14961, with the squared
    distance instead of the cosine); s is the first module's scale.
    """
    wide = [(m.a.double(), m.b.double() * (m.scale / modules[0].scale)) for m in modules]
    mean = weighted_mean(({"a": a, "b": b} for a, b in wide), weights)
    a, b = mean["a"], mean["b"]
    # M/s - mean B mean A is the weighted covariance of the factors: no two large terms that cancel
    spread = [(w / float(sum(weights)), own_a - a, own_b - b) for w, (own_a, own_b) in zip(weights, wide, strict=True)]
    parts = [w * gap_b @ (gap_a @ a.T) for w, gap_a, gap_b in spread]
    projected = sum(parts[1:], parts[0])
    # by eigenvalues: none is below 0 whatever came in, so with the ridge on them nothing is singular
    values, vectors = torch.linalg.eigh(a @ a.T)
    return a, b + (projected @ vectors / (values.clamp(min=0) + ridge)) @ vectors.T


def regauge(module: LoraModule, gauge: Tensor) -> LoraModule:
    """Return the same delta in another gauge: (B G, G^-1 A)."""
    return replace(module, b=module.b @ gauge, a=torch.linalg.solve(gauge, module.a))
