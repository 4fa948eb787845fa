"""How long a collective takes, and those of a transformer block: one function for people who estimate by hand."""

import math
from typing import Literal, NamedTuple, get_args

from tessera.core.errors import UserError
from tessera.plan.machine import Profile
from tessera.plan.traffic import ring
from tessera.sizes.bounds import at_most, of_kind, whole_number
from tessera.sizes.numbers import either

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
    bytes_per_second=300e9)`; bandwidth in bytes, not bits, and of one direction. Raises UserError, a ValueError,
    without exactly one of the two, or for values that no collective has.
    """
    if (profile is None) == (bytes_per_second is None):
        given = "neither is given" if profile is None else "both are given"
        raise UserError("bytes_per_second", None, f"is in place of a profile: {given}", "give one of the two")
    if kind not in get_args(Kind):
        raise UserError("kind", repr(kind), "is no collective", either(get_args(Kind)))
    if profile is not None:
        of_kind("profile", profile, (Profile,), "tessera.plan.cluster.profile_named gives one by its name")
    if bytes_per_second is not None:
        of_kind("bytes_per_second", bytes_per_second, (int, float), "for example 300e9")
    ranks, machines = whole_number("ranks", ranks, 1), whole_number("machines", machines, 1)
    operand_bytes = whole_number("operand_bytes", operand_bytes, 0)
    at_most("operand_bytes", operand_bytes, 2**62, "bytes of an operand")
    collectives_per_block = whole_number("collectives_per_block", collectives_per_block, 0)
    if machines > ranks:
        raise UserError("machines", machines, f"are more than {ranks} ranks", f"at most {ranks}")
    if bytes_per_second is not None and not 0 < bytes_per_second < math.inf:
        raise UserError("bytes_per_second", repr(bytes_per_second), "is no rate of a link", "for example 300e9")
    whole = operand_bytes * (ranks > 1)
    received = whole if kind in ("receive", "broadcast", "reduce") else ring(kind, whole, ranks)
    if profile is None:
        assert bytes_per_second is not None
        seconds = received / float(bytes_per_second)
    else:
        seconds = float(profile.collective_seconds(kind, received, ranks, machines))
    return CommunicationTime(received, seconds, seconds * collectives_per_block)
