"""Tiles against the mask that they stand for, pair by pair: what each shows, and that all together show it once."""

import random

import pytest

from nn.tile_cases import drawn, sees, tokens
from tessera.nn.context.tiles import Tile, area, blocks, tiles, visible


def shown(tile):
    """The pairs that a tile shows, counted from its own first query and key."""
    pairs = ((i, j) for i in range(tile.q1 - tile.q0) for j in range(tile.k1 - tile.k0))
    behind = {(i, j): tile.behind + i - j for i, j in pairs}
    return {
        pair
        for pair, far in behind.items()
        if not (tile.causal and far < 0) and (tile.window is None or far < tile.window)
    }


def check(queries, keys, bounds, window=None):
    """Every visible pair is in one tile, no other is in any; areas and forms are as promised. Returns the tiles."""
    held_queries, held_keys, found = tokens(queries), tokens(keys), tiles(queries, keys, bounds, window)
    pairs = []
    for tile in found:
        seen = shown(tile)
        assert len(seen) == area(tile)
        assert {i for i, _ in seen} == set(range(tile.q1 - tile.q0)), "a query that sees nothing"
        assert {j for _, j in seen} == set(range(tile.k1 - tile.k0)), "a key that nobody sees"
        assert held_queries[tile.q0] - held_keys[tile.k0] == tile.behind
        if tile.causal:
            assert tile.behind == 0 and tile.window is None and tile.q1 - tile.q0 == tile.k1 - tile.k0
            assert held_queries[tile.q0 : tile.q1] == held_keys[tile.k0 : tile.k1]
        if tile.window is not None:  # a triangle upside down
            side = range(tile.q1 - tile.q0)
            assert len(side) > 1 and seen == {(i, j) for i in side for j in side if i <= j}
            assert tile.k1 - tile.k0 == len(side)
        if window is not None and (tile.causal or tile.window is not None):
            assert max(tile.q1 - tile.q0, tile.k1 - tile.k0) <= window
        pairs += [(held_queries[tile.q0 + i], held_keys[tile.k0 + j]) for i, j in seen]
    assert len(pairs) == len(set(pairs)), "a pair is in two tiles"
    assert set(pairs) == {(q, k) for q in held_queries for k in held_keys if sees(bounds, window, q, k)}
    causal = [tile.causal for tile in found]
    assert causal == sorted(causal, reverse=True), "triangles come first"
    return found


@pytest.mark.parametrize("window", [None, 1, 2, 7, 100])
def test_random_sides_and_documents(window):
    rng = random.Random(window)
    for _ in range(25):
        length = rng.randint(1, 40)
        bounds = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randint(0, 5)))})
        queries, keys = drawn(rng, length, 5), drawn(rng, length, 7)
        cut, split = rng.randint(0, len(queries)), rng.randint(0, len(keys))
        total = 0
        for side in (queries[:cut], queries[cut:]):
            for block in (keys[:split], keys[split:]):
                total += sum(map(area, check(side, block, bounds, window)))
        assert total == visible(bounds, window)


def test_a_document_without_a_window_is_one_triangle():
    assert check([(0, 9)], [(0, 9)], [0, 4, 9]) == [Tile(0, 4, 0, 4, True, 0, None), Tile(4, 9, 4, 9, True, 0, None)]


def test_neighbours_are_one_rectangle():
    """Chunks that are neighbours in the stream, or lie side by side where both are seen whole, as in a zigzag."""
    assert check([(6, 9)], [(0, 2), (2, 5)], [0, 9]) == [Tile(0, 3, 0, 5, False, 6, None)]
    assert check([(9, 12)], [(2, 4), (6, 8)], [0, 12]) == [Tile(0, 3, 0, 4, False, 7, None)]
    assert check([(3, 6), (9, 12)], [(0, 3), (12, 15)], [0, 15]) == [Tile(0, 6, 0, 3, False, 3, None)]


def test_a_window_gives_a_triangle_and_a_band_for_each_block_of_its_length():
    found = check([(0, 9)], [(0, 9)], [0, 9], 3)
    assert found[:3] == [Tile(i, i + 3, i, i + 3, True, 0, None) for i in (0, 3, 6)]
    assert found[3:] == [Tile(i, i + 2, i - 2, i, False, 2, 3) for i in (3, 6)]


def test_what_a_window_hides_is_no_tile_and_what_it_shows_whole_is_a_rectangle():
    assert check([(10, 12)], [(0, 5)], [0, 12], 5) == []
    assert check([(10, 12)], [(5, 10)], [0, 12], 20) == [Tile(0, 2, 0, 5, False, 5, None)]
    # keys 0 … 3 are too far behind query 10, key 4 behind query 11
    assert check([(10, 12)], [(0, 10)], [0, 12], 7) == [
        Tile(0, 1, 4, 5, False, 6, None),
        Tile(0, 2, 5, 10, False, 5, None),
    ]
    # queries 10 and 11 see keys 5 and 6, query 12 sees key 6
    assert check([(10, 20)], [(5, 7)], [0, 20], 7) == [
        Tile(0, 1, 0, 2, False, 5, None),
        Tile(1, 3, 0, 2, False, 6, 7),
    ]


def test_documents_of_one_token():
    assert check([(0, 3)], [(0, 3)], [0, 1, 2, 3]) == [Tile(i, i + 1, i, i + 1, True, 0, None) for i in range(3)]
    assert visible([0, 1, 2, 3]) == 3 and visible([0, 5], 2) == 1 + 4 * 2


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="window 0"):
        tiles([(0, 3)], [(0, 3)], [0, 3], 0)


@pytest.mark.parametrize(
    "tile",
    [
        Tile(2, 13, 5, 12, False, 9, None),
        Tile(2, 13, 5, 16, True, 0, None),
        Tile(3, 8, 0, 5, False, 5, 6),
        Tile(3, 10, 0, 5, False, 6, 8),  # its first two queries see all keys
    ],
    ids=["rectangle", "triangle", "band", "band with a whole part"],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 2), (20, 20)])
def test_blocks_show_what_the_tile_shows(tile, size):
    pairs = []
    for block in blocks(tile, *size):
        seen = shown(block)
        assert {i for i, _ in seen} == set(range(block.q1 - block.q0)) and len(seen) == area(block)
        assert block.q1 - block.q0 <= size[0] and block.k1 - block.k0 <= size[1]
        pairs += [(block.q0 + i, block.k0 + j) for i, j in seen]
    assert len(pairs) == len(set(pairs)) and set(pairs) == shown(tile)
