"""Plans of a packed stream: who owns which tokens, and what each reads of the others, counted token by token."""

import json
import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest

from tessera.nn.context.assign import _Area, _Blocks, _chunks, _edges, _Swaps, _zigzag, assign, work
from tessera.nn.context.reads import reads

WINDOWS = (None, 1, 7, 1000)


def bounds_of(tokens: int, mean: float, seed: int) -> list[int]:
    """Documents of exponential lengths."""
    draw, bounds = Random(seed), [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + max(1, int(draw.expovariate(1 / mean)))))
    return bounds


def figures(owned, bounds, windows=((None, 1),)) -> tuple[float, float]:
    """The largest work over the mean; what all receive, as a share of an all-gather."""
    areas, tokens, owners = work(owned, bounds, windows), bounds[-1], len(owned)
    received = sum(
        layers * (end - first)
        for window, layers in windows
        for row in reads(owned, bounds, window)
        for ranges in row
        for first, end in ranges
    )
    layers = sum(layers for _, layers in windows)
    return max(areas) * owners / sum(areas), received / (tokens * (owners - 1) * layers)


def zigzag(tokens: int, owners: int) -> tuple:
    """Owner r has the blocks r and 2 * owners - 1 - r of 2 * owners."""
    at = [-(-k * tokens // (2 * owners)) for k in range(2 * owners + 1)]
    pairs = [((at[r], at[r + 1]), (at[2 * owners - 1 - r], at[2 * owners - r])) for r in range(owners)]
    return (*pairs[:-1], ((pairs[-1][0][0], pairs[-1][1][1]),))


def check_partition(owned, tokens: int) -> None:
    """Owned chunks are ascending and merged, of equal totals, and are the stream together."""
    for chunks in owned:
        assert all(first < end for first, end in chunks)
        assert all(before < after for (_, before), (after, _) in pairwise(chunks))
        assert sum(end - first for first, end in chunks) * len(owned) == tokens
    stream = sorted(chunk for chunks in owned for chunk in chunks)
    assert [0, *(end for _, end in stream)] == [*(first for first, _ in stream), tokens]


def seen(bounds, window):
    """Token by token, the tokens that it sees."""
    for start, end in pairwise(bounds):
        for token in range(start, end):
            yield range(max(start, token + 1 - (window or token + 1)), token + 1)


def tokens_in(ranges) -> list[int]:
    return [token for first, end in ranges for token in range(first, end)]


def random_case(draw: Random):
    owners = draw.choice([1, 2, 3, 4, 8])
    tokens = owners * draw.choice([1, 2, 3, 5, 7, 8, 9, 13, 16, 24, 25])
    count = draw.choice([1, 2, tokens, draw.randint(1, tokens)])
    bounds = [0, *sorted(draw.sample(range(1, tokens), min(count, tokens) - 1)), tokens]
    windows = [(window, draw.randint(1, 3)) for window in draw.sample(WINDOWS, draw.randint(1, 2))]
    return bounds, owners, windows


def check_by_tokens(owned, bounds, windows) -> None:
    """What `reads` and `work` say, counted token by token."""
    owner = {token: o for o, chunks in enumerate(owned) for token in tokens_in(chunks)}
    areas = [0] * len(owned)
    for window, layers in windows:
        needed = [[set() for _ in owned] for _ in owned]
        for token, keys in enumerate(seen(bounds, window)):
            areas[owner[token]] += layers * len(keys)
            for key in keys:
                if owner[key] != owner[token]:
                    needed[owner[token]][owner[key]].add(key)
        found = reads(owned, bounds, window)
        assert [[tokens_in(ranges) for ranges in row] for row in found] == [[sorted(s) for s in r] for r in needed]
        assert all(before < after for r in found for ranges in r for (_, before), (after, _) in pairwise(ranges))
    assert work(owned, bounds, windows) == areas


@pytest.mark.parametrize("seed", range(100))
def test_plans_equal_counting_token_by_token(seed):
    bounds, owners, windows = random_case(Random(seed))
    owned = assign(bounds, owners, windows)
    check_partition(owned, bounds[-1])
    check_by_tokens(owned, bounds, windows)


@pytest.mark.parametrize("seed", range(40))
def test_reads_of_any_owners_equal_counting_token_by_token(seed):
    """Neighbouring chunks are not merged here, and an owner may have nothing."""
    draw = Random(seed)
    bounds, owners, windows = random_case(draw)
    cuts = [0, *sorted(draw.sample(range(1, bounds[-1]), draw.randrange(bounds[-1]))), bounds[-1]]
    owned = [[] for _ in range(owners)]
    for chunk in pairwise(cuts):
        draw.choice(owned).append(chunk)
    check_by_tokens(owned, bounds, windows)


def case_in_blocks(seed):
    """A random case whose tokens divide by its owners, and its blocks."""
    bounds, owners, windows = random_case(Random(seed))
    owners += 1
    bounds = [owners * bound for bound in bounds]
    before = _Area(bounds, windows)
    edges = _edges(before, owners)
    return bounds, owners, windows, edges, _Blocks(before, owners, edges)


@pytest.mark.parametrize("seed", range(40))
def test_swaps_keep_count_of_work_and_traffic(seed):
    bounds, owners, windows, edges, blocks = case_in_blocks(seed)
    swaps = _Swaps(blocks, _zigzag(owners, blocks.each), 101 * sum(blocks.work) // (100 * owners))
    swaps.relieve()
    swaps.join()
    again = _Swaps(blocks, swaps.owner, swaps.limit)
    assert (swaps.owned, swaps.load, swaps.received) == (again.owned, again.load, again.received)
    owned = _chunks(swaps.owner, owners, edges)
    check_partition(owned, bounds[-1])
    assert swaps.load == work(owned, bounds, windows)
    assert swaps.received == [
        sum(layers * len(tokens_in(ranges)) for window, layers in windows for ranges in reads(owned, bounds, window)[r])
        for r in range(owners)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_block_given_for_a_neighbour_is_the_first_that_lowers_the_cost(seed):
    """Beside the cost of the plan with each pair of blocks swapped, counted anew."""
    _, owners, _, _, blocks = case_in_blocks(seed)
    deal = [owner for owner in range(owners) for _ in range(blocks.each)]
    Random(seed).shuffle(deal)
    swaps = _Swaps(blocks, deal, 101 * sum(blocks.work) // (100 * owners))

    def lowers(x: int, y: int) -> bool:
        plan = list(deal)
        plan[x], plan[y] = plan[y], plan[x]
        return blocks.tokens[x] == blocks.tokens[y] and _Swaps(blocks, plan, swaps.limit).cost() < swaps.cost()

    for block, other in swaps.neighbours:
        if deal[block] != deal[other]:
            own = [x for x, owner in enumerate(deal) if owner == deal[block] and x != block]
            assert swaps.partner(block, other) == next((x for x in own if lowers(x, other)), None)


@pytest.mark.parametrize("mean", [1, 50, 5000, 10**6])
def test_work_is_the_area_of_all_triangles(mean):
    bounds, windows = bounds_of(8 * 1111, mean, 0), [(None, 2), (100, 3)]
    lengths = [end - first for first, end in pairwise(bounds)]
    bands = [n * (n + 1) // 2 - max(0, n - 100) * (max(0, n - 100) + 1) // 2 for n in lengths]
    expected = sum(2 * n * (n + 1) // 2 + 3 * band for n, band in zip(lengths, bands, strict=True))
    assert sum(work(assign(bounds, 8, windows), bounds, windows)) == expected


@pytest.mark.parametrize("mean, share", [(1024, 0.10), (8192, 0.30), (32768, 0.55)])
def test_documents_balance_with_little_traffic(mean, share):
    streams = [bounds_of(131_072, mean, seed) for seed in range(20)]
    most, received = zip(*[figures(assign(bounds, 8), bounds) for bounds in streams], strict=True)
    assert sum(most) / 20 <= 1.05 and max(most) <= 1.10
    assert sum(received) / 20 <= share
    in_order = [[(r * 16_384, (r + 1) * 16_384)] for r in range(8)]
    assert sum(figures(in_order, bounds)[0] for bounds in streams) / 20 > 1.4  # the bound is not met by itself


@pytest.mark.parametrize("owners, mean, seed", [(32, 500_000, 0), (32, 1000, 19), (64, 65_536, 0), (64, 8192, 0)])
def test_many_owners_balance(owners, mean, seed):
    bounds = bounds_of(2**20, mean, seed)
    assert figures(assign(bounds, owners), bounds)[0] <= 1.02


def test_a_document_longer_than_others_makes_smaller_blocks():
    """Its last block would be more work than an owner's share, with eight blocks each."""
    bounds = bounds_of(2**20, 500, 18)
    owned = assign(bounds, 64)
    assert any((end - first) % 2048 for chunks in owned for first, end in chunks)
    assert figures(owned, bounds)[0] <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("owners", [32, 64])
@pytest.mark.parametrize("mean", [500, 1000, 8192, 65_536])
def test_many_owners_balance_for_every_seed(owners, mean, seed):
    bounds = bounds_of(2**20, mean, seed)
    assert figures(assign(bounds, owners), bounds)[0] <= 1.10


@pytest.mark.parametrize(
    "tokens, owners", [(131_072, 8), (2**20, 64), (2**20, 32), (8 * 15, 8), (7 * 12, 7), (3, 3), (9, 3)]
)
def test_one_document_is_zigzag(tokens, owners):
    owned = assign((0, tokens), owners)
    check_partition(owned, tokens)
    if tokens // owners > 1:
        assert owned == zigzag(tokens, owners)
    assert owned == assign((0, tokens), owners, [(None, 3), (tokens, 1)])  # a window of the whole document is none
    if tokens // owners % 2 == 0:
        most, received = figures(owned, (0, tokens))
        assert most == 1 and received <= figures(zigzag(tokens, owners), (0, tokens))[1]


def test_a_document_of_padding_after_one_costs_no_more_than_zigzag():
    bounds = (0, 131_072 - 100, 131_072)
    most, received = figures(assign(bounds, 8), bounds)
    by_zigzag = figures(zigzag(131_072, 8), bounds)
    assert most <= 1.02 and most + 0.2 * received <= by_zigzag[0] + 0.2 * by_zigzag[1]


def test_a_window_leaves_blocks_in_order():
    """With a short window alone every token costs alike, and neighbours in order receive only a window each."""
    bounds, windows = (0, 131_072), [(100, 4)]
    most, received = figures(assign(bounds, 8, windows), bounds, windows)
    assert most < 1.01 and received == 7 * 99 / (131_072 * 7)


@pytest.mark.parametrize("bounds, owners", [((0, 2, 3, 6), 4), ((0, 5), 2), ((0, 3), 0), ((0,), 1)])
def test_tokens_that_do_not_divide_are_refused(bounds, owners):
    with pytest.raises(ValueError, match=f"{bounds[-1]} tokens do not divide by {owners} owners"):
        assign(bounds, owners)


@pytest.mark.parametrize("windows", [[], [(None, 1), (0, 1)], [(7, 0)]])
def test_windows_without_tokens_or_layers_are_refused(windows):
    with pytest.raises(ValueError, match="windows are pairs"):
        assign((0, 8), 2, windows)


PLAN = """
import json, random, sys, time
from tessera.nn.context.assign import assign
if sys.argv[1] == "slow":
    sys.setprofile(lambda *_: random.random() < 0.002 and time.sleep(1e-3))
print(json.dumps(assign(json.loads(sys.argv[2]), 8, [(None, 2), (3000, 1)])))
"""


def test_a_slow_process_makes_the_same_plan():
    bounds = bounds_of(131_072, 8192, 3)
    plans = []
    for pace, seed in (("fast", "1"), ("slow", "2")):
        command = [sys.executable, "-c", PLAN, pace, json.dumps(bounds)]
        environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": seed}
        plans.append(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))
    assert plans[0] == plans[1]
