"""Long texts in pieces that are tokenized one by one, and give together the tokens of the whole.

A text may be cut between two characters where the tokens on either side do not depend on the other side:

- where the pre-tokenizer splits whatever stands before and after, for words are tokenized by themselves;
- where it never splits (SentencePiece's BPE): between two characters that no token of the vocabulary has side by side,
  for a merge across them would make such a token.

Which pairs of characters are such places is found out once for a tokenizer: its normalizer and pre-tokenizer are tried
on each pair between many neighbours, and the vocabulary is searched. Added tokens take blanks beside them along and
open the text anew, so no cut is made near one. Every piece but the first is tokenized behind the last character of the
one before, whose tokens are dropped: what a tokenizer puts at the start of a text (a blank, ▁) is at the start alone.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, product
from typing import Any, NamedTuple

from tokenizers import Tokenizer

SIZE = 1 << 14
"""Characters after which a place to cut is looked for: many words, and few beside a batch for all threads."""

_LETTERS, _DIGITS, _CLOSING = "adlmrstvzSTéʰǅ今ب", "0123456789", ".,;:!?)]}\"'>。！？」）"
_AFTER = " \n,。，"
_CONTEXTS: tuple[str, ...] = (
    *("", "a", "Z", "é", "今", "1", "42", " ", "  ", "\n", " \n", "\t", "\r\n", ".", "'", "'s", "_", "--", "</"),
    *("🙂", "\u0301", "\u00a0", "\u3000", "ﬁ", "▁", "Ġ"),
)
_FOLLOWING = (*_CONTEXTS, " a", "\na", "\n\n", "  a", ". a", "'s a", "12 ", "\n 1")
_NEAR = 64
"""Characters on each side of a cut on which the pre-tokenizer is tried once more."""


class Piece(NamedTuple):
    """A part of a text, and the character before it ("" at the start), whose tokens are not part of it."""

    before: str
    text: str


class Cutter:
    """Cuts texts for the tokenizer `backend`, which neither truncates nor pads.

    `places` are the pairs (kind of character, character after it) between which it may cut. Where words end there the
    value is None; else the characters that some token has before that character. Empty: texts stay whole.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._model: dict[str, Any] = json.loads(backend.to_str())["model"]
        kinds = {"letter": _LETTERS, "digit": _DIGITS, "closing": _CLOSING}
        found = {(kind, after): self._tried(kinds[kind], after) for kind, after in product(kinds, _AFTER)}
        self.places = {pair: joined for pair, (is_place, joined) in found.items() if is_place}
        self._after = re.compile(f"[{''.join({after for _, after in self.places})}]") if self.places else None
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        added += [self._normalized(content) for content in added]
        self._reach = max(map(len, added), default=0) + 1
        self._added = re.compile("|".join(re.escape(content) for content in set(added) if content) or r"(?!)")
        self._last = lru_cache(maxsize=4096)(self._last_symbol)

    def cut(self, blocks: Iterable[str], size: int = SIZE) -> Iterator[Piece]:
        """The pieces of the text that `blocks` make up, hardly longer than `size` characters where that is possible.

        No more of the text is held than the last block and what cannot be cut. A text without characters is one piece.
        """
        held, before, searched = "", "", 0
        margin = _NEAR + self._reach  # what is not yet seen may tell against a cut
        for block in chain(blocks, (None,)):
            held += block or ""
            start, end = 0, len(held) - margin if block is not None else len(held)
            while (place := self._find(held, max(start + size, searched), end)) is not None:
                yield Piece(before, held[start:place])
                start, before = place, held[place - 1]
            held, searched = held[start:], max(0, end - start)
        yield Piece(before, held)

    def _find(self, text: str, start: int, end: int) -> int | None:
        """The first place in `text` from `start` and before `end` where it may be cut."""
        if self._after is None or start >= end:
            return None
        places = (found.start() for found in self._after.finditer(text, start, end))
        return next((place for place in places if self._may_cut(text, place)), None)

    def _may_cut(self, text: str, place: int) -> bool:
        pair = (_kind(text[place - 1]), text[place])
        if pair not in self.places:
            return False
        near = text[max(0, place - self._reach) : place + self._reach]
        if self._added.search(near) or self._added.search(self._normalized(near)):
            return False
        joined = self.places[pair]
        if joined is not None:
            last = self._last(text[place - 1])
            return bool(last) and last not in joined
        words = self._words(text[max(0, place - _NEAR) : place])
        return self._words(text[max(0, place - _NEAR) : place + _NEAR])[: len(words)] == words

    def _tried(self, characters: str, after: str) -> tuple[bool, frozenset[str] | None]:
        """Whether texts may be cut between any of `characters` and `after`, and the value in `places`."""
        no, splits, whole = (False, None), True, True
        rests: dict[str, list[str]] = {}  # by what follows: the words from `after` on, whatever is before
        for character in characters:
            alone = {left: self._words(left + character) for left in _CONTEXTS}
            for left, right in chain(product(_CONTEXTS, ("b",)), product(("",), _FOLLOWING)):
                words, both = alone[left], self._words(left + character + after + right)
                one, joined = "".join(words), "".join(both)
                splits = splits and both[: len(words)] == words
                whole = whole and len(both) == len(words) == 1
                if not (splits or whole) or not joined.startswith(one):
                    return no
                if whole and one[-1:] != alone[""][0][-1:]:
                    return no
                rest = both[len(words) :] if splits else [joined[len(one) :]]
                if rests.setdefault(right, rest) != rest:
                    return no
        if splits:
            return True, None
        firsts = {"".join(rest)[:1] for rest in rests.values()}
        first = firsts.pop()
        return self._joined(first) if first and not firsts else no

    def _joined(self, first: str) -> tuple[bool, frozenset[str] | None]:
        """The same where nothing splits and the text goes on with `first`: what does the vocabulary say?"""
        model = self._model
        other = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if model["type"] != "BPE" or any(model.get(key) for key in other):
            return False, None  # Unigram's sums of scores are rounded otherwise in a piece
        if first not in model["vocab"]:
            if not self._bytes_are_tokens:
                return False, None  # unknown characters may be joined to one token
            first = "<"
        inside = (token.split(first)[:-1] for token in model["vocab"] if first in token[1:])
        return True, frozenset(part[-1:] or first for parts in inside for part in parts)

    def _last_symbol(self, character: str) -> str:
        """The last character of what the model first makes of `character`; "" where that is an unknown token."""
        last = self._words(character)[-1][-1]
        return last if last in self._model["vocab"] else ">" if self._bytes_are_tokens else ""

    @property
    def _bytes_are_tokens(self) -> bool:
        fallback: bool = self._model.get("byte_fallback", False)
        return fallback and all(f"<0x{byte:02X}>" in self._model["vocab"] for byte in range(256))

    def _normalized(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def _words(self, text: str) -> list[str]:
        """What the model is handed, one by one."""
        text = self._normalized(text)
        if self._pre_tokenizer is None:
            return [text] if text else []
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]


def _kind(character: str) -> str:
    if character.isalpha():
        return "letter"
    return "digit" if character in _DIGITS else "closing" if character in _CLOSING else ""
