"""Rotary positions (Su et al. 2021, eq. 34), in Hugging Face's half-split form, with Llama 3's frequency scaling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# mypy: disable-error-code="no-untyped-def"


@dataclass(frozen=True)
class RopeConfig:
    """`theta` is the base of the frequencies. `factor` above 1 switches on Llama 3's scaling: wavelengths longer than
    original_max_positions / low_freq_factor are stretched by it, those shorter than original_max_positions /
    high_freq_factor are left, and between them the two are blended.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def rope_frequencies(head_dim: int, config: RopeConfig) -> Tensor:
    """The head_dim / 2 angular frequencies in float32, radians a position."""
    inverse = 1.0 / (config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if config.factor == 1.0:
        return inverse
    wavelength = 2 * math.pi / inverse
    low = config.original_max_positions / config.low_freq_factor
    high = config.original_max_positions / config.high_freq_factor
    blend = (config.original_max_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - blend) * inverse / config.factor + blend * inverse
    scaled = torch.where(wavelength > low, inverse / config.factor, inverse)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def rope_table(positions: Tensor, head_dim: int, config: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim / 2] of the angles of `positions` (integers, [S] or [B, S]), in `dtype`."""
    angles = positions.float().unsqueeze(-1) * rope_frequencies(head_dim, config).to(positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """(x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin); the backward turns the other way."""

    @staticmethod
    def forward(ctx, x_BSHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn(x_BSHD, cos_SD, sin_SD)

    @staticmethod
    def backward(ctx, dy_BSHD: Tensor):
        cos_SD, sin_SD = ctx.saved_tensors
        return _turn(dy_BSHD, cos_SD, -sin_SD), None, None


def _turn(x_BSHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """The halves turned as one: (x1, x2) · (cos, cos) + (x2, x1) · (−sin, sin)."""
    cos, sin = (torch.cat(halves, -1).unsqueeze(-2) for halves in ((cos_SD, cos_SD), (-sin_SD, sin_SD)))
    return (x_BSHD * cos).addcmul_(x_BSHD.roll(x_BSHD.shape[-1] // 2, -1), sin)


def rotate(x_BSHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the heads x [B, S, heads, head_dim] by the angles of their positions, one `table` for all rows or each."""
    return _Rotate.apply(x_BSHD, *table)
