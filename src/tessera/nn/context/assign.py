"""Which rank owns which tokens of a packed stream: equal tokens, balanced attention, little to receive. Integers only.

Attention is causal within each document, so a token at position p costs p + 1 keys, or its window if that is less. The
stream is cut into a few blocks for each owner. Where a block begins inside a document, its tiles read the keys from
there back to the document's start, or as far as its window goes. What of these the owner does not hold lies after its
previous block, whose own tiles reach further back. So an owner receives, summed over its blocks,

    min(window - 1, start of the block - the later of (start of its document, end of the owner's previous block))

and a swap of two blocks changes that sum only at these two and at the owners' next blocks. From the blocks in
order, and again in zigzag, swaps lower the work above a limit plus what is received, until a pass over all blocks gains
little; the cheapest plan is taken. With many blocks the cheaper of the two starts has to do.
Nothing is drawn and no clock is read: from the same bounds every rank of every machine makes the same plan.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

Chunk = tuple[int, int]  # the tokens first … end - 1 of a packed stream
Windows = Sequence[tuple[int | None, int]]  # (window, or None for all earlier tokens; the layers that have it)

BLOCKS_EACH, BLOCKS = 8, 1024  # blocks of an owner; the most of all owners, but at least two each
TWO_STARTS = 256  # blocks; with more, swaps go from the cheaper start alone (measured: plans that cost 1% more at most)
TRIES_EACH = 100  # swaps tried for each block of the stream; streams with long documents take some 40
LIMITS = (105, 101)  # percent of the mean work that cost an owner nothing: loose first, so that blocks can move
WORTH = 200, 1000  # at each limit swaps end where a pass gains, or could gain, less than 1/200, 1/1000 of the mean work
TRAFFIC_WEIGHT = 2, 10  # what an all-gather moves counts as much as work that is 2/10 of the mean above it


def assign(bounds: Sequence[int], owners: int, windows: Windows = ((None, 1),)) -> tuple[tuple[Chunk, ...], ...]:
    """For each owner the chunks of the stream that it owns: ascending, neighbouring ones merged.

    `bounds` has the first token of each document, and the number of tokens at the end; every owner gets an equal share.
    `windows` has the windows of the model's layers, with the number of layers each: one plan for their summed work.
    One document without windows is cut in zigzag: 2 * owners blocks, the r-th from either end to owner r. E.g. the
    bounds 0 8 and 2 owners: ((0, 2), (6, 8)) and ((2, 6),).
    Raises ValueError if the tokens do not divide by `owners`, or a window or its number of layers is below 1.
    """
    tokens = bounds[-1]
    if owners < 1 or tokens < 1 or tokens % owners:
        raise ValueError(f"{tokens} tokens do not divide by {owners} owners")
    if not windows or any(layers < 1 or (window is not None and window < 1) for window, layers in windows):
        raise ValueError(
            f"windows are pairs of a window, at least 1 or None, and its layers, at least 1: not {windows}"
        )
    if owners == 1:
        return (((0, tokens),),)
    before = _Area(bounds, windows)
    edges = _edges(before, owners)
    each = (len(edges) - 1) // owners
    if len(bounds) == 2 and all(window is None or window >= tokens for window, _ in windows):
        return _chunks(_zigzag(owners, each), owners, edges)
    blocks = _Blocks(before, owners, edges)
    plans = [_in_order(owners, each), _zigzag(owners, each)]
    starts = plans if len(blocks.work) <= TWO_STARTS else [min(plans, key=blocks.cost)]
    plans += [_swapped(blocks, plan) for plan in starts]
    return _chunks(min(plans, key=blocks.cost), owners, edges)


def work(owned: Sequence[Sequence[Chunk]], bounds: Sequence[int], windows: Windows = ((None, 1),)) -> list[int]:
    """The area of each owner's attention tiles: keys seen, summed over its tokens and over the layers.

    Arguments are as `assign` takes and returns them. E.g. one document of 8 tokens in zigzag on 2 owners: [18, 18].
    """
    before = _Area(bounds, windows)
    return [sum(before(end) - before(first) for first, end in chunks) for chunks in owned]


class _Area:
    """The area of the attention tiles of all tokens of the stream before one of them."""

    def __init__(self, bounds: Sequence[int], windows: Windows) -> None:
        self.bounds, self.windows = bounds, windows
        lengths = (end - first for first, end in pairwise(bounds))
        self.whole = list(accumulate(map(self.of_first, lengths), initial=0))

    def of_first(self, tokens: int) -> int:
        """Of the first so many tokens of a document."""
        area = 0
        for window, layers in self.windows:
            ramp = tokens if window is None else min(tokens, window)  # each sees one key more than the one before it
            area += layers * (ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp)
        return area

    def __call__(self, token: int) -> int:
        document = bisect_right(self.bounds, token) - 1
        return self.whole[document] + self.of_first(token - self.bounds[document])


def _edges(before: _Area, owners: int) -> list[int]:
    """Where the blocks of a stream begin, and its end; more blocks where an owner of the heaviest has too much work."""
    tokens = before.bounds[-1]
    each = min(tokens // owners, max(2, min(BLOCKS_EACH, BLOCKS // owners)))
    while True:
        edges = [-(-k * tokens // (owners * each)) for k in range(owners * each + 1)]
        loads = sorted(end - first for first, end in pairwise(map(before, edges)))
        least = loads[-1] + sum(loads[: each - 1])  # of the owner of the heaviest, whatever else it gets
        if 100 * owners * least <= LIMITS[-1] * sum(loads) or 2 * each * owners > min(tokens, BLOCKS):
            return edges
        each *= 2


class _Blocks:
    """The blocks of a stream: tokens, work, and what each has its owner receive.

    Block k has the tokens edges[k] … edges[k + 1] - 1. `received[k][j + 1]` are the tokens of keys and values that its
    owner receives for it, summed over the layers, if block j < k is the owner's previous one (-1: none). Block number
    `len(work)` stands for the end of the stream and receives nothing.
    """

    def __init__(self, before: _Area, owners: int, edges: list[int]) -> None:
        bounds, windows = before.bounds, before.windows
        self.owners, self.each = owners, (len(edges) - 1) // owners
        self.tokens = [end - first for first, end in pairwise(edges)]
        self.work = [end - first for first, end in pairwise(map(before, edges))]
        self.received = []
        for k, first in enumerate(edges[:-1]):
            document = bounds[bisect_right(bounds, first) - 1]
            inside = bisect_left(edges, document)  # the blocks before this one end before the document begins
            longest, *others = _seen([first - document, *(first - end for end in edges[inside : k + 1])], windows)
            self.received.append([longest] * inside + others)
        self.received.append([0] * len(edges))
        self.layers = layers = sum(count for _, count in windows)
        weight, of = TRAFFIC_WEIGHT
        # cost = most work / mean work + weight / of * received / an all-gather's, times what makes it a whole number
        self.per_work, self.per_token = of * owners * edges[-1] * (owners - 1) * layers, weight * sum(self.work)

    def cost(self, plan: list[int]) -> int:
        """What a plan, the owner of each block, costs: its largest work, and all that is received."""
        load, previous, received = [0] * self.owners, [-1] * self.owners, 0
        for block, owner in enumerate(plan):
            load[owner] += self.work[block]
            received += self.received[block][previous[owner] + 1]
            previous[owner] = block
        return self.per_work * max(load) + self.per_token * received


def _seen(gaps: list[int], windows: Windows) -> list[int]:
    """How many tokens windows see, summed over the layers, of gaps that end right before a block."""
    seen = [0] * len(gaps)
    for window, layers in windows:
        reach = gaps if window is None else [min(gap, window - 1) for gap in gaps]
        seen = [total + layers * tokens for total, tokens in zip(seen, reach, strict=True)]
    return seen


def _between(received: list[list[int]], previous: int, block: int, following: int) -> int:
    """What an owner receives more with a block between two others of its own."""
    return received[block][previous + 1] + received[following][block + 1] - received[following][previous + 1]


def _in_order(owners: int, each: int) -> list[int]:
    return [block // each for block in range(owners * each)]


def _zigzag(owners: int, each: int) -> list[int]:
    """Half of an owner's blocks from the front of the stream, the other half as far from its end."""
    halves = [(min(half, 2 * owners - 1 - half), (each + 1 - half % 2) // 2) for half in range(2 * owners)]
    return [owner for owner, blocks in halves for _ in range(blocks)]


def _swapped(blocks: _Blocks, plan: list[int]) -> list[int]:
    """A plan after swaps that lower what is received and the work above each limit in turn, while that is worth it."""
    for percent, part in zip(LIMITS, WORTH, strict=True):
        worth = blocks.per_work * sum(blocks.work) // (blocks.owners * part)
        swaps = _Swaps(blocks, plan, percent * sum(blocks.work) // (100 * blocks.owners))
        gained = left = swaps.cost()
        while min(gained, left) > worth:
            swaps.relieve()
            swaps.join()
            gained, left = left - swaps.cost(), swaps.cost()
        plan = swaps.owner
    return plan


class _Swaps:
    """A plan, changed by swaps of two blocks with as many tokens."""

    def __init__(self, blocks: _Blocks, plan: list[int], limit: int) -> None:
        self.blocks, self.owner, self.limit = blocks, list(plan), limit
        self.tries, self.done = TRIES_EACH * len(plan), 0
        self.changed = [0] * blocks.owners  # the last of the swaps done that changed an owner
        self.failed: dict[tuple[int, int], int] = {}  # the swaps done when a block found no way to its neighbour
        # of each owner its blocks in order, between the start of the stream and its end
        self.owned: list[list[int]] = [[-1] for _ in range(blocks.owners)]
        for block, owner in enumerate(plan):
            self.owned[owner].append(block)
        self.load = [sum(blocks.work[block] for block in owned[1:]) for owned in self.owned]
        for owned in self.owned:
            owned.append(len(plan))
        self.received = [
            sum(blocks.received[block][previous + 1] for previous, block in pairwise(owned)) for owned in self.owned
        ]
        self.lightest = sorted(range(len(plan)), key=blocks.work.__getitem__)
        self.neighbours = [(x, y) for x in range(len(plan)) for y in (x + 1, x - 1) if 0 <= y < len(plan)]

    def cost(self) -> int:
        """What swaps lower: the work above the limit of all owners, and what they receive."""
        above = sum(max(load - self.limit, 0) for load in self.load)
        return self.blocks.per_work * above + self.blocks.per_token * sum(self.received)

    def join(self) -> None:
        """Give owners the neighbours of their blocks."""
        owner, changed = self.owner, self.changed
        for block, other in self.neighbours:
            p, q = owner[block], owner[other]
            if p != q and self.failed.get((block, other), -1) < max(changed[p], changed[q]):
                given = self.partner(block, other)
                if given is None or not self.swap(given, other):
                    self.failed[block, other] = self.done

    def partner(self, block: int, other: int) -> int | None:
        """The first block that the owner of `block` may give for `other` so that the cost falls.

        It says what `swap` would say of each; what is the same for all is counted once, for a plan's time goes here.
        """
        blocks, work, tokens, received = self.blocks, self.blocks.work, self.blocks.tokens, self.blocks.received
        p, q, per_work, per_token = self.owner[block], self.owner[other], self.blocks.per_work, self.blocks.per_token
        owned, others = self.owned[p], self.owned[q]
        over_p, over_q = self.load[p] - self.limit + work[other], self.load[q] - self.limit - work[other]
        above = max(over_p - work[other], 0) + max(over_q + work[other], 0)
        room = above + per_token * (self.received[p] + self.received[q]) // per_work
        least, most = over_p - room, room - over_q  # other work costs more than no traffic at all saves
        to, at = bisect_left(owned, other), bisect_left(others, other)
        before, after, before_q, after_q = owned[to - 1], owned[to], others[at - 1], others[at + 1]
        with_other = _between(received, before, other, after)
        fixed = -_between(received, before_q, other, after_q)
        saved = blocks.layers * tokens[other]  # at most, where a block comes between two others
        for previous, x, following in zip(owned, owned[1:], owned[2:], strict=False):
            its = work[x]
            if not least <= its <= most or x == block or tokens[x] != tokens[other]:
                continue
            if not self.tries:
                return None
            self.tries -= 1
            rest = received[following]
            more = fixed + rest[previous + 1] - received[x][previous + 1] - rest[x + 1]
            if x == before:
                more += _between(received, previous, other, after)
            elif x == after:
                more += _between(received, before, other, following)
            else:
                more += with_other
            change = (over_p - its if over_p > its else 0) + (over_q + its if over_q > -its else 0) - above
            if per_work * change + per_token * (more - saved) >= 0:
                continue
            j = bisect_left(others, x)
            low, high = (before_q, after_q) if at <= j <= at + 1 else (others[j - 1], others[j])
            more += _between(received, low, x, high)
            if per_work * change + per_token * more < 0:
                return x
        return None

    def relieve(self) -> None:
        """Give owners above the limit lighter blocks for theirs."""
        work = self.blocks.work
        for owner in range(self.blocks.owners):
            if self.load[owner] > self.limit:
                heaviest = sorted(self.owned[owner][1:-1], key=work.__getitem__, reverse=True)
                any(self.swap(x, y) for x in heaviest for y in self.lighter(x))

    def lighter(self, block: int) -> Iterator[int]:
        """Blocks with less work, the lightest first, whose owners would have less than this one's has."""
        work, load = self.blocks.work, self.load
        for other in self.lightest:
            if work[other] >= work[block]:
                return
            if load[self.owner[other]] + work[block] - work[other] < load[self.owner[block]]:
                yield other

    def swap(self, x: int, y: int) -> bool:
        """Swap two blocks if they lie with different owners and that lowers the cost; whether it was done."""
        p, q, blocks = self.owner[x], self.owner[y], self.blocks
        if p == q or blocks.tokens[x] != blocks.tokens[y] or not self.tries:
            return False
        self.tries -= 1
        moved, load, limit = blocks.work[y] - blocks.work[x], self.load, self.limit
        above = max(load[p] + moved, limit) + max(load[q] - moved, limit) - max(load[p], limit) - max(load[q], limit)
        more_p, more_q = self.more(p, x, y), self.more(q, y, x)
        if blocks.per_work * above + blocks.per_token * (more_p + more_q) >= 0:
            return False
        self.owner[x], self.owner[y] = q, p
        load[p] += moved
        load[q] -= moved
        self.received[p] += more_p
        self.received[q] += more_q
        self.done += 1
        self.changed[p] = self.changed[q] = self.done
        for owned, old, new in ((self.owned[p], x, y), (self.owned[q], y, x)):
            owned.remove(old)
            owned.insert(bisect_left(owned, new), new)
        return True

    def more(self, owner: int, old: int, new: int) -> int:
        """What an owner receives more with block `new` in place of its block `old`."""
        owned, received = self.owned[owner], self.blocks.received
        at, to = bisect_left(owned, old), bisect_left(owned, new)
        previous, following = owned[at - 1] + 1, owned[at + 1]
        less = received[old][previous] + received[following][old + 1]
        if at <= to <= at + 1:  # no block of the owner lies between the two
            return received[new][previous] + received[following][new + 1] - less
        change = received[following][previous] - less
        previous, following = owned[to - 1] + 1, owned[to]
        return change + received[new][previous] + received[following][new + 1] - received[following][previous]


def _chunks(plan: list[int], owners: int, edges: list[int]) -> tuple[tuple[Chunk, ...], ...]:
    chunks: list[list[Chunk]] = [[] for _ in range(owners)]
    for owner, (first, end) in zip(plan, pairwise(edges), strict=True):
        if chunks[owner] and chunks[owner][-1][1] == first:
            first = chunks[owner].pop()[0]
        chunks[owner].append((first, end))
    return tuple(map(tuple, chunks))
