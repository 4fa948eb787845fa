"""The measure of sameness: a difference relative to its reference, or to a thousandth of the global one."""

import torch
from torch import Tensor


def error(value: Tensor, reference: Tensor, whole_norm: float = 0.0) -> float:
    """‖value − reference‖ / max(‖reference‖, whole_norm / 1000): some exact gradients are zero."""
    scale = max(reference.norm().item(), 1e-3 * whole_norm, 1e-300)
    return (value - reference).norm().item() / scale


def worst(values: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error over a named set and its name; the names must be the same."""
    assert values.keys() == references.keys(), values.keys() ^ references.keys()
    whole = torch.stack([r.double().norm() for r in references.values()]).norm().item()
    return max((error(values[n].double(), references[n].double(), whole), n) for n in references)
