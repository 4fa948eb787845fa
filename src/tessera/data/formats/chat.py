"""Rows that are chats (`type: chat_template`): rendered by the tokenizer's template, and only the answers learnt.

The keys are axolotl's: which column has the messages, how their keys and roles are called, which roles are learnt, and
whether the token that ends a turn is.
"""

import json
from typing import Any

from tessera.core.errors import UserError
from tessera.data.documents import Document, Segment
from tessera.data.formats.entry import Entry, Reading
from tessera.data.formats.template import Span, Template
from tessera.data.rows import check_keys
from tessera.data.samples import Origin

ROLES = {"human": "user", "gpt": "assistant"}
STANDARD = ("system", "user", "assistant", "tool", "developer")
COLUMNS = ("messages", "conversations")
"""Columns that hold messages, unless `field_messages` names one."""
_DETAIL = ("begin_offset", "end_offset", "train")
Message = dict[str, Any]


def chat(row: Message, origin: Origin, entry: Entry, reading: Reading, template: Template) -> Document:
    """The rendered chat as one segment, with the spans of what is learnt."""
    column = entry.field_messages or next((name for name in COLUMNS if name in row), COLUMNS[0])
    check_keys(row, origin, (column, entry.field_system, entry.field_tools, "prompt", "completion"))
    messages = row.get(column)
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        found = f"the row has {', '.join(map(str, row)) or 'no key'}" if column not in row else "it is something else"
        hint = "`field_messages` names the column with the messages"
        raise UserError("datasets", origin, f"`{column}` must be a list of messages; {found}", hint)
    turns = [_Turn(message, number, origin, entry, template) for number, message in enumerate(messages, start=1)]
    told = row.get(entry.field_system)
    if isinstance(told, str) and turns[0].role != "system":
        turns.insert(0, _Turn({"role": "system", "content": told}, 0, origin, entry, template))
    if entry.drop_system_message and turns[0].role == "system":
        del turns[0]
    return rendered(turns, _tools(row.get(entry.field_tools), origin), origin, entry, reading, template)


def chat_pair(row: Message, origin: Origin, entry: Entry, reading: Reading, template: Template) -> Document:
    """`prompt` and `completion`, lists of messages (or the latter a text): only turns of the latter are learnt."""
    check_keys(row, origin, ("prompt", "completion", entry.field_tools))
    prompt, answer = row.get("prompt"), row.get("completion")
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    turns: list[_Turn] = []
    for name, messages in (("prompt", prompt), ("completion", answer)):
        if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
            raise UserError("datasets", origin, f"`{name}` must be a list of messages", "or both are text")
        for message in messages:
            turn = _Turn(message, len(turns) + 1, origin, entry, template)
            turn.flag = False if name == "prompt" and turn.flag is None else turn.flag
            turns.append(turn)
    return rendered(turns, _tools(row.get(entry.field_tools), origin), origin, entry, reading, template)


class _Turn:
    """One message as the template gets it, its role, its flag (None: its role decides), the parts of it to learn."""

    def __init__(self, given: Message, number: int, origin: Origin, entry: Entry, template: Template) -> None:
        self._place = f"turn {number}"
        self.origin = origin
        given = _without_none(given)
        keys = dict(entry.message_property_mappings)
        pairs = (("role", entry.message_field_role, "from"), ("content", entry.message_field_content, "value"))
        for key, named, other in pairs:
            keys.setdefault(key, named or (other if key not in given and other in given else key))
        keys.setdefault(entry.template_thinking_key, entry.field_thinking)
        flags = (entry.message_field_training,) if entry.message_field_training else ("train", "weight")
        self.flag = self._flag(given, flags)
        self.parts = self._parts(given.get(entry.message_field_training_detail or ""))
        hidden = {*keys.values(), *flags, entry.message_field_training_detail}
        self.message = {key: value for key, value in given.items() if key not in hidden}
        self.message |= {key: given[name] for key, name in keys.items() if name in given}
        self.role = self.message["role"] = self._role(self.message.get("role"), keys["role"], entry, template)
        self._settle_content(keys["content"])
        if entry.split_thinking and self.role == "assistant":
            split_thinking(self.message, entry.template_thinking_key)
        self._settle_calls()

    def _settle_calls(self) -> None:
        """Templates take the arguments of a call as an object; files often have it as JSON."""
        calls = self.message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise self._wrong("has tool_calls of another form", "a list of {function: {name: …, arguments: …}}")
        for call in calls:
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = self._parsed(function["arguments"], "the arguments of a tool call")

    def _role(self, given: Any, key: str, entry: Entry, template: Template) -> str:
        names = {source: target for target, sources in entry.roles for source in sources}
        role = names.get(given) or ROLES.get(given, given) if isinstance(given, str) else None
        if not isinstance(role, str):
            raise self._wrong(f"has no role: `{key}` must be a string", "message_property_mappings names the keys")
        known = {*STANDARD, *(target for target, _ in entry.roles)}
        if role not in known and f"'{role}'" not in template.text and f'"{role}"' not in template.text:
            raise self._wrong(f"has the role {role!r}, which is not known", f"roles: {{assistant: [{role}]}} maps it")
        return role

    def _settle_content(self, key: str) -> None:
        content = self.message.get("content")
        if isinstance(content, list):
            content = self._joined(content)
        if content is None and (self.message.get("tool_calls") or self.role != "assistant"):
            content = ""
        if not isinstance(content, str):
            raise self._wrong(f"has no content: `{key}` must be a string", "message_property_mappings names the keys")
        self.message["content"] = content

    def _joined(self, given: list[Any]) -> str:
        """The text of a content in parts, of which some may say themselves whether they are learnt."""
        joined, spans, flagged = "", [], False
        for part in given:
            text: Any = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise self._wrong("has a content that is not text", "chats with images or sound are not done")
            flag = self._flag(part, ("train", "weight")) if isinstance(part, dict) else None
            flagged = flagged or flag is not None
            if text and flag is not False:
                spans.append((len(joined), len(joined) + len(text)))
            joined += text
        if flagged:
            self.parts = spans
        return joined

    def _flag(self, given: Message, names: tuple[str, ...]) -> bool | None:
        for name in names:
            if name in given:
                if given[name] not in (True, False):
                    raise self._wrong(f"has {name}: {given[name]!r}", "whether a turn is learnt: true or false, 1 or 0")
                return bool(given[name])
        return None

    def _parts(self, detail: Any) -> list[Span] | None:
        """The parts of the content that are learnt, of `message_field_training_detail`, whose ends are inclusive."""
        if detail is None:
            return None
        hint = "a list of {begin_offset: …, end_offset: …, train: true}, in characters of the content"
        spans = []
        for part in detail if isinstance(detail, list) else [None]:
            first, last, learnt = (part.get(key) if isinstance(part, dict) else None for key in _DETAIL)
            if type(first) is not int or type(last) is not int or first < 0 or learnt not in (True, False):
                raise self._wrong("has training details of another form", hint)
            if learnt:
                spans.append((first, last + 1))
        return spans

    def _parsed(self, text: str, what: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"has no valid JSON in {what}: {error}", "") from error

    def _wrong(self, reason: str, hint: str) -> UserError:
        return UserError("datasets", self.origin, f"{self._place} {reason}", hint)


def rendered(
    turns: list[_Turn], tools: Any, origin: Origin, entry: Entry, reading: Reading, template: Template
) -> Document:
    """The chat that `turns` are, and what of it is learnt."""
    if not turns:
        raise UserError("datasets", origin, "the chat has no turn")
    if "tool_calls" not in template.text and any(turn.message.get("tool_calls") for turn in turns):
        hint = "chat_template: qwen_25 and qwen3 write them, and templates of models that call tools"
        raise UserError("datasets", origin, "the chat template writes no tool calls, which a turn has", hint)
    shown, marked = template.render([turn.message for turn in turns], tools, origin)
    spans = _marked_spans(turns, marked, shown, entry, reading, template)
    if spans is None:
        spans = _found_spans(turns, tools, shown, origin, entry, reading, template)
    return Document(origin, (Segment(shown, tuple(spans)),), opened=False, ended=False)


def _marked_spans(
    turns: list[_Turn], marked: list[Span], shown: str, entry: Entry, reading: Reading, template: Template
) -> list[Span] | None:
    """What the template marks, but for turns whose flag is false; None where the keys ask for something else."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    plain = all(value in (None, "turn") for value in (entry.train_on_eos, entry.train_on_eot))
    plain = plain and not reading.train_on_inputs and entry.roles_to_train in ((), ("assistant",))
    flagged = any(turn.flag is not None or turn.parts is not None for turn in turns)
    others = any(turn.flag and turn.role != "assistant" or turn.parts is not None for turn in turns)
    if not template.marks_answers or not plain or others or flagged and len(marked) != len(answers):
        return None
    chosen = [span for span, turn in zip(marked, answers, strict=True) if turn.flag is not False] if flagged else marked
    ends = [end for _, place in chosen for _, end in template.ends_after(shown, place)] if reading.eot_tokens else []
    return sorted({*chosen, *ends})


def _found_spans(
    turns: list[_Turn], tools: Any, shown: str, origin: Origin, entry: Entry, reading: Reading, template: Template
) -> list[Span]:
    """What is learnt, each turn found by itself, and the tokens that end turns as train_on_eos and train_on_eot say."""
    names = {source: target for target, sources in entry.roles for source in sources}
    learnt_roles = {names.get(role) or ROLES.get(role, role) for role in entry.roles_to_train or ("assistant",)}
    of_end = entry.train_on_eos or "turn"
    rules = {**dict.fromkeys(template.turn_ends, entry.train_on_eot or of_end), template.end: of_end}
    if template.end in template.turn_ends and entry.train_on_eot not in (None, of_end):
        reason = f"is {entry.train_on_eot}, and train_on_eos {of_end}; {template.end} is meant by both"
        raise UserError("datasets.train_on_eot", None, reason, "give both the same value")
    spans: list[Span] = []
    last: dict[str, Span] = {}
    after = 0
    for index, turn in enumerate(turns):
        asked = bool(turn.parts) if turn.flag is None and turn.parts is not None else turn.flag
        learnt = reading.train_on_inputs or turn.role in learnt_roles if asked is None else asked
        if not learnt and "all" not in rules.values():
            continue
        span = template.find_turn([turn.message for turn in turns], index, shown, tools, origin)
        if span is None:
            if learnt and turn.message["content"] and not reading.train_on_inputs:
                raise UserError("datasets", origin, f"the chat template leaves out turn {index + 1}, which is learnt")
            continue
        if span[0] == span[1]:  # an empty answer is none: its end is not to be learnt
            continue
        if span[0] < after:
            raise UserError("datasets", origin, f"turn {index + 1} cannot be told from the turns before it")
        after = span[1]
        if learnt:
            spans += [span] if turn.parts is None else _parts_within(turn, span, shown)
        for token, place in template.ends_after(shown, span[1]):
            if rules[token] == "all" or rules[token] == "turn" and learnt:
                spans.append(place)
            last[token] = place
    return sorted(spans + [place for token, place in last.items() if rules[token] == "last"])


def _parts_within(turn: _Turn, span: Span, shown: str) -> list[Span]:
    start = shown.find(turn.message["content"], *span)
    if start < 0:
        reason = "has parts to learn, but the chat template does not write its content as it is"
        raise UserError("datasets", turn.origin, f"a turn {reason}")
    return [(start + first, min(start + end, span[1])) for first, end in turn.parts or () if start + first < span[1]]


def split_thinking(message: Message, key: str) -> None:
    """Move the thought that an answer begins with, between tags, under `key` of the message."""
    content = message["content"]
    for first, second in (
        ("<think>", "</think>"),
        ("<reasoning>", "</reasoning>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ):
        _, opened, rest = content.partition(first)
        thought, closed, answer = rest.partition(second)
        if opened and closed:
            _, began, inner = answer.partition("<|begin_of_solution|>")
            solution, over, _ = inner.partition("<|end_of_solution|>")
            message[key] = thought.strip()
            message["content"] = solution.strip() if began and over else answer.lstrip()
            return


def _tools(given: Any, origin: Origin) -> Any:
    """The tools of a row: objects, or JSON of them, whose parameters may be JSON too."""
    hint = "a list of tools, each {type: function, function: {name: …, parameters: …}}"
    try:
        tools = json.loads(given) if isinstance(given, str) and given.strip() else given
        tools = [json.loads(tool) if isinstance(tool, str) else _without_none(tool) for tool in tools or []]
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, dict) and isinstance(function.get("parameters"), str):
                function["parameters"] = json.loads(function["parameters"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("datasets", origin, f"the tools cannot be read: {error}", hint) from error
    return tools or None


def _without_none(value: Any) -> Any:
    """A value without the keys that are null: tables have every column in every row."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
