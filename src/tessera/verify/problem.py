"""What is computed: a model and batches, the same for a layout and for one process.

In miniature the model keeps everything that a layout can get wrong: the family and its switches, the ratio of query to
kv heads and whether each divides by the axes that cut it, dropout, a vocabulary that does not divide. Sizes shrink.
Where a config packs samples, rows have several documents, as many in miniature as at full size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.data.batch import MicroBatch
from tessera.data.samples import IGNORED
from tessera.models.config import ModelConfig
from tessera.sizes.numbers import divisors_of

LENGTH = 11  # a prime: sequences are padded wherever tokens are cut
DOCUMENTS = 3  # of a packed row, about


@dataclass(frozen=True)
class Problem:
    """`steps` optimizer steps of `micro_batches` random batches [batch, length] through `model`.

    `packed`: a row has several documents, else it is one. `shared`: ranks share sequences, so that what they send each
    other has to matter: of a document no target is ignored but those that need no other token.
    """

    model: ModelConfig
    batch: int
    length: int
    micro_batches: int
    steps: int
    seed: int = 42
    packed: bool = False
    shared: bool = False

    def batches(self, step: int, multiple: int = 1) -> list[MicroBatch]:
        """The micro-batches of a step, rows padded to a `multiple`; some targets are ignored.

        One whole row too, in the first, unless sequences are shared.
        """
        return [self._batch(step * self.micro_batches + i, multiple) for i in range(self.micro_batches)]

    def _batch(self, number: int, multiple: int) -> MicroBatch:
        generator = torch.Generator().manual_seed(self.seed + number)
        ids = torch.randint(0, self.model.vocab_size, (self.batch, self.length), generator=generator)
        place, targets = number % self.micro_batches, ids.roll(-1, 1)
        some = torch.rand(self.batch, self.length, generator=generator) < (0.5 if self.shared else 0.1)
        begins = self._documents(generator)
        targets[some & begins if self.shared else some] = IGNORED
        if not self.shared:
            targets[:, -1] = IGNORED
            if place == 0 and self.batch > 1:
                targets[-1] = IGNORED
        first_document, positions, documents = place * self.batch, None, None
        if self.packed:
            documents = begins.flatten().cumsum(0).view_as(ids) + place * ids.numel()
            starts = torch.where(begins, torch.arange(self.length), 0).cummax(1).values
            first_document, positions = 0, torch.arange(self.length) - starts
        padding = (0, -self.length % multiple)
        ids = torch.nn.functional.pad(ids, padding)
        targets = torch.nn.functional.pad(targets, padding, value=IGNORED)
        if documents is not None and positions is not None:  # padding is a document of its own, as in the loader
            positions = torch.cat([positions, torch.arange(padding[1]).expand(self.batch, -1)], 1)
            documents = torch.nn.functional.pad(documents, padding, value=-1)
        return MicroBatch(ids, targets, int((targets != IGNORED).sum()), first_document, positions, documents)

    def _documents(self, generator: torch.Generator) -> Tensor:
        """At which tokens [batch, length] documents begin: the first of a row, and if packed some more."""
        begins = torch.zeros(self.batch, self.length, dtype=torch.bool)
        if self.packed:
            begins |= torch.rand(self.batch, self.length, generator=generator) < (DOCUMENTS - 2) / self.length
            begins[:, self.length // 2] = True
        begins[:, 0] = True
        return begins


def small_model(model: ModelConfig, layouts: Sequence[Mapping[str, int]], slices: int) -> ModelConfig:
    """`model` with two layers and the smallest sizes that every one of `layouts` can cut.

    Each layout has the sizes of inner, depth, row and col, and of ulysses where that cuts heads further; `slices` is
    the largest slice factor. Heads and kv features divide by those axes alone by which they do in `model`.
    """
    heads = math.lcm(*(sizes["inner"] * sizes["col"] * sizes.get("ulysses", 1) for sizes in layouts))
    features = math.lcm(*(math.prod(sizes.values()) for sizes in layouts)) * slices
    hidden = _at_least(32, features)
    kv_heads = _fewer(model.num_kv_heads, heads)
    kv_features = math.gcd(model.num_kv_heads * model.head_dim, heads)  # so many ranks may cut them
    head_dims = (n for n in range(4, model.head_dim, 2) if math.gcd(kv_heads * n, heads) == kv_features)
    return replace(
        model,
        vocab_size=_prime_above(max(100, heads * heads)),
        hidden_size=hidden,
        num_layers=2,
        num_heads=model.num_heads // model.num_kv_heads * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=next(head_dims, model.head_dim),
        ffn_size=_at_least(3 * hidden // 2, heads),
        max_positions=LENGTH if model.rope is None else model.max_positions,
        initializer_range=0.1,  # small models of the usual one hardly depend on their layers
    )


def small_batch(sizes: Mapping[str, int], by_heads: bool, joined: bool = False) -> int:
    """Few sequences for a layout: as many as it takes times a number that leaves tokens uneven along the other axes.

    With `by_heads` they do not divide by `inner`, so that attention cuts heads there instead of sequences; if `joined`
    by no axis that cuts tokens, so that ranks share sequences there. Nor do they divide by ring, so that no rank's
    share is whole rows.
    """
    whole, inner = sizes["depth"] * sizes["row"], sizes["inner"]
    uneven = inner * sizes["col"] * sizes.get("ring", 1) * (whole if joined else 1)
    odd = next(n for n in range(2, 100) if math.gcd(n, uneven) == 1)
    if joined:
        return odd
    return whole * odd if by_heads else whole * inner * odd


def _at_least(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _fewer(kv_heads: int, ranks: int) -> int:
    """A small divisor of `kv_heads` that divides by exactly those divisors of `ranks` by which it does."""
    fewest = math.gcd(kv_heads, ranks)
    rest = ranks // fewest
    more = (n for n in divisors_of(kv_heads // fewest) if n > 1 and math.gcd(n, rest) == 1)
    return fewest * next(more, 1)


def _prime_above(number: int) -> int:
    return next(n for n in range(number + 1, 2 * number + 2) if all(n % d for d in range(2, math.isqrt(n) + 1)))
