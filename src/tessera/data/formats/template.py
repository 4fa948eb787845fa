"""Chat templates: which one a data set is rendered with, and where each turn lies in what transformers renders.

A template that marks what the model says with `{% generation %}` tells it itself. In any other, a turn is found by
rendering the chat once more with another text in its place: what differs is the turn.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError, cut_short
from tessera.data.added_tokens import AddedTokens
from tessera.data.auto_tokenizer import read_auto
from tessera.data.chat_templates import template_text
from tessera.data.formats.bounded import bounded, check_powers
from tessera.data.formats.entry import Entry, Reading
from tessera.data.samples import Origin

Span = tuple[int, int]
"""Characters [start, end) of a rendered chat."""
Turns = Sequence[dict[str, Any]]

_MARKS = ("\ue0f0\ue0f1", "\ue0f2\ue0f3", "\ue0f4\ue0f5")
"""Texts that nobody writes: of the private area of Unicode."""
_TOKENS = re.compile(r"<\|\w+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_turn>")
"""Texts in templates that are special tokens of the models these were written for."""
_PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


@dataclass(frozen=True)
class Template:
    """A template's text, what is handed to it beside the chat, and the tokens that end a turn.

    `end` is the tokenizer's end-of-sequence token, `turn_ends` are the others that close a turn, `special` all special
    tokens.
    """

    text: str
    values: tuple[tuple[str, Any], ...]
    end: str
    turn_ends: tuple[str, ...]
    special: tuple[str, ...] = ()

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the model writes."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def render(self, turns: Turns, tools: Any, origin: Origin) -> tuple[str, list[Span]]:
        """The chat as text, and the spans that the template marks. UserError: the template refuses the chat."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

        try:
            with bounded():
                both: Any = render_jinja_template(
                    [list(turns)],
                    tools=tools,
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.marks_answers,
                    **dict(self.values),
                )
        except Exception as error:  # a template may raise whatever it likes
            told = cut_short(str(error) or type(error).__name__, 300)
            raise UserError("datasets", origin, f"the chat template refuses this chat: {told}") from error
        texts, spans = both
        return texts[0], [(start, end) for start, end in spans[0]] if self.marks_answers else []

    def find_turn(self, turns: Turns, index: int, shown: str, tools: Any, origin: Origin) -> Span | None:
        """Where turn `index` lies in `shown`, the rendered chat; None where the template leaves it out."""
        mark = next((mark for mark in _MARKS if mark[0] not in shown and mark[1] not in shown), None)
        if mark is None:
            raise UserError("datasets", origin, "holds every character by which turns are found", _MARK_IT)
        bare = {"role": turns[index]["role"], "content": mark}  # without its tool calls and its thoughts
        try:
            hidden, _ = self.render([*turns[:index], bare, *turns[index + 1 :]], tools, origin)
        except UserError:  # a template may want the answers to be as many as the calls
            kept = {**turns[index], "content": mark}
            hidden, _ = self.render([*turns[:index], kept, *turns[index + 1 :]], tools, origin)
        if hidden.count(mark) != 1:
            if mark not in hidden:
                return None
            raise UserError("datasets", origin, f"the chat template writes turn {index + 1} more than once", _MARK_IT)
        start, end = _difference(shown, hidden)
        if mark not in hidden[start : len(hidden) - (len(shown) - end)]:
            raise UserError("datasets", origin, f"turn {index + 1} cannot be found in the rendered chat", _MARK_IT)
        return start, end

    def ends_after(self, shown: str, place: int) -> list[tuple[str, Span]]:
        """The tokens that close a turn which ends at `place`, each with its span.

        Before each may stand space, and special tokens that close no turn.
        """
        found: list[tuple[str, Span]] = []
        ends = {self.end, *self.turn_ends} - {""}
        tokens = sorted({*ends, *self.special}, key=len, reverse=True)
        while True:
            start = len(shown) - len(shown[place:].lstrip())
            token = next((token for token in tokens if shown.startswith(token, start)), None)
            if token is None:
                return found
            place = start + len(token)
            if token in ends:
                found.append((token, (start, place)))
                ends.remove(token)


_MARK_IT = "put {% generation %} … {% endgeneration %} around the answers in the template (chat_template: jinja)"


def _difference(shown: str, hidden: str) -> Span:
    """The part of `shown` that is not as in `hidden`."""
    start = _same(min(len(shown), len(hidden)), lambda a, b: shown[a:b] == hidden[a:b])
    least = min(len(shown), len(hidden)) - start
    tail = _same(
        least, lambda a, b: shown[len(shown) - b : len(shown) - a] == hidden[len(hidden) - b : len(hidden) - a]
    )
    return start, len(shown) - tail


def _same(most: int, equal: Callable[[int, int], bool]) -> int:
    """The largest number up to `most` below which all is `equal`, by halving: Python compares slices quickly."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        if equal(low, middle):
            low = middle
        else:
            most = middle - 1
    return low


def template_of(entry: Entry, reading: Reading, notes: list[str]) -> Template:
    """The template that the entry asks for, or else the config, or else the tokenizer.

    UserError: no such template, a tokenizer without one, a token in `eot_tokens` that is none.
    """
    if reading.tokenizer is None:
        reason = "chats are rendered for the tokenizer of a model, not for one that is trained on them"
        raise UserError("datasets", entry.path, reason, "tokenizer: a folder with a tokenizer")
    tokenizer = _tokenizer(reading.tokenizer, reading.added)
    asks = entry if entry.chat_template or entry.chat_template_jinja else reading
    text = template_text(asks.chat_template, asks.chat_template_jinja, tokenizer)
    check_powers(text)
    if text != tokenizer.chat_template and (told := _in_pieces(text, tokenizer)) and told not in notes:
        notes.append(told)
    end = tokenizer.eos_token or ""
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    values = named | dict(reading.chat_template_kwargs)
    for token in reading.eot_tokens:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            hint = "give it in `tokens`, or leave it out"
            raise UserError("eot_tokens", token, f"is not one token of the tokenizer in {reading.tokenizer}", hint)
    special = tuple(sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special))
    plain = Template(text, tuple(values.items()), end, reading.eot_tokens, special)
    if reading.eot_tokens or not end or end in text or "eos_token" in text:
        return plain
    found = _end_of_turn(plain)
    if not plain.marks_answers:  # or else it says itself where an answer ends
        told = f"turns end with {found}, as the chat template writes them (eot_tokens chooses another token)"
        notes.append(told if found else f"the chat template never writes {end}: eot_tokens names what ends a turn")
    return replace(plain, turn_ends=(found,) if found else ())


def _in_pieces(text: str, tokenizer: Any) -> str:
    """What to say of tokens in a template that `tokenizer` does not have; "" where it has all."""
    found = dict.fromkeys(_TOKENS.findall(text))
    lacking = [token for token in found if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if not lacking:
        return ""
    told = f"the tokenizer does not have {', '.join(lacking)}"
    return f"{told} of the chat template: they are trained as pieces of text (tokens: [{', '.join(lacking)}] adds them)"


def _end_of_turn(template: Template) -> str:
    """The special token that a template without end-of-sequence token writes behind an answer; "" for none."""
    place = Origin(Path("chat_template"))
    probe = replace(template, end="", turn_ends=template.special)
    try:
        shown, _ = probe.render(_PROBE, None, place)
        span = probe.find_turn(_PROBE, 1, shown, None, place)
    except UserError:  # the rows themselves may suit it
        return ""
    ends = probe.ends_after(shown, span[1]) if span else []
    return ends[0][0] if ends else ""


def _tokenizer(folder: Path, added: AddedTokens) -> Any:
    """The tokenizer as the run has it, with the tokens that the config gives it."""
    found = read_auto(folder, "tokenizer")
    added.give_to(found)
    return found
