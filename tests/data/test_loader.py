"""The batches of a step are a pure function of the step, whatever the number of data ranks."""

import pytest
import torch
from tests.data.helpers import row, saved

from tessera.data.epochs import Singles
from tessera.data.loader import Loader


@pytest.fixture
def rows(tmp_path):
    """Ten rows of 2 to 6 tokens; row i starts with token i, so batches tell which rows they hold."""
    return saved(tmp_path, "train", *(row([i, *range(20, 21 + i % 5)]) for i in range(10)))


def loader(rows, micro=2, accumulation=2, **changes):
    order = {name: changes.pop(name, value) for name, value in {"seed": 3, "shuffle": True, "version": 2}.items()}
    given = {"length_multiple": 1, "pad_id": 99} | changes
    return Loader(rows, Singles(len(rows), **order), micro, accumulation, **given)


def ids(batches):
    return [index for batch in batches for index in batch.input_ids[:, 0].tolist()]


def test_targets_are_labels_shifted_and_padding_is_ignored(tmp_path):
    rows = saved(tmp_path, "train", row([1, 2, 3, 4], [-100, -100, 3, 4]), row([5, 6]), row([7, 8, 9]))
    (batch,) = loader(rows, 3, 1, shuffle=False, length_multiple=3).step_batches(0)
    pad, no = 99, -100
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, pad, pad], [5, 6, *[pad] * 4], [7, 8, 9, *[pad] * 3]]
    assert batch.targets.tolist() == [[no, 3, 4, no, no, no], [6, *[no] * 5], [8, 9, *[no] * 4]]
    assert batch.valid == 5
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64


def test_each_epoch_holds_every_row_once_in_its_own_order(rows):
    load = loader(rows, 1, 5)
    epochs = [ids(load.step_batches(2 * e) + load.step_batches(2 * e + 1)) for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = loader(rows, 1, 5, seed=4)
    assert ids(other.step_batches(0) + other.step_batches(1)) != epochs[0]


def test_a_step_does_not_depend_on_those_before(rows):
    fresh, used = loader(rows), loader(rows)
    for step in range(7):
        used.step_batches(step)
    for one, two in zip(fresh.step_batches(7), used.step_batches(7), strict=True):
        assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.targets, two.targets)


def test_file_order_without_shuffle(rows):
    load = loader(rows, 2, 2, shuffle=False)
    assert [ids(load.step_batches(step)) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), [(2, 2, 2), (1, 2, 4), (2, 1, 4), (8, 1, 1)])
def test_the_order_of_samples_does_not_depend_on_data_ranks(rows, micro, accumulation, ranks):
    alone = loader(rows, 2, 4)
    shared = [loader(rows, micro, accumulation, data_rank=r, data_ranks=ranks) for r in range(ranks)]
    for step in range(4):
        batches = [one.step_batches(step) for one in shared]
        joined = [index for micro_step in zip(*batches, strict=True) for index in ids(micro_step)]
        assert joined == ids(alone.step_batches(step))
        for micro_step in zip(*batches, strict=True):  # one shape on every rank
            assert len({batch.input_ids.shape for batch in micro_step}) == 1


def test_length_is_that_of_the_longest_row_of_the_micro_batch(rows):
    load = loader(rows, 5, 1, shuffle=False, length_multiple=4)
    assert load.step_batches(0)[0].input_ids.shape == (5, 8)
    short = loader(rows, 1, 2, shuffle=False)
    assert [batch.input_ids.shape for batch in short.step_batches(0)] == [(1, 2), (1, 3)]


def test_samples_beyond_the_last_are_padding_of_the_same_shape(rows):
    free, bounded = loader(rows, 2, 2), loader(rows, 2, 2, last_sample=9)
    for step in (0, 1):
        assert ids(free.step_batches(step)) == ids(bounded.step_batches(step))
    there, cut = free.step_batches(2), bounded.step_batches(2)
    for step in range(2, 12):
        shapes = [[b.input_ids.shape for b in load.step_batches(step)] for load in (free, bounded)]
        assert shapes[0] == shapes[1]
    assert torch.equal(there[0].targets[0], cut[0].targets[0]) and cut[0].valid > 0
    assert cut[0].valid == int((cut[0].targets[0] != -100).sum()) < there[0].valid
    assert (cut[0].input_ids[1] == 99).all() and (cut[1].input_ids == 99).all()
    assert cut[1].valid == 0 and (cut[1].targets == -100).all()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (4, 10), (0.1, 1)])
def test_steps_for_epochs_round_up(rows, epochs, steps):
    load = loader(rows, 2, 2)
    assert (load.samples_per_epoch, load.samples_per_step) == (10, 4)
    assert load.steps_for(epochs) == steps


@pytest.mark.parametrize(("micro", "ranks"), [(4, 1), (2, 2), (3, 4)])
def test_evaluation_sees_every_row_once_in_order(rows, micro, ranks):
    options = {"shuffle": False, "data_ranks": ranks, "length_multiple": 4}
    loaders = [loader(rows, micro, 1, data_rank=r, **options) for r in range(ranks)]
    together = list(zip(*(one.eval_batches() for one in loaders), strict=True))
    assert len(together) == -(-10 // (micro * ranks))
    seen = [index for batches in together for index in ids(batches)]
    assert [index for index in seen if index != 99] == list(range(10))
    assert all(len({b.input_ids.shape for b in batches}) == 1 for batches in together)
    assert all(b.input_ids.shape[0] == micro for batches in together for b in batches)
    assert sum(b.valid for batches in together for b in batches) == sum(rows.length(i) - 1 for i in range(10))


def test_bad_arguments(rows):
    with pytest.raises(ValueError, match="data_rank 2"):
        loader(rows, data_rank=2, data_ranks=2)
    with pytest.raises(ValueError, match="no rows"):
        loader([])


def test_floating_point_adds_no_step(tmp_path):
    fifty = loader(saved(tmp_path, "train", *(row([i, i]) for i in range(50))), 5, 1)
    assert 2.2 * 50 > 110  # as floats
    assert fifty.samples_for(2.2) == 110 and fifty.steps_for(2.2) == 22
