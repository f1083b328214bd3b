"""Robust rules in product space, as weights: they see only the Gram matrix of the updates.

With G_ij = <dW_i - dW, dW_j - dW> all pairwise distances are known, without a dense matrix and whatever gauge a
client chose. A rule turns equal weights of the clients into others. What it promises of the products holds of the model
only where that is made of the products: a method that averages factors can be moved anywhere by factors whose product
looks honest, and is refused. Rules on single coordinates (median, trimmed mean) cannot be had from the Gram matrix;
`trimmed` drops whole clients. `foolsgold` is after clients that are alike, and does not bound what one of them does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.types import RunFailedError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config.schema import RobustSettings

# squared distances below this share of the squared sizes that they are made of are rounding
SAME = 1e-13
# how much pull may be left where the geometric median stands still, and where `iterations` are over: shares of one
# client's; with n = 2f + 1 any share below 1 leaves a bound
STILL, NEARLY = 0.01, 0.1
# how many times the median distance from the mean an update may have, for the mean to be looked at as the median
APART = 1e3

Rule = Callable[..., "Tensor"]  # of inner products, weights and settings; those in ITERATING also take `note`


def fewest(settings: RobustSettings) -> int:
    """Return how many updates per round needs for the rule, and a clip at the median, to mean anything.

    Krum is defined for n >= 2f + 3 (arXiv 1703.02757); the others need more honest updates than `malicious` ones. A
    clip at a number, and FoolsGold, look at updates without such a count.
    """
    f = settings.malicious
    if settings.rule in ("krum", "multi-krum"):
        return 2 * f + 3
    return 2 * f + 1 if counts(settings) else 1


def counts(settings: RobustSettings) -> bool:
    """Tell whether a number of malicious clients, and so of updates, matters to the settings."""
    return settings.rule in COUNTING or settings.clip_norm == "median"


def remaining(settings: RobustSettings, updates: int, refused: int) -> RobustSettings:
    """Return the settings with as many malicious clients as may be among the updates that are left.

    A reply that is refused for what it holds comes from one of the malicious clients, so each leaves one fewer; but
    that is only made use of where the updates would be too few otherwise.
    """
    least = max(0, settings.malicious - refused)
    for malicious in range(settings.malicious, least, -1):
        tried = settings.model_copy(update={"malicious": malicious})
        if updates >= fewest(tried):
            return tried
    return settings.model_copy(update={"malicious": least})


def needs(settings: RobustSettings) -> str:
    """Say as a sentence what `fewest` returns."""
    what = f'rule = "{settings.rule}"' if settings.rule in COUNTING else 'clip_norm = "median"'
    return f"robust.{what} with malicious = {settings.malicious} needs {fewest(settings)} updates per round"


def distances(gram: Tensor) -> Tensor:
    """Return squared distances [n, n] from inner products [n, n]."""
    squares = gram.diag()
    return (squares[:, None] + squares[None] - 2 * gram).clamp(min=0)


def krum_scores(gram: Tensor, malicious: int) -> Tensor:
    """Return each update's sum of squared distances to its n - f - 2 nearest others (arXiv 1703.02757)."""
    near = max(1, gram.shape[0] - malicious - 2)  # at least malicious + 1 where `fewest` is kept
    return distances(gram).sort(dim=1).values[:, 1 : near + 1].sum(dim=1)


def _selected(weights: Tensor, order: Tensor, count: int) -> Tensor:
    kept = weights.new_zeros(weights.shape)
    kept[order[:count]] = weights[order[:count]]
    return kept


def krum(gram: Tensor, weights: Tensor, settings: RobustSettings) -> Tensor:
    """Keep the one update with the best Krum score."""
    return _selected(weights, krum_scores(gram, settings.malicious).argsort(stable=True), 1)


def multi_krum(gram: Tensor, weights: Tensor, settings: RobustSettings) -> Tensor:
    """Keep the n - f updates with the best Krum scores."""
    order = krum_scores(gram, settings.malicious).argsort(stable=True)
    return _selected(weights, order, max(1, len(weights) - settings.malicious))


def _to_mean(gram: Tensor, shares: Tensor) -> Tensor:
    """Return each update's distance to the weighted mean."""
    return (gram.diag() - 2 * gram @ shares + shares @ gram @ shares).clamp(min=0).sqrt()


def _nearness(gram: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return each update's distance to the weighted mean, and which are that point as far as float64 can tell."""
    squares = _to_mean(gram, shares).square()
    size = gram.abs()
    return squares.sqrt(), squares <= SAME * (size.diag() + 2 * size @ shares + shares @ size @ shares)


def _weiszfeld(gram: Tensor, weights: Tensor, shares: Tensor) -> tuple[Tensor, float]:
    """Return Weiszfeld's next point, and which share of one client's pull this one has (Vardi and Zhang, PNAS 2000).

    Every update pulls with its weight towards itself. Those at the point itself hold it with their weights.
    """
    far, here = _nearness(gram, shares)
    pull = (weights / far).masked_fill(here, 0)
    force = pull - pull.sum() * shares
    strength, held = float((force @ gram @ force).clamp(min=0).sqrt()), float(weights[here].sum())
    if strength <= held:
        return shares, 0.0
    stay = held / strength
    return stay * shares + (1 - stay) * pull / pull.sum(), (strength - held) / float(weights.min())


def _even(gram: Tensor, shares: Tensor) -> bool:
    """Tell whether no update is so far away that the others seem to be at the mean."""
    far, here = _nearness(gram, shares)
    far = far.masked_fill(here, 0).sort().values
    return float(far[-1]) <= APART * float(far[(len(far) - 1) // 2])


def geometric_median(
    gram: Tensor, weights: Tensor, settings: RobustSettings, note: Callable[[str], object] = bool
) -> Tensor:
    """Return the weights of the point with the least sum of distances (arXiv 1912.13445).

    The iteration starts from the mean, where that is the point already, or else from the best update; if the point is
    an update, it is that one. It ends where the pulls on the point cancel, not after a number of steps: only then does
    what the rule promises hold. A point that is nearly there when the steps are over is used, and noted.

    Raises:
        RunFailedError: the point still moves after `iterations` steps.
    """
    shares = weights / weights.sum()
    if _even(gram, shares) and _weiszfeld(gram, weights, shares)[1] <= STILL:
        return weights
    best = int((distances(gram).sqrt() @ weights).argmin())
    shares = shares.new_zeros(shares.shape).index_fill(0, shares.new_tensor([best]).long(), 1)
    for _ in range(settings.iterations):
        following, pull = _weiszfeld(gram, weights, shares)
        if pull <= STILL:
            return shares * weights.sum()
        shares = following
    pull = _weiszfeld(gram, weights, shares)[1]
    told = f"the geometric median still moves after robust.iterations = {settings.iterations}"
    if pull > NEARLY:
        raise RunFailedError(f"{told}; allow more of them")
    note(f"{told}, pulled by {pull:.2g} of one client")
    return shares * weights.sum()


def trimmed(gram: Tensor, weights: Tensor, settings: RobustSettings, note: Callable[[str], object] = bool) -> Tensor:
    """Drop the f updates farthest from the geometric median."""
    centre = geometric_median(gram, weights, settings, note)
    order = _to_mean(gram, centre / centre.sum()).argsort(stable=True)
    return _selected(weights, order, max(1, len(weights) - settings.malicious))


def foolsgold(gram: Tensor, weights: Tensor, settings: RobustSettings) -> Tensor:
    """Weigh down updates that are alike (arXiv 1808.04866, without memory of earlier rounds)."""
    norms = gram.diag().clamp(min=0).sqrt().clamp(min=1e-300)
    alike = (gram / (norms[:, None] * norms[None])).fill_diagonal_(0)
    most = alike.max(dim=1).values + 1e-5
    pardoned = torch.where(most[:, None] < most[None], alike * (most[:, None] / most[None]), alike)
    honest = (1 - pardoned.max(dim=1).values).clamp(0, 1)
    honest = (honest / honest.max().clamp(min=1e-12)).clamp(1e-12, 0.99)
    logit = ((honest / (1 - honest)).log() + 0.5).clamp(0, 1)
    # nobody left: everyone is alike, which says nothing against anyone
    return weights * logit if bool((logit > 0).any()) else weights


def _farthest(gram: Tensor, left: Tensor) -> int:
    """Return which of the updates that are left lies farthest from their mean along their main direction of spread."""
    shares = left / left.sum()
    centred = gram - (gram @ shares)[:, None] - (shares @ gram)[None] + shares @ gram @ shares
    centred = centred * left[:, None] * left[None]
    axis = torch.linalg.eigh((centred + centred.T) / 2).eigenvectors[:, -1]
    return int((axis.abs() * left).argmax())


def dnc(gram: Tensor, weights: Tensor, settings: RobustSettings) -> Tensor:
    """Drop f updates, one by one, that lie farthest along the main direction of spread (after DnC, NDSS 2021).

    The published rule drops all f along one direction, where a second malicious client need only stay near the mean of
    that one to be kept, however far away it is; so the direction is found anew after each. It also looks at random
    coordinates only, to bear the dimension; the Gram matrix needs no such thing.
    """
    left = weights.new_ones(weights.shape)
    for _ in range(min(settings.malicious, len(weights) - 1)):
        left[_farthest(gram, left)] = 0
    return weights * left


COUNTING = ("krum", "multi-krum", "geometric-median", "trimmed", "dnc")  # rules that `malicious` is a count for
ITERATING = ("geometric-median", "trimmed")
DROPPING = ("multi-krum", "trimmed", "dnc")  # rules that drop so many clients and take the others as they are
RULES: dict[str, Rule] = {
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "trimmed": trimmed,
    "foolsgold": foolsgold,
    "dnc": dnc,
}


def clip_shares(gram: Tensor, weights: Tensor, limit: float) -> tuple[Tensor, float]:
    """Return weights in which no update counts for more than norm `limit`, and the weight that is left over.

    w_i min(1, C / ||dW_i||) of each update and the rest of the unchanged model is the clipped mean exactly.

    Args:
        gram: of the updates.
        weights: of each.
        limit: C; 0 takes the median norm (adaptive).
    """
    norms = gram.diag().clamp(min=0).sqrt()
    bound = limit or float(norms.sort().values[(len(norms) - 1) // 2])
    factor = (bound / norms.clamp(min=1e-300)).clamp(max=1)
    return weights * factor, float((weights * (1 - factor)).sum())
