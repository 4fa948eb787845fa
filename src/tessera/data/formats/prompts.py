"""Rows with an instruction and an answer: alpaca, its relatives, and prompts that the user writes.

A prompt is the text of a style around the instruction, not learnt unless `train_on_inputs`; the answer follows it.
The prompts are those of axolotl's `prompters.py` and `prompt_strategies`, to the letter.
"""

import string as strings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tessera.core.errors import UserError
from tessera.data.documents import Document, Segment
from tessera.data.formats.entry import Entry, Reading, UserPrompt
from tessera.data.formats.text import string
from tessera.data.rows import check_keys
from tessera.data.samples import Origin


class Style(NamedTuple):
    """The text around an instruction with an input, around one without, and around a system prompt."""

    turn: str
    no_input: str
    system: str


INSTRUCT = Style(
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "{system}\n\n",
)
CHAT = Style("USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:", "SYSTEM: {system}\n")
CHATML = Style(
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\n{system}<|im_end|>\n",
)
PHI = Style(
    "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
    "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    "<|system|>\n{system}<|end|>\n",
)
ORCA = Style(
    "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "### Human:\n{instruction}\n### Assistant:\n",
    "### System:\n{system}\n",
)
SUMMARY = Style(
    "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
    "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
    "{system}",
)
_PLAIN_CHAT = CHAT._replace(system="{system}")
STYLES = {"instruct": INSTRUCT, "chat": CHAT, "chatml": CHATML, "phi": PHI}
"""What may follow a colon: `type: alpaca:chat`."""

_TASK = "Below is an instruction that describes a task"
_CLOSE = "Write a response that appropriately completes the request."
_TASKS = (f"{_TASK}, paired with an input that provides further context. {_CLOSE}", f"{_TASK}. {_CLOSE}")
_USER = "Below is an instruction from a USER that describes a task"
_CONCISE = (
    f"{_USER}, paired with an input that provides further context. The ASSISTANT writes a response that concisely"
    " and appropriately completes the request.\n\n",
    f"{_USER}. The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n",
)
_CHOOSE = "Choose the answer that best answers the question."


@dataclass(frozen=True)
class Prompted:
    """Which columns a row has, and what stands around them.

    `task`: the system prompt of rows with an input, and of those without; `system`: the column that has it instead;
    `or_output`: the column of the answer in rows without `output`.
    """

    style: Style = INSTRUCT
    task: tuple[str, str] = _TASKS
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = ""
    before_answer: str = ""
    or_output: str = ""

    def __call__(self, row: dict[str, Any], origin: Origin, entry: Entry, reading: Reading) -> Document:
        """The prompt and the answer of a row."""
        columns = [name for name in (self.instruction, self.input, self.output, self.system) if name]
        check_keys(row, origin, columns, prompted=True)
        instruction, given = string(row, self.instruction, origin), self._input(row, origin)
        output = self.output if self.output in row or not self.or_output else self.or_output
        answer = self.before_answer + string(row, output, origin)
        told = string(row, self.system, origin) if row.get(self.system) is not None else self.task[0 if given else 1]
        turn = self.style.turn if given else self.style.no_input
        prompt = self.style.system.format(system=told) if told else ""
        prompt += turn.format(instruction=instruction, input=given)
        return Document(origin, (Segment(prompt, reading.train_on_inputs), Segment(answer)))

    def _input(self, row: dict[str, Any], origin: Origin) -> str:
        value = row.get(self.input)
        if isinstance(value, list) and self.input == "choices":
            return "\n".join(f'- "{choice}"' for choice in value)
        return "" if value is None else string(row, self.input, origin)


_SYSTEM = Prompted(CHAT, ("", ""), system="system")
_ORCA = Prompted(ORCA, ("", ""), "question", "", "response", "system_prompt")
_EXPLAIN = Prompted(INSTRUCT, (f"{_CHOOSE} Explain your reasoning.\n",) * 2, "question", "choices", "solution")
_BRIEFLY = (f"{_CHOOSE} Be concise in your response.\n\n",) * 2
PROMPTED: dict[str, Prompted] = {
    "alpaca": Prompted(),
    "alpaca_instruct": Prompted(),
    "alpaca_instruct.load_no_prompt": Prompted(task=("", "")),
    "alpaca_chat": Prompted(CHAT),
    "alpaca_chat.load_concise": Prompted(CHAT, _CONCISE),
    "alpaca_chat.load_qa": Prompted(CHAT, _CONCISE, "question", "", "answer"),
    "alpaca_chat.load_camel_ai": Prompted(CHAT, _CONCISE, "message_1", "", "message_2"),
    "alpaca_chat.load_no_prompt": Prompted(CHAT, ("", "")),
    "alpaca_w_system": _SYSTEM,
    "alpaca_w_system.load_chat": _SYSTEM,
    "alpaca_w_system.load_instruct": Prompted(INSTRUCT, ("", ""), system="system"),
    "alpaca_w_system.load_open_orca": _ORCA,
    "alpaca_w_system.load_open_orca_chatml": Prompted(CHATML, ("", ""), "question", "", "response", "system_prompt"),
    "gpteacher": Prompted(output="response"),
    "oasst": Prompted(instruction="INSTRUCTION", input="", output="RESPONSE"),
    "jeopardy": Prompted(instruction="question", input="category", output="answer", before_answer="what is "),
    "explainchoice": replace(_EXPLAIN, or_output="explanation"),
    "concisechoice": replace(_EXPLAIN, style=_PLAIN_CHAT, task=_BRIEFLY, or_output="explanation"),
    "summarizetldr": Prompted(SUMMARY, ("", ""), "article", "", "summary"),
}
"""Values of `datasets[].type`, as axolotl has them."""
STYLED = ("alpaca", "gpteacher", "oasst", "jeopardy", "explainchoice")
"""Those that take a style: `alpaca:chat`."""


def prompted(kind: str) -> Prompted | None:
    """The format that `type: kind` names, if any does: `alpaca`, `alpaca:chat`, `alpaca_chat.load_qa`, …"""
    name, colon, style = kind.removesuffix(".load").partition(":")
    if not colon:
        return PROMPTED.get(name)
    if name not in STYLED or style not in STYLES:
        return None
    return replace(PROMPTED[name], style=STYLES[style])


def written(prompt: UserPrompt) -> Callable[[dict[str, Any], Origin, Entry, Reading], Document]:
    """The format of a prompt that the user wrote. UserError: a format with other names in braces than it may have."""
    for key, allowed in (
        ("format", "instruction input"),
        ("no_input_format", "instruction"),
        ("system_format", "system"),
    ):
        _check_braces(getattr(prompt, key), f"datasets.type.{key}", allowed.split())
    own = prompt.no_input_format != UserPrompt.no_input_format or "{input}" in prompt.format
    style = Style(prompt.format, prompt.no_input_format if own else prompt.format, prompt.system_format)
    return Prompted(
        style,
        (prompt.system_prompt,) * 2,
        prompt.field_instruction,
        prompt.field_input,
        prompt.field_output,
        prompt.field_system,
    )


def _check_braces(text: str, key: str, allowed: list[str]) -> None:
    hint = f"in braces may stand {' and '.join(allowed)}; a brace itself is written twice"
    try:
        names = [
            f"{name}{spec}{way or ''}" for _, name, spec, way in strings.Formatter().parse(text) if name is not None
        ]
    except ValueError as error:
        raise UserError(key, text, f"{error}", hint) from error
    for name in names:
        if name not in allowed:
            raise UserError(key, text, f"{{{name}}} is not known here", hint)
