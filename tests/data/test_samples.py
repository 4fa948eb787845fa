"""Rows come back from disk as they went there; unigram entropy is what its formula says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.data.helpers import row, saved

from tessera.core.errors import UserError
from tessera.data import columns
from tessera.data.samples import open_samples, shuffled, unigram_entropy


def test_rows_are_mapped_views_of_int32(tmp_path):
    rows = saved(tmp_path, "train", row([1, 2, 3]), row([4, 5], [-100, 5]), row([6]))
    assert len(rows) == 3 and [rows.length(i) for i in range(3)] == [3, 2, 1]
    assert [tokens.tolist() for tokens, _ in rows] == [[1, 2, 3], [4, 5], [6]]
    assert [labels.tolist() for _, labels in rows] == [[1, 2, 3], [-100, 5], [6]]
    assert all(array.dtype == np.int32 and isinstance(array, np.memmap) for pair in rows for array in pair)
    for outside in (3, -1):
        with pytest.raises(IndexError):
            rows[outside]


def test_labels_are_written_only_where_they_differ(tmp_path):
    saved(tmp_path, "train", row([1, 2]), row([3], [3]))
    saved(tmp_path, "eval", row([1, 2]), row([3], [-100]))
    assert not (tmp_path / "train" / "labels.npy").exists()
    assert (tmp_path / "eval" / "labels.npy").exists()


def test_cut_keeps_tokens_and_labels_together():
    short = row([1, 2, 3], [-100, 2, 3]).cut(2)
    assert short.tokens.tolist() == [1, 2] and short.labels.tolist() == [-100, 2]
    assert (short.targets(), short.largest()) == (1, 2)
    assert row([1, 2], [1, 7]).largest() == 7


def test_shuffled_is_the_same_permutation_for_ever():
    assert shuffled(8, 2, 42, 0).tolist() == [4, 0, 1, 2, 3, 7, 6, 5]
    assert sorted(shuffled(1000, 1).tolist()) == list(range(1000))
    assert shuffled(1000, 1).tolist() != shuffled(1000, 2).tolist() != list(range(1000))


def test_unigram_entropy(tmp_path):
    train = saved(tmp_path, "train", row([0, 1, 1, 2]), row([3, 1], [3, -100]))  # targets 1, 1, 2
    held_out = saved(tmp_path, "eval", row([2, 1, 3]))  # targets 1, 3
    # (count + 1) / (3 + 4): p(1) = 3/7, p(3) = 1/7
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert unigram_entropy(train, held_out, 4) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_even_tokens_is_the_logarithm_of_their_number(tmp_path):
    train = saved(tmp_path, "train", row([0, *range(64)]))
    even = saved(tmp_path, "eval", row([0, *range(64)]))
    assert unigram_entropy(train, even, 64) == pytest.approx(math.log(64), rel=1e-12)


def test_lengths_of_many_rows_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 256)
    rows = saved(tmp_path, "train", *(row([0] * (1 + i % 5)) for i in range(200)))
    chosen = np.array([7, 199, 0, 3])
    assert rows.lengths(chosen).tolist() == [rows.length(i) for i in chosen] == [3, 5, 1, 4]
    content = bytearray((tmp_path / "train/offsets.npy").read_bytes())
    content[1000] ^= 1
    (tmp_path / "train/offsets.npy").write_bytes(content)
    damaged = open_samples(tmp_path, "train")
    assert damaged.lengths(np.array([3, 4])).tolist() == [4, 5]
    with pytest.raises(UserError, match=r"offsets.npy\n  is not as it was prepared"):
        damaged.lengths(np.array([3, 110]))


def test_places_in_documents_are_kept_where_a_row_has_several(tmp_path):
    packed = replace(row([5, 6, 7, 8]), positions=np.array([0, 1, 0, 1], np.int32))
    rows = saved(tmp_path / "a", "train", packed, row([9, 9]))
    assert [rows.positions(i).tolist() for i in range(2)] == [[0, 1, 0, 1], [0, 1]]
    assert packed.cut(3).positions.tolist() == [0, 1, 0]
    assert saved(tmp_path / "b", "train", row([9, 9])).positions(0) is None
