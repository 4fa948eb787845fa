"""How long a collective takes, and those of a transformer block: one function for people who estimate by hand."""

from typing import Literal, NamedTuple

from tessera.plan.machine import Profile
from tessera.plan.traffic import ring

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "receive"]


class CommunicationTime(NamedTuple):
    """Bytes that a rank receives in one collective, its seconds, and those of all of a block's."""

    received_bytes: int
    seconds_per_collective: float
    seconds_per_block: float


def estimate_communication_time(
    kind: Kind,
    operand_bytes: int,
    ranks: int,
    *,
    machines: int = 1,
    collectives_per_block: int = 1,
    profile: Profile | None = None,
    bytes_per_second: float | None = None,
) -> CommunicationTime:
    """Seconds of a collective over an operand of `operand_bytes` (whole, before it is cut or after it is gathered).

    With a `profile`, by its curves: latency, a root term and bandwidth, inside a machine or between `machines`. With
    `bytes_per_second` of one link instead, by the textbook formula of a ring (Patarasuk & Yuan 2009): an all-reduce
    receives 2 (n − 1) / n of the operand, a gather or scatter half of that. So the classic estimate of a Megatron block
    is one row: `estimate_communication_time("all_reduce", batch * length * width * 2, ranks, collectives_per_block=4,
    bytes_per_second=300e9)`; bandwidth in bytes, not bits, and of one direction. Raises ValueError without exactly one
    of the two, or for fewer than one rank.
    """
    if (profile is None) == (bytes_per_second is None):
        raise ValueError("give either a profile or bytes_per_second")
    if ranks < 1 or machines < 1 or operand_bytes < 0 or (bytes_per_second is not None and bytes_per_second <= 0):
        raise ValueError("ranks, machines and bytes_per_second are above 0, and bytes are not below 0")
    whole = operand_bytes * (ranks > 1)
    received = whole if kind in ("receive", "broadcast", "reduce") else ring(kind, whole, ranks)
    if profile is None:
        assert bytes_per_second is not None
        seconds = received / bytes_per_second
    else:
        seconds = float(profile.collective_seconds(kind, received, ranks, machines))
    return CommunicationTime(received, seconds, seconds * collectives_per_block)
