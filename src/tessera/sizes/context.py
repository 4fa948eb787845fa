"""How many ranks share a sequence, and along which of the two sequence axes; whole numbers only.

    context_parallel_size = ring × ulysses
    ulysses               divides context_parallel_size, and the query heads of a rank
    ulysses_chunks        divides the query heads that a rank has of all its owner's tokens

`auto` takes of the degrees of `ulysses` that fit heads, chunks and a machine the one with which a rank receives the
fewest elements between machines; of equal ones the fewest inside, then the largest degree. In forward and backward, for
each of its tokens and each feature of a head, with q query heads of a rank and g kv heads that they read, each of these
repeated until U ranks get equally many, g' = g U / gcd(U, g):

    ulysses U     4 (q + g') (U - 1) / U    in chunks half as much again: q, k, v and the result come once more
    exchange      5 g' (n - 1)              k and v of n - 1 others in the forward and in the backward, half of dk, dv

with n owners of a row of one document, in zigzag, for the owner that receives most. Of packed documents exchange brings
less. It comes evenly from all owners, wherever they lie.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from tessera.core.errors import UserError
from tessera.sizes.numbers import divisors_of, either


@dataclass(frozen=True)
class ContextParallel:
    """The sequence axes as the keys of a config ask for them; None: not given."""

    size: int = 1
    mode: str = "auto"
    ulysses: int | None = None
    chunks: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of ring and ulysses; before `fitted` has chosen, those of auto are all ring.

        Raises UserError where the keys do not agree.
        """
        ulysses = self.ulysses or (self.size if self.mode == "ulysses" else 1)
        if self.size % ulysses:
            reason = f"does not divide context_parallel_size {self.size}"
            raise UserError("ulysses_size", ulysses, reason, f"ulysses_size: {either(divisors_of(self.size))}")
        if self.mode == "ulysses" and ulysses != self.size:
            reason = f"context_parallel_mode: ulysses trades heads for tokens along all {self.size} ranks"
            hint = f"ulysses_size: {self.size}, or context_parallel_mode: exchange or ring for the other ranks"
            raise UserError("ulysses_size", ulysses, reason, hint)
        return {"ring": self.size // ulysses, "ulysses": ulysses}

    @property
    def transport(self) -> str:
        """What brings keys and values along ring."""
        return "ring" if self.mode == "ring" else "exchange"


WHOLE = ContextParallel()
"""Each rank has whole sequences."""


@dataclass(frozen=True)
class Surroundings:
    """What the sequence axes meet: the query heads of a rank, the kv heads that they read, and the features of each.

    `inside`: the ranks of these axes that one machine has room for beside the tensor axes; None: all are in one.
    `rows` of a micro-batch make one stream, and `joined` ranks of tensor axes own parts of it beside each rank of ring.
    """

    heads: int
    kv_heads: int
    head_dim: int
    inside: int | None = None
    rows: int = 1
    joined: int = 1

    def near(self, size: int) -> int:
        """Of `size` ranks that follow one another, how many surely lie on one machine."""
        return math.gcd(size, self.inside or size)


class Received(NamedTuple):
    """Elements that a rank receives in one layer, for each of its tokens and features of a head."""

    inside: Fraction
    between: Fraction

    @property
    def cost(self) -> tuple[Fraction, Fraction]:
        """What is compared: links between machines are the slow ones."""
        return self.between, self.inside


def received(context: ContextParallel, ulysses: int, around: Surroundings) -> Received:
    """What attention brings inside a machine and between machines at this degree, by exchange along ring."""
    chunks, owners = context.chunks, context.size // ulysses * around.joined
    repeated = chunks * math.lcm(max(1, around.kv_heads // chunks), ulysses)
    traded = (4 if chunks == 1 else 6) * (around.heads + repeated) * Fraction(ulysses - 1, ulysses)
    sharing = owners // math.gcd(owners, around.rows)
    exchanged = 5 * repeated * (sharing - 1)
    near = max(1, around.near(context.size) // ulysses) * around.joined
    away = exchanged * Fraction(owners - near, max(1, owners - 1))
    return Received(traded + exchanged - away, away)


def degrees(context: ContextParallel, around: Surroundings) -> dict[int, Received]:
    """What is received at each degree of ulysses that fits heads and a machine, and chunks where any fits these too."""
    fitting = [n for n in divisors_of(around.near(context.size)) if around.heads % n == 0]
    if context.chunks > 1:
        fitting = [n for n in fitting if n > 1 and (around.heads // n) % context.chunks == 0] or fitting[-1:]
    return {n: received(context, n, around) for n in fitting}


def _cheapest(found: Mapping[int, Received]) -> int:
    return min(found, key=lambda n: (found[n].cost, -n))


def fitted(context: ContextParallel, around: Surroundings) -> ContextParallel:
    """With `ulysses` chosen where it is left open.

    Raises UserError, with the nearest that fit, where sizes do not.
    """
    if context.ulysses is None and context.mode == "auto":
        context = replace(context, ulysses=_cheapest(degrees(context, around)))
    heads, ulysses = around.heads, context.sizes["ulysses"]
    if heads % ulysses:
        key, value = ("ulysses_size", ulysses) if context.ulysses else ("context_parallel_mode", context.mode)
        fitting = [n for n in divisors_of(context.size) if heads % n == 0]
        reason = f"trades heads along {ulysses} ranks, and the {heads} query heads of a rank do not divide by them"
        hint = f"ulysses_size: {either(fitting)}, with context_parallel_mode: exchange or ring, or leave both to auto"
        raise UserError(key, value, reason, hint)
    if context.chunks > 1 and ulysses == 1:
        reason = "cuts the heads that ulysses trades, and here it trades none"
        raise UserError("ulysses_chunks", context.chunks, reason, "ulysses_chunks: 1, or a ulysses_size above 1")
    if (heads // ulysses) % context.chunks:
        reason = f"does not divide the {heads // ulysses} query heads that a rank has after ulysses {ulysses}"
        hint = f"ulysses_chunks: {either(divisors_of(heads // ulysses))}"
        raise UserError("ulysses_chunks", context.chunks, reason, hint)
    return replace(context, ulysses=ulysses)


def in_words(context: ContextParallel, around: Surroundings) -> str:
    """How the ranks share a sequence and, of auto, why: for a `context` that `fitted` gives, `around` as there.

    E.g. "8 ranks = ulysses 2 × exchange 4: the 6 query heads of a rank allow ulysses 1 or 2, with 13,440 or
    7,296 elements to receive a token and layer (rows of one document)".
    """
    ring, ulysses = context.sizes["ring"], context.sizes["ulysses"]
    parts = [f"ulysses {ulysses}"] * (ulysses > 1) + [f"{context.transport} {ring}"] * (ring > 1)
    said = f"{context.size} ranks = {' × '.join(parts)}"
    if context.mode != "auto":
        return said
    found, apart = degrees(context, around), around.near(context.size) < context.size
    if ulysses != _cheapest(found):
        return f"{said}, as ulysses_size says"
    limits = f"the {around.heads} query heads of a rank" + " and its machine" * apart
    if list(found) == [1]:
        return f"{said}: {limits} allow no ulysses"

    def elements(of: Received) -> str:
        inside, between = (f"{round(part * around.head_dim):,}" for part in of)
        return f"{inside} + {between}" if apart else inside

    where = ", inside + between machines, where fewest count first" * apart
    return (
        f"{said}: {limits} allow ulysses {either(found)}, with {either(map(elements, found.values()))} "
        f"elements to receive a token and layer{where} (rows of one document)"
    )


def query_heads(num_heads: int, axes: Mapping[str, int], by_heads: bool) -> int:
    """The query heads of a rank; `by_heads`: they are cut over inner too."""
    return num_heads // (axes["col"] * (axes["inner"] if by_heads else 1))
