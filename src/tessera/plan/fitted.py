"""Measured times to the few numbers of a profile: curves of collectives, the rate of matrix products. No torch.

Both are sums of terms that a number multiplies, and no number is below zero. The numbers are those of least squares of
the relative error, so that a small message counts as much as a large one.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from tessera.plan.machine import Curve

T = TypeVar("T")
Terms = Sequence[Sequence[float]]
"""A row for each measured time, a column for each number to find."""


class Moved(NamedTuple):
    """A collective that was timed: bytes that a rank received, ranks (or machines) of the group, seconds of a call."""

    received: float
    steps: int
    seconds: float


class Multiplied(NamedTuple):
    """A matrix product that was timed: its three sizes, and seconds of a call."""

    sizes: tuple[int, int, int]
    seconds: float


class Attended(NamedTuple):
    """Attention that was timed, causal, forward and backward: its (B, H, S, Q), and seconds of a call."""

    sizes: tuple[int, int, int, int]
    seconds: float


class Fitted(NamedTuple, Generic[T]):
    """What was fitted, and the relative errors of its times: the mean, and the largest."""

    value: T
    mean_error: float
    largest_error: float


def fitted_curve(moved: Sequence[Moved], hop_share: float | None = None) -> Fitted[Curve]:
    """The curve of a kind of collective at one level, from calls of several sizes.

    Where all groups had the same number of ranks, nothing tells alpha from hops: then `hop_share` is hop over alpha, or
    without it the hops are 0. Raises ValueError where no call received anything.
    """
    if not any(each.received > 0 for each in moved):
        raise ValueError("no call received anything: there is no bandwidth to fit")
    several = len({each.steps for each in moved}) > 1
    share = 0.0 if several else (hop_share or 0.0)
    terms = [
        (1 + share * (each.steps - 1), each.steps - 1.0 if several else 0.0, each.received**0.5, each.received)
        for each in moved
    ]
    numbers, mean, largest = _least_squares(terms, [each.seconds for each in moved], positive=3)
    alpha, hop, root, inverse = map(float, numbers)
    return Fitted(Curve(alpha, hop if several else alpha * share, root, 1 / inverse), mean, largest)


def fitted_product(multiplied: Sequence[Multiplied]) -> Fitted[tuple[float, float]]:
    """FLOP/s and half of products: one of M, N, K takes 2MNK (d + half) / (d · FLOP/s), d the least of the three."""
    terms = []
    for (m, n, k), _ in multiplied:
        flops = 2.0 * m * n * k
        terms.append((flops, flops / min(m, n, k)))
    numbers, mean, largest = _least_squares(terms, [each.seconds for each in multiplied], positive=0)
    return Fitted((float(1 / numbers[0]), float(numbers[1] / numbers[0])), mean, largest)


def fitted_attention(attended: Sequence[Attended]) -> Fitted[tuple[float, float, float]]:
    """FLOP/s, half and seconds of a pair, as `machine.Profile` has them.

    A call of B rows, H heads of Q features, S tokens takes 7 BHQS (S + 2 half) / FLOP/s + BHS² · seconds of a pair.
    """
    terms = []
    for (batch, heads, tokens, features), _ in attended:
        queries = 1.0 * batch * heads * tokens
        terms.append((7 * queries * features * tokens, 14 * queries * features, queries * tokens))
    numbers, mean, largest = _least_squares(terms, [each.seconds for each in attended], positive=0)
    rate = float(1 / numbers[0])
    return Fitted((rate, float(numbers[1] * rate), float(numbers[2])), mean, largest)


def _least_squares(terms: Terms, seconds: Sequence[float], positive: int) -> tuple[Any, float, float]:
    """Numbers ≥ 0 (that in place `positive` above it), the mean and the largest relative error.

    With so few numbers, each set of those above 0 is tried.
    """
    scaled = np.asarray(terms, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    places, best = range(scaled.shape[1]), None
    for count in range(1, len(places) + 1):
        for chosen in itertools.combinations(places, count):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(scaled)), rcond=None)[0]
            if positive in chosen and (found >= 0).all() and found[chosen.index(positive)] > 0:
                numbers = np.zeros(len(places))
                numbers[list(chosen)] = found
                errors = np.abs(scaled @ numbers - 1)
                if best is None or (errors**2).sum() < (best[1] ** 2).sum():
                    best = numbers, errors
    assert best is not None, "one number alone always fits, with some error"
    return best[0], float(best[1].mean()), float(best[1].max())
