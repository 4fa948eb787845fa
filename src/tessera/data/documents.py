"""Document: what a file of any format becomes before it is tokenized."""

from dataclasses import dataclass

from tessera.data.samples import Origin


@dataclass(frozen=True)
class Segment:
    """Text that is tokenized by itself. `learnt`: all of it, none, or the characters of these spans [start, end)."""

    text: str
    learnt: bool | tuple[tuple[int, int], ...] = True


@dataclass(frozen=True)
class Document:
    """Segments, whose tokens follow one another: a row, or with `cut` as many windows of `sequence_len` as it fills.

    `opened`: the tokenizer opens the first segment as it does for its model (a Llama's begin of text); `ended`: an
    end-of-sequence token follows the last, and is learnt where that is. A chat template writes both itself.
    E.g. alpaca: a prompt that is not learnt, then an answer that is.
    """

    origin: Origin
    segments: tuple[Segment, ...]
    opened: bool = True
    ended: bool = True
    cut: bool = False
