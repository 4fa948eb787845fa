"""How many ranks share a sequence, and along which of the two sequence axes; whole numbers only.

    context_parallel_size = ring × ulysses
    ulysses               divides context_parallel_size, and the query heads of a rank
    ulysses_chunks        divides the query heads that a rank has of all its owner's tokens

`auto` takes the largest `ulysses` that the heads allow inside a machine: it moves a part of q, k, v and the result that
shrinks as ranks are added, and the rest exchanges what masks need.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
            raise UserError("ulysses_size", ulysses, reason, either(divisors_of(self.size)))
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


def fitted(context: ContextParallel, heads: int, inside: int | None = None) -> ContextParallel:
    """With `ulysses` chosen where it is left open, for ranks that have so many query heads.

    `inside`: the ranks of these axes that fit into one machine beside the tensor axes; None: as many as there are.
    Raises UserError, with the nearest that fit, where sizes do not.
    """
    if context.ulysses is None and context.mode == "auto":
        allowed = [n for n in divisors_of(context.size) if heads % n == 0 and n <= (inside or context.size)]
        context = replace(context, ulysses=allowed[-1])
    ulysses = context.sizes["ulysses"]
    if heads % ulysses:
        key, value = ("ulysses_size", ulysses) if context.ulysses else ("context_parallel_mode", context.mode)
        fitting = [n for n in divisors_of(context.size) if heads % n == 0]
        reason = f"trades heads along {ulysses} ranks, and the {heads} query heads of a rank do not divide by them"
        hint = f"ulysses_size: {either(fitting)}, with context_parallel_mode: exchange or ring, or leave both to auto"
        raise UserError(key, value, reason, hint)
    if context.chunks > 1 and ulysses == 1:
        reason = "cuts the heads that ulysses trades, and here it trades none"
        raise UserError("ulysses_chunks", context.chunks, reason, "1, or a ulysses_size above 1")
    if (heads // ulysses) % context.chunks:
        reason = f"does not divide the {heads // ulysses} query heads that a rank has after ulysses {ulysses}"
        raise UserError("ulysses_chunks", context.chunks, reason, either(divisors_of(heads // ulysses)))
    return replace(context, ulysses=ulysses)


def in_words(context: ContextParallel, heads: int, inside: int | None = None) -> str:
    """How the ranks share a sequence and, of auto, why: for a `context` that `fitted` gives, other arguments as there.

    E.g. "8 ranks = ulysses 2 × exchange 4: 2 is the most that the 6 query heads of a rank allow".
    """
    ring, ulysses = context.sizes["ring"], context.sizes["ulysses"]
    parts = [f"ulysses {ulysses}"] * (ulysses > 1) + [f"{context.transport} {ring}"] * (ring > 1)
    said = f"{context.size} ranks = {' × '.join(parts)}"
    if context.mode != "auto":
        return said
    allowed = [n for n in divisors_of(context.size) if heads % n == 0]
    if ulysses == allowed[-1]:
        return f"{said}: {ulysses} is the most that the {heads} query heads of a rank allow"
    if ulysses == [n for n in allowed if n <= (inside or context.size)][-1]:
        return f"{said}: {ulysses} is the most that a machine has room for beside the tensor axes"
    return f"{said}, as ulysses_size says"


def query_heads(num_heads: int, axes: Mapping[str, int], by_heads: bool) -> int:
    """The query heads of a rank; `by_heads`: they are cut over inner too."""
    return num_heads // (axes["col"] * (axes["inner"] if by_heads else 1))
