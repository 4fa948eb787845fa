"""Streams: rows equal documents joined and cut, from any place, for any number of ranks and workers."""

import gzip
import os
import signal
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
from tests.data.helpers import TEXT, encoded, entry

from tessera.core.errors import RunFailed, UserError
from tessera.data.place import Place
from tessera.data.samples import IGNORED
from tessera.data.stream import check_beginning, find_stream, rows_of, token_batches
from tessera.data.stream_loader import StreamLoader, StreamShape
from tessera.data.tokenizer import read_loaded, write_loaded

LENGTH = 7
TEXTS = ["def add", TEXT * 3, "  ", "x", "return a - b\n" * 4]
SHAPE = StreamShape(LENGTH, 10_000)


@pytest.fixture
def given(write, settings):
    """The config of a stream of two files: rows, of which one says nothing, and a text."""
    rows = write("a.jsonl", [{"text": text, "meta": 1} for text in TEXTS])
    return settings(entry(rows), write("b.txt", TEXT))


@pytest.fixture
def stream(given):
    return find_stream(given, [])


def reference(tokenizer, count, texts=(*TEXTS, TEXT)):
    """The first `count` rows: tokens, and whether each begins a document."""
    ids, begins = [], []
    while len(ids) < count * LENGTH:
        for text in filter(str.strip, texts):
            own = [*encoded(tokenizer, [text])[0].tolist(), tokenizer.eos_id]
            ids += own
            begins += [True] + [False] * (len(own) - 1)
    cuts = [slice(row * LENGTH, (row + 1) * LENGTH) for row in range(count)]
    return [ids[cut] for cut in cuts], [begins[cut] for cut in cuts]


START = Place()


def rows(stream, count, place=START):
    return list(islice(rows_of(token_batches(stream, place, size=50), place, LENGTH), count))


def loader(stream, **changes):
    given = {"shape": SHAPE, "micro_batch_size": 2, "accumulation": 2, "workers": 0} | changes
    return StreamLoader(stream, **given)


def steps(loader, first, last):
    """The rows of these steps on one rank: [step][accumulation][row]."""
    return [[batch.input_ids.tolist() for batch in loader.step_batches(step)] for step in range(first, last)]


def test_rows_are_the_documents_joined_and_cut_pass_after_pass(stream, tokenizer):
    expected, begins = reference(tokenizer, 60)
    found = rows(stream, 60)
    assert [row.tokens.tolist() for row in found] == expected
    assert [[at for at in range(1, LENGTH) if own[at]] for own in begins] == [list(row.begins) for row in found]
    assert found[-1].following.shard > 2  # a pass is over


def test_the_stream_goes_on_from_the_place_of_any_row(stream):
    whole = rows(stream, 40)
    assert {place.token for place in (row.following for row in whole)} > {7, 14}  # in the middle of documents
    for row in range(39):
        (again,) = rows(stream, 1, whole[row].following)
        assert (again.tokens.tolist(), again.following) == (whole[row + 1].tokens.tolist(), whole[row + 1].following)


def test_documents_before_the_place_are_not_tokenized(stream):
    tokenized = next(token_batches(stream, Place(0, 3, 1)))
    assert (tokenized[0].shard, tokenized[0].document) == (0, 3)


def test_workers_take_turns(stream):
    shares = [token_batches(stream, START, share, 3, size=10) for share in range(3)]
    merged = (next(shares[number % 3]) for number in range(10**6))
    found = [row.tokens.tolist() for row in islice(rows_of(merged, START, LENGTH), 40)]
    assert found == [row.tokens.tolist() for row in rows(stream, 40)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_data_ranks_and_go_on_at_another_number(stream, tokenizer, ranks):
    expected, _ = reference(tokenizer, 32)
    first = loader(stream, accumulation=4)
    first_rows = steps(first, 0, 2)
    others = [loader(stream, accumulation=4 // ranks, data_rank=rank, data_ranks=ranks) for rank in range(ranks)]
    for other in others:
        other.start_at(2, first.samples_before(2), first.place(2))
    later = [steps(other, 2, 4) for other in others]
    rows_later = [
        row for step in range(2) for a in range(4 // ranks) for rank in range(ranks) for row in later[rank][step][a]
    ]
    assert [row for step in first_rows for batch in step for row in batch] + rows_later == expected
    assert others[0].samples_before(4) == 32
    for one in (first, *others):
        one.close()


def test_targets_are_the_next_tokens_and_padding_has_none(stream, tokenizer):
    one = loader(stream, shape=StreamShape(LENGTH, 10_000, length_multiple=4, pad_id=3))
    first, second = one.step_batches(0)
    expected, _ = reference(tokenizer, 4)
    assert first.input_ids.tolist() == [[*row, 3] for row in expected[:2]]
    assert second.targets.tolist() == [[*row[1:], IGNORED, IGNORED] for row in expected[2:]]
    assert first.documents is None and (first.first_document, second.first_document) == (0, 2)
    assert first.valid == 2 * (LENGTH - 1)
    one.close()


def test_isolated_documents_have_their_own_positions_and_no_target_across(stream, tokenizer):
    one = loader(stream, shape=StreamShape(LENGTH, 10_000, isolated=True))
    batches = [batch for step in range(4) for batch in one.step_batches(step)]
    expected, begins = reference(tokenizer, 16)
    for number, (own, starts) in enumerate(zip(expected, begins, strict=True)):
        batch, at = batches[number // 2], number % 2
        positions, targets = [0], own[1:] + [IGNORED]
        for token in range(1, LENGTH):
            positions.append(0 if starts[token] else positions[-1] + 1)
            if starts[token]:
                targets[token - 1] = IGNORED
        assert batch.positions[at].tolist() == positions
        assert batch.targets[at].tolist() == targets
        assert np.diff(batch.documents[at].numpy()).tolist() == [int(start) for start in starts[1:]]
    assert not {*batches[0].documents.flatten().tolist()} & {*batches[1].documents.flatten().tolist()}
    one.close()


def test_processes_give_the_same_and_end(stream):
    alone, helped = loader(stream), loader(stream, workers=2)
    assert steps(helped, 0, 3) == steps(alone, 0, 3)
    processes = [worker._process for worker in helped._workers]
    assert len(processes) == 2
    alone.close()
    helped.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_a_killed_worker_fails_the_run(stream):
    one = loader(stream, workers=1)
    one.step_batches(0)
    os.kill(one._workers[0]._process.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="has ended"):
        steps(one, 1, 10_000)
    one.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_further_on_fails_the_run_when_it_comes_to_that(write, settings, workers):
    content = b"".join(b'{"text": "%s"}\n' % (b"x" * 20) for _ in range(1500)) + b"no row\n"
    stream = find_stream(settings(entry(write("a.jsonl.gz", gzip.compress(content)))), [])
    check_beginning(stream, LENGTH, 10_000)
    one = loader(stream, workers=workers)
    one.step_batches(0)
    with pytest.raises(RunFailed, match=r"a\.jsonl\.gz.*1501"):
        steps(one, 1, 10_000)
    one.close()


def test_so_many_steps_are_kept_ready(stream):
    one = loader(stream, prefetch=3)
    with patch.object(one, "_assemble", wraps=one._assemble) as made:
        one.step_batches(0)
        while one._ready.qsize() < 3:
            pass
        one.close()
    assert 4 * 2 <= made.call_count <= 5 * 2  # taken, ready, and at most one that waits for room


def test_a_stream_takes_texts_alone(write, settings):
    path = write("a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match="whole texts alone"):
        find_stream(settings(entry(path, "alpaca")), [])
    with pytest.raises(UserError, match="must be a string"):
        check_beginning(find_stream(settings(entry(path)), []), LENGTH, 10_000)


def test_a_stream_without_any_text_is_refused(write, settings):
    stream = find_stream(settings(entry(write("a.jsonl", [{"text": " "}]))), [])
    with pytest.raises(UserError, match="holds no text"):
        check_beginning(stream, LENGTH, 10_000)


def test_a_token_without_embedding_is_refused(stream):
    with pytest.raises(UserError, match="outside the model's vocabulary of 5"):
        check_beginning(stream, LENGTH, 5)
    with pytest.raises(RunFailed, match="outside the model's vocabulary of 5"):
        loader(stream, shape=StreamShape(LENGTH, 5)).step_batches(0)


def test_the_files_are_not_read_whole_before_the_run(given):
    with patch("tessera.data.sources._digest", side_effect=AssertionError):
        key = find_stream(given, []).key
    given.datasets.reverse()
    assert find_stream(given, []).key != key


@pytest.mark.parametrize("split", [False, True])
def test_a_tokenizer_is_handed_over_as_it_is_loaded(stream, tmp_path, split):
    given = stream.tokenizer
    given.backend.encode_special_tokens = split
    write_loaded(given, tmp_path / "loaded.json")
    found = read_loaded(tmp_path / "loaded.json")
    assert found == replace(given, backend=found.backend) and found.digest() == given.digest()
    assert len(found.backend.encode("<|endoftext|>").ids) == len(given.backend.encode("<|endoftext|>").ids)
    assert found.backend.encode(TEXT).ids == given.backend.encode(TEXT).ids


def test_skip_passes_over_the_first_rows(write, settings, tokenizer):
    write("d/a.jsonl", [{"text": "x"}, {"text": "y"}])
    folder = write("d/b.jsonl", [{"text": text} for text in TEXTS]).parent
    stream = find_stream(settings(entry(folder, skip=3)), [])
    expected, _ = reference(tokenizer, 20, TEXTS[1:])
    assert [row.tokens.tolist() for row in rows(stream, 20)] == expected
    with pytest.raises(UserError, match="leaves no row"):
        find_stream(settings(entry(folder, skip=7)), [])
