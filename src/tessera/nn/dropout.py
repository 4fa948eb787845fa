"""Dropout whose mask depends on (seed, step, layer, token, global feature) and on nothing else.

A token is its document's place in the step and its position there: no layout, packing or padding changes these.

Each element hashes its global indices with a key, so that every layout drops the same elements, a recomputed forward
drops them again, and no generator has a state to save.
"""

from torch import Tensor

from tessera.nn.initialize import hash_seed

_MIX1, _MIX2 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # the multipliers of splitmix64's finaliser, as signed 64-bit


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, whose products wrap as uint64's do."""
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: an int64 shift repeats the sign


def dropout_key(seed: int, step: int) -> int:
    """The key of one optimizer step's masks; the place of a document in the step is a part of its tokens."""
    return hash_seed("dropout", seed, step)


def keep_mask(rows: Tensor, columns: Tensor, p: float, key: int, layer: str) -> Tensor:
    """Boolean [rows, columns]: True with probability 1 − p for each pair of global indices (int64).

    Rows may be [B, rows], each b with columns of its own [B, 1, columns]: then the mask is [B, rows, columns].
    """
    row_bits = _mix(rows + hash_seed(key, layer))
    bits = _mix(row_bits.unsqueeze(-1) ^ _mix(columns + 1))
    return (bits & 0x7FFFFFFF) >= int(p * 2**31)


def dropout(x: Tensor, rows: Tensor, columns: Tensor, p: float, key: int, layer: str) -> Tensor:
    """x [T_local, F_local] with each element zero with probability p, else divided by 1 − p."""
    return x * keep_mask(rows, columns, p, key, layer).to(x.dtype).div_(1 - p)
