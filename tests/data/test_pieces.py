"""Pieces of a text, tokenized one by one, give the tokens of the whole: for tokenizers built as well-known ones are."""

import pytest
from tests.data.tokenizer_zoo import ZOO, awkward, unigram, zoo
from tokenizers import Tokenizer, models

from tessera.data.pieces import Cutter, Piece


def tokens(backend, pieces) -> list[int]:
    found: list[int] = []
    for before, text in pieces:
        skipped = len(backend.encode(before, add_special_tokens=False).ids)
        found += backend.encode(before + text, add_special_tokens=False).ids[skipped:]
    return found


def in_blocks(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("name", ZOO)
def test_pieces_give_the_tokens_of_the_whole(name):
    backend = zoo(name)
    cutter, cut, naive = Cutter(backend), 0, 0
    for seed in range(12):
        text = awkward(seed)
        whole = tokens(backend, [Piece("", text)])
        for blocks in ([text], in_blocks(text, 50)):
            pieces = list(cutter.cut(blocks, size=4))
            assert "".join(piece.text for piece in pieces) == text
            assert tokens(backend, pieces) == whole, (seed, pieces)
            cut += len(pieces) - 1
        naive += tokens(backend, [Piece("", part) for part in in_blocks(text, 4)]) != whole
    assert cut > 100 and naive == 12  # it does cut, and not every cut would do


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_pieces_of_many_texts_give_the_tokens_of_the_whole(name):
    backend = zoo(name)
    cutter = Cutter(backend)
    for seed in range(10_000, 12_000):
        text = awkward(seed, 40)
        assert tokens(backend, cutter.cut([text], size=2)) == tokens(backend, [Piece("", text)]), seed


@pytest.mark.parametrize(
    "backend",
    [unigram(None), Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})), Tokenizer(models.WordLevel({"a": 0}))],
    ids=["Unigram", "WordPiece", "WordLevel"],
)
def test_where_nothing_splits_and_scores_or_words_are_of_the_whole_text_it_stays_whole(backend):
    text = "a b, c\n" * 100
    cutter = Cutter(backend)
    assert not cutter.places and list(cutter.cut(in_blocks(text, 64), size=8)) == [Piece("", text)]


def test_a_vocabulary_that_joins_across_blanks_is_heeded():
    """A tokenizer without words: what it joins decides, character by character."""
    vocab = {token: number for number, token in enumerate(["a", "b", " ", "a ", "\n"])}
    cutter = Cutter(Tokenizer(models.BPE(vocab, [("a", " ")])))
    assert cutter.places["letter", " "] == {"a"}
    pieces = list(cutter.cut(["ab a ab a b b"], size=1))
    assert [piece.text for piece in pieces] == ["ab", " a ab", " a b", " b"]


def test_pieces_are_hardly_longer_than_asked_and_little_is_held():
    line = "some words, and more of them. "
    seen = 0

    def blocks():
        nonlocal seen
        for _ in range(200):
            seen += len(line)
            yield line

    given = 0
    for piece in Cutter(zoo("gpt2")).cut(blocks(), size=100):
        given += len(piece.text)
        assert len(piece.text) < 120 or given == 200 * len(line)
        assert seen - given < 400
