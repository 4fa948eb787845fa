"""Whole numbers near a given one: multiples, divisors, the nearest that fit."""

import itertools
import math
from collections.abc import Callable, Iterable


def nearest(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, in words."""
    return either(multiples_near(value, divisor))


def multiples_near(value: int, divisor: int) -> list[int]:
    """The nearest multiples of `divisor` below (from 1) and above `value`."""
    below = (value - 1) // divisor * divisor
    return [*([below] if below > 0 else []), (value // divisor + 1) * divisor]


def nearest_on_both_sides(value: int, fits: Callable[[int], bool]) -> list[int]:
    """The nearest numbers below (from 1) and above `value` that fit; one above must."""
    below = itertools.islice((n for n in range(value - 1, 0, -1) if fits(n)), 1)
    return [*below, next(n for n in itertools.count(value + 1) if fits(n))]


def both_sides(value: int, among: Iterable[int]) -> list[int]:
    """The nearest below and above `value`, where there are such."""
    numbers = sorted(among)
    return [n for n in numbers if n < value][-1:] + [n for n in numbers if n > value][:1]


def divisors_of(n: int) -> list[int]:
    """Every divisor of `n`, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def either(values: Iterable[object]) -> str:
    """`8 or 16`."""
    return " or ".join(map(str, values))
