"""Leaving out any one collective is seen, in every geometry and schedule; what changes nothing is not needed."""

import math

import pytest

from distributed.omission_cases import Case, collectives, omissions
from support.pool import pool
from tessera.layout.context import Context
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
SEEN = 1e-2

EARLY_AND_LATE = {"schedule": Schedule(prefetch=True, defer=True)}
SUMMA, CANNON, SLICES2 = ({"schedule": s} for s in (Schedule("summa"), Schedule("cannon"), Schedule(slices=2)))
REPEATED = {"sequence_parallel": False}
BY_HEADS = {"attention": HIDDEN_BY_HEADS}
OVER_DEPTH = {"weights_over": ("depth", "row")}
LINE, GRID = {"col": 4}, {"row": 2, "col": 2}
TESSERACT, CUBE = {"depth": 2} | GRID, {"inner": 2} | GRID

# every collective of meshes of four ranks
EACH = [
    Case("llama", LINE),
    Case("llama", LINE, REPEATED),
    Case("gpt2", LINE),
    Case("gpt2", LINE, REPEATED),
    Case("gpt2", GRID, EARLY_AND_LATE),
    Case("llama", GRID, REPEATED),
    Case("llama", GRID, SUMMA),
    Case("gpt2", GRID, CANNON),
    Case("llama", GRID, SLICES2),
    Case("gpt2", {"depth": 2, "row": 2}, OVER_DEPTH | SLICES2),
    Case("llama", {"depth": 2, "col": 2}),
    Case("gpt2", {"inner": 2, "col": 2}),
    Case("llama", {"inner": 2, "col": 2}, BY_HEADS, batch=3),
    Case("llama", {"inner": 2, "row": 2}, SLICES2),
]
# in three dimensions those along the third, as the grid's own are the same code as above
THIRD = [
    (Case("gpt2", TESSERACT), "depth"),
    (Case("llama", TESSERACT, OVER_DEPTH), "depth"),
    (Case("llama", TESSERACT, SUMMA), "depth"),
    (Case("gpt2", TESSERACT, CANNON), "depth"),
    (Case("llama", CUBE), "inner"),
    (Case("gpt2", CUBE, SUMMA), "inner"),
    (Case("llama", CUBE, CANNON), "inner"),
]


# what moves where ranks share sequences, of documents of which some are over all ranks
FSDP = {"fsdp": ("shard", "ring", "ulysses", "row"), "weights_over": ()}
EXCHANGE, RING = (FSDP | {"context": Context(transport)} for transport in ("exchange", "ring"))
ONE_ROW = {"context": Context("ring", joined=True), "attention": HIDDEN_BY_HEADS}
SHARED = {
    "exchange 2 × ulysses 2": Case("llama", {"ring": 2, "ulysses": 2}, EXCHANGE, 2, (12, 5, 7)),
    "ring 4": Case("llama", {"ring": 4}, RING, 2, (1, 15, 3, 13)),
}
SHARED_TOO = {
    "ring 2": Case("llama", {"ring": 2}, RING, 2, (12, 5, 7)),
    "exchange 4": Case("llama", {"ring": 4}, EXCHANGE, 2, (1, 15, 3, 13)),
    "2d 2×2, one row": Case("llama", {"row": 2, "col": 2}, ONE_ROW, 1, (16,)),
    "ring 2 × tp 2": Case("llama", {"ring": 2, "col": 2}, RING, 2, (12, 5, 7)),
}


def name(value):
    if isinstance(value, str):
        return f"along {value}"
    sizes = "×".join(f"{axis}{n}" for axis, n in value.sizes.items())
    return " ".join([value.model, sizes, *(f"{key}={option}" for key, option in value.options.items())])


def one_of_the_alike(chosen):
    """In panels the products of attention and of the MLP run the same code: one of them is enough for each place."""
    found = {at.partition(" < panel_product")[0] if "Product." in at else (at, n): (at, n) for at, n in chosen}
    return list(found.values())


def check(case, axis=None):
    ranks = pool(math.prod(case.sizes.values()))
    found = ranks.run(collectives, case)
    assert max(error for error, _ in found) <= TOLERANCE
    # Cannon's skew moves nothing on some ranks, so that not all have the same list
    everyone = list(dict.fromkeys(which for _, own in found for which in own))
    chosen = [(at, n) for at, n in everyone if axis is None or axis in at.split(":")[0]]
    if case.options.get("schedule", Schedule()).in_panels:
        chosen = one_of_the_alike(chosen)
    assert chosen, "there is no collective to leave out"
    errors = ranks.run(omissions, case, chosen, deadline=600)
    unseen = [which for which, each in zip(chosen, zip(*errors, strict=True), strict=True) if max(each) <= SEEN]
    assert not unseen, f"leaving these out went unseen: {unseen}"


@pytest.mark.parametrize("case", EACH, ids=name)
def test_leaving_out_any_collective_is_seen(case):
    check(case)


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_leaving_out_any_collective_of_shared_sequences_is_seen(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED_TOO.values(), ids=SHARED_TOO)
def test_leaving_out_any_collective_of_other_shared_sequences_is_seen(case):
    check(case)


@pytest.mark.parametrize("case, axis", THIRD, ids=name)
def test_leaving_out_any_collective_of_the_third_axis_is_seen(case, axis):
    check(case, axis)
