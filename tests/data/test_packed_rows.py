"""Micro-batches of packed samples, and of samples that hold several documents, with and without packing."""

import numpy as np
import pytest
import torch
from tests.data.helpers import PLACE, saved

from tessera.data.epochs import Packed, Singles
from tessera.data.loader import Loader
from tessera.data.samples import Sample

NO, PAD, LENGTH, COUNT = -100, 99, 16, 40


def sample(tokens, labels=None, positions=None):
    columns = (None if x is None else np.array(x, np.int32) for x in (labels, positions))
    labels, positions = columns
    return Sample(np.array(tokens, np.int32), PLACE, labels, positions=positions)


@pytest.fixture
def few(tmp_path):
    """Seven samples, the second with ignored labels."""
    lengths = [4, 7, 2, 8, 1, 3, 5]
    made = [sample(range(10 * i, 10 * i + n)) for i, n in enumerate(lengths)]
    made[1] = sample(range(10, 17), [NO] * 3 + list(range(13, 17)))
    return saved(tmp_path, "train", *made)


@pytest.fixture
def many(tmp_path):
    """COUNT samples of 1 to 12 tokens; all tokens of sample i are i, so batches tell which they hold."""
    draw = np.random.default_rng(1)
    return saved(tmp_path, "train", *(sample([i] * n) for i, n in enumerate(draw.integers(1, 13, COUNT))))


@pytest.fixture
def own(tmp_path):
    """Three rows of which the first and the last hold two and three documents."""
    return saved(
        tmp_path,
        "train",
        sample([1, 2, 3, 4, 5], positions=[0, 1, 2, 0, 1]),
        sample([6, 7, 8]),
        sample([9, 10, 11, 12], [9, NO, 11, 12], [0, 0, 0, 1]),
    )


def packed(samples, micro, accumulation, length=LENGTH, shuffle=True, **options):
    epochs = Packed(samples, length, 3, shuffle)
    return Loader(samples, epochs, micro, accumulation, 1, row_length=length, pad_id=PAD, **options)


def step_ids(loaders, step):
    """The samples of a step by the places of their documents, over all data ranks."""
    found = {}
    for batch in (batch for loader in loaders for batch in loader.step_batches(step)):
        there = batch.documents >= 0
        found |= dict(zip(batch.documents[there].tolist(), batch.input_ids[there].tolist(), strict=True))
    return [found[place] for place in sorted(found)]


def test_a_packed_row_has_its_samples_as_documents(few):
    loader = packed(few, 3, 1, 10, shuffle=False)
    assert loader.samples_per_epoch == 3
    (batch,) = loader.step_batches(0)
    assert batch.input_ids.shape == (3, 10) and batch.first_document == 0
    place = 0
    for row, documents, positions, targets in zip(
        batch.input_ids.tolist(),
        batch.documents.tolist(),
        batch.positions.tolist(),
        batch.targets.tolist(),
        strict=True,
    ):
        at = 0
        while at < 10 and row[at] != PAD:
            tokens, labels = few[row[at] // 10]
            end = at + len(tokens)
            assert row[at:end] == tokens.tolist() and documents[at:end] == [place] * len(tokens)
            assert positions[at:end] == list(range(len(tokens)))
            assert targets[at:end] == [*labels[1:].tolist(), NO], "the last label of each document is dropped"
            at, place = end, place + 1
        assert documents[at:] == [-1] * (10 - at) and targets[at:] == [NO] * (10 - at)
    assert place == 7
    assert batch.valid == sum(int((few[i][1][1:] != NO).sum()) for i in range(7)) == int((batch.targets != NO).sum())


def test_two_epochs_hold_every_token_twice(many):
    loader = packed(many, 1, 1)
    seen = []
    for row in range(loader.epochs.rows_before(2)):
        (batch,) = loader.step_batches(row)
        seen += batch.input_ids[batch.documents >= 0].tolist()
        assert batch.input_ids.shape == (1, LENGTH)
    lengths = [many.length(i) for i in range(COUNT)]
    assert sorted(seen) == sorted(i for i, n in enumerate(lengths) for _ in range(2 * n))


@pytest.mark.parametrize("micro, accumulation, ranks", [(4, 1, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2), (1, 4, 1)])
def test_the_samples_of_a_step_and_their_places_do_not_depend_on_data_ranks(many, micro, accumulation, ranks):
    alone = packed(many, 2, 2)
    shared = [packed(many, micro, accumulation, data_rank=rank, data_ranks=ranks) for rank in range(ranks)]
    for step in range(6):
        assert step_ids(shared, step) == step_ids([alone], step)
        assert all(len(batches) == accumulation for batches in (one.step_batches(step) for one in shared))


def test_ranks_of_a_step_are_dealt_equal_shares(many):
    ranks = [packed(many, 1, 3, data_rank=rank, data_ranks=2) for rank in range(2)]
    tokens = [sum(int((b.documents >= 0).sum()) for b in one.step_batches(0)) for one in ranks]
    rows = [ranks[0].epochs.samples(row) for row in range(6)]
    fills = sorted((sum(many.length(i) for i in row) for row in rows), reverse=True)
    assert tokens == [fills[0] + fills[3] + fills[4], fills[1] + fills[2] + fills[5]]


def test_a_run_that_goes_on_at_other_ranks_sees_the_same_samples(many):
    whole = [packed(many, 2, 1, data_rank=rank, data_ranks=2) for rank in range(2)]
    expected = [step_ids(whole, step) for step in range(8)]
    alone = packed(many, 1, 4)
    alone.start_at(3, whole[0].samples_before(3))
    assert [step_ids([alone], step) for step in range(3, 8)] == expected[3:]


def test_a_run_that_goes_on_with_larger_steps_takes_what_is_left(many):
    before, after = packed(many, 1, 2), packed(many, 1, 5)
    after.start_at(4, before.samples_before(4))
    rows = after.epochs.rows_in(0)
    after.last_sample = rows
    seen = [i for step in range(4) for i in step_ids([before], step)]
    seen += [i for step in range(4, after.steps_for(1)) for i in step_ids([after], step)]
    assert sorted(seen) == list(range(COUNT))
    assert after.steps_for(1) == 4 + -(-(rows - 8) // 5)


def test_steps_and_epochs_of_packed_rows(many):
    loader = packed(many, 1, 3)
    rows = loader.epochs.rows_in(0)
    assert 12 < rows < 30 and loader.samples_per_epoch == rows
    assert loader.steps_for(1) == -(-rows // 3) and loader.steps_for(2) == -(-2 * rows // 3)
    assert loader.samples_for(1.5) == rows + -(-rows // 2)
    assert [loader.epoch(step) for step in (0, 1, rows)] == [0, pytest.approx(3 / rows), 3]
    loader.last_sample = rows
    assert loader.epoch(loader.steps_for(1)) == 1
    last = loader.step_batches(loader.steps_for(1) - 1)
    after = loader.step_batches(loader.steps_for(1))
    assert {b.input_ids.shape for b in last + after} == {(1, LENGTH)}
    assert all(b.valid == 0 and (b.input_ids == PAD).all() for b in after)


def test_no_epoch_is_counted_that_a_run_does_not_reach(many, monkeypatch):
    epochs, counted = Packed(many, LENGTH, 3, True, window=10), []
    real = epochs._count
    monkeypatch.setattr(epochs, "_count", lambda epoch: counted.append(epoch) or real(epoch))
    loader = Loader(many, epochs, 1, 7, 1, row_length=LENGTH)
    loader.last_sample = loader.samples_for(1)
    last = loader.steps_for(1)
    assert loader.samples_per_step * last > loader.last_sample, "the last step has padding rows"
    loader.step_batches(last - 1)
    assert loader.epoch(last) == 1 and set(counted) == {0}


@pytest.mark.parametrize("micro, ranks", [(4, 1), (2, 2), (3, 4)])
def test_evaluation_sees_every_sample_once(many, micro, ranks):
    loaders = [packed(many, micro, 1, shuffle=False, data_rank=r, data_ranks=ranks) for r in range(ranks)]
    together = list(zip(*(one.eval_batches() for one in loaders), strict=True))
    assert len(together) == -(-loaders[0].samples_per_epoch // (micro * ranks))
    batches = [b for each in together for b in each]
    assert all(b.input_ids.shape == (micro, LENGTH) for b in batches)
    seen = [i for b in batches for i in b.input_ids[b.documents >= 0].tolist()]
    assert sorted(seen) == sorted(i for i in range(COUNT) for _ in range(many.length(i)))
    assert sum(b.valid for b in batches) == sum(many.length(i) - 1 for i in range(COUNT))


# ---- Rows that hold several documents already


def test_documents_of_a_row_are_heeded_without_packing(own):
    loader = Loader(own, Singles(3, 3, shuffle=False), 3, 1, 1, pad_id=PAD)
    (batch,) = loader.step_batches(0)
    assert batch.documents.tolist() == [[0, 0, 0, 3, 3], [1, 1, 1, -1, -1], [2, 5, 8, 8, -1]]
    assert batch.positions.tolist()[0] == [0, 1, 2, 0, 1]
    assert batch.positions.tolist()[2][:4] == [0, 0, 0, 1]
    assert batch.targets.tolist() == [[2, 3, NO, 5, NO], [7, 8, NO, NO, NO], [NO, NO, 12, NO, NO]]
    assert batch.valid == 6


@pytest.mark.parametrize("ranks", [1, 3])
def test_places_of_documents_do_not_depend_on_data_ranks(own, ranks):
    epochs = Singles(3, 3, shuffle=False)
    loaders = [Loader(own, epochs, 3 // ranks, 1, 1, data_rank=r, data_ranks=ranks) for r in range(ranks)]
    places = {}
    for batch in (loader.step_batches(0)[0] for loader in loaders):
        documents = torch.arange(len(batch.input_ids)).unsqueeze(1) if batch.documents is None else batch.documents
        places |= dict(
            zip(
                batch.input_ids.flatten().tolist(),
                (documents + batch.first_document).expand_as(batch.input_ids).flatten().tolist(),
                strict=True,
            )
        )
    assert [places[token] for token in range(1, 13)] == [0, 0, 0, 3, 3, 1, 1, 1, 2, 5, 8, 8]


def test_documents_of_a_row_are_heeded_with_packing(own):
    (batch,) = packed(own, 1, 1, 12, shuffle=False).step_batches(0)
    assert batch.input_ids.tolist() == [[*range(1, 13)]]
    assert batch.documents.tolist() == [[0, 0, 0, 3, 3, 1, 1, 1, 2, 5, 8, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 0, 1]]
    assert batch.targets.tolist() == [[2, 3, NO, 5, NO, 7, 8, NO, NO, NO, 12, NO]]


# ---- Length of rows


def test_rows_are_padded_to_a_length_that_is_given(few):
    loader = Loader(few, Singles(7, 3, shuffle=False), 2, 1, 4, row_length=10, pad_id=PAD)
    assert {b.input_ids.shape for step in range(3) for b in loader.step_batches(step)} == {(2, 12)}
    assert {b.input_ids.shape for b in loader.eval_batches()} == {(2, 12)}


# ---- The two orders


def test_the_order_before_is_kept_for_runs_that_began_in_it():
    from tessera.data.samples import EPOCH_ORDER, shuffled

    before, now = Singles(50, 7, True, version=1), Singles(50, 7, True)
    old = [before.samples(50 + place)[0] for place in range(50)]
    assert old == shuffled(50, EPOCH_ORDER, 7, 1).tolist()
    new = [now.samples(50 + place)[0] for place in range(50)]
    assert new != old and sorted(new) == sorted(old)
    with pytest.raises(ValueError, match="order 3"):
        Singles(50, 7, True, version=3)
