"""A tensor in few bits, in blocks with a scale each (Dettmers et al. 2022): as float32 values, and from them again.

A block's values are qmap[code] · scale, and nothing but these values goes into an update. `take` finds codes and scales
that give the very values of a block which `values` has given, so that a state goes on exactly through a checkpoint of
values. What was in other blocks is quantised as the libraries do: the scale is the largest magnitude.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Quantised:
    """`codes` [n] index the ascending `qmap`, or two of them lie in each where `packed`; `scale` is one a block."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor
    block: int
    packed: bool = False

    def values(self) -> Tensor:
        """The float32 values, flat."""
        codes = self.codes.reshape(-1)
        if self.packed:
            codes = torch.stack([codes >> 4, codes & 0b1111], -1).reshape(-1)
        values = self._blocks(self.qmap[codes.int()]) * self.scale.view(-1, 1)
        return values.reshape(-1)[: codes.numel()]

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Hold these values, exactly where they were held in the same blocks."""
        wanted = self._blocks(values.reshape(-1).float())
        largest = wanted.abs().amax(1)
        codes, scale = self._nearest(wanted, largest), largest
        for candidate in self._other_scales(largest):
            wrong = (self.qmap[codes] * scale.view(-1, 1) != wanted).any(1)
            if not wrong.any():
                break
            scale = torch.where(wrong, candidate, scale)
            codes = torch.where(wrong.view(-1, 1), self._nearest(wanted, candidate), codes)
        still_wrong = (self.qmap[codes] * scale.view(-1, 1) != wanted).any(1)
        scale = torch.where(still_wrong, largest, scale)
        codes = torch.where(still_wrong.view(-1, 1), self._nearest(wanted, largest), codes)
        flat = codes.reshape(-1)[: values.numel()].to(torch.uint8)
        if self.packed:
            flat = flat[::2] << 4 | flat[1::2]
        self.codes.copy_(flat.view(self.codes.shape))
        self.scale.copy_(scale)

    def _other_scales(self, largest: Tensor) -> list[Tensor]:
        """Scales of a block whose largest magnitude is negative: its code is the lowest of qmap, which is not -1."""
        lowest = self.qmap[0].abs()
        if self.qmap[0] >= 0:
            return []
        middle = largest / lowest
        above, below = torch.full_like(middle, torch.inf), torch.zeros_like(middle)
        up, down = torch.nextafter(middle, above), torch.nextafter(middle, below)
        return [middle, up, down, torch.nextafter(up, above), torch.nextafter(down, below)]

    def _nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        shares = values / torch.where(scale > 0, scale, 1).view(-1, 1)
        return torch.bucketize(shares, (self.qmap[1:] + self.qmap[:-1]) / 2)

    def _blocks(self, flat: Tensor) -> Tensor:
        """[blocks, block]; the last one is filled up with zeros."""
        return F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
