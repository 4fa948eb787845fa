"""Whole numbers, or numpy arrays of them alike: so one formula takes one layout or thousands of candidates."""

import math
from typing import Any

import numpy as np


def smaller(a: Any, b: Any) -> Any:
    """The smaller of two, element by element where one of them is an array."""
    return np.minimum(a, b) if _many(a, b) else min(a, b)


def larger(a: Any, b: Any) -> Any:
    """The larger of two, likewise."""
    return np.maximum(a, b) if _many(a, b) else max(a, b)


def rounded_up(a: Any, b: Any) -> Any:
    """The smallest whole number of times that `b` goes over `a`."""
    return -(-a // b)


def common_divisor(a: Any, b: Any) -> Any:
    """The greatest number that divides both."""
    return np.gcd(a, b) if _many(a, b) else math.gcd(a, b)


def common_multiple(a: Any, b: Any) -> Any:
    """The least number that both divide."""
    return np.lcm(a, b) if _many(a, b) else math.lcm(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`."""
    return np.where(condition, a, b) if _many(condition, a, b) else (a if condition else b)


def _many(a: Any, b: Any, c: Any = None) -> bool:
    return isinstance(a, np.ndarray) or isinstance(b, np.ndarray) or isinstance(c, np.ndarray)
