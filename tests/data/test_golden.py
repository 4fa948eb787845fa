"""Each format of rows gives the tokens and labels that a few plain lines give, and gave when golden/ was written.

`python -m tests.data.test_golden` writes golden/ anew from the plain lines.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.chats import MARKED, UNMARKED, chat_tokenizer
from tests.data.helpers import all_rows, entry
from transformers import AutoTokenizer

from tessera.data.prepare import prepare

GOLDEN = Path(__file__).with_name("golden")
BELOW = "Below is an instruction that describes a task"
COMPLETE = "Write a response that appropriately completes the request."
WITH_INPUT = f"{BELOW}, paired with an input that provides further context. {COMPLETE}"
USER = f"{BELOW[:23]} from a USER{BELOW[23:]}. The ASSISTANT writes a response that "
CONCISE = f"{USER}appropriately and concisely completes the request.\n\n"
ASK = "Choose the answer that best answers the question."

# format → keys of the entry, and rows: each with the prompt and the answer that it must become
PROMPTS: dict[str, tuple[Any, list[tuple[dict[str, Any], str, str]]]] = {
    "alpaca": (
        "alpaca",
        [
            (
                {"instruction": "Add é.", "input": "1 2", "output": "hello 3"},
                f"{WITH_INPUT}\n\n### Instruction:\nAdd é.\n\n### Input:\n1 2\n\n### Response:\n",
                "hello 3",
            ),
            (
                {"instruction": "Sing.", "input": "", "output": "la"},
                f"{BELOW}. {COMPLETE}\n\n### Instruction:\nSing.\n\n### Response:\n",
                "la",
            ),
        ],
    ),
    "alpaca_chat": (
        "alpaca:chat",
        [
            (
                {"instruction": "a", "input": "b", "output": "c"},
                f"SYSTEM: {WITH_INPUT}\nUSER: a\nb\nASSISTANT:",
                "c",
            )
        ],
    ),
    "alpaca_chatml": (
        "alpaca:chatml",
        [
            (
                {"instruction": "a", "output": "c"},
                f"<|im_start|>system\n{BELOW}. {COMPLETE}<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
                "<|im_start|>assistant\n",
                "c",
            )
        ],
    ),
    "alpaca_phi": (
        "alpaca:phi",
        [
            (
                {"instruction": "a", "output": "c"},
                f"<|system|>\n{BELOW}. {COMPLETE}<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n",
                "c",
            )
        ],
    ),
    "alpaca_qa": (
        "alpaca_chat.load_qa",
        [({"question": "why?", "answer": "so"}, f"SYSTEM: {CONCISE}\nUSER: why?\nASSISTANT:", "so")],
    ),
    "alpaca_camel": (
        "alpaca_chat.load_camel_ai",
        [({"message_1": "why?", "message_2": "so"}, f"SYSTEM: {CONCISE}\nUSER: why?\nASSISTANT:", "so")],
    ),
    "alpaca_concise": (
        "alpaca_chat.load_concise",
        [({"instruction": "why?", "output": "so"}, f"SYSTEM: {CONCISE}\nUSER: why?\nASSISTANT:", "so")],
    ),
    "alpaca_no_prompt": (
        "alpaca_chat.load_no_prompt",
        [({"instruction": "a", "input": "b", "output": "c"}, "USER: a\nb\nASSISTANT:", "c")],
    ),
    "alpaca_instruct_no_prompt": (
        "alpaca_instruct.load_no_prompt",
        [({"instruction": "a", "output": "c"}, "### Instruction:\na\n\n### Response:\n", "c")],
    ),
    "alpaca_w_system": (
        "alpaca_w_system.load",
        [
            (
                {"instruction": "a", "input": "b", "output": "c", "system": "s"},
                "SYSTEM: s\nUSER: a\nb\nASSISTANT:",
                "c",
            ),
            ({"instruction": "a", "output": "c", "system": ""}, "USER: a\nASSISTANT:", "c"),
        ],
    ),
    "alpaca_w_system_instruct": (
        "alpaca_w_system.load_instruct",
        [
            (
                {"instruction": "a", "output": "c", "system": "s"},
                "s\n\n### Instruction:\na\n\n### Response:\n",
                "c",
            )
        ],
    ),
    "open_orca": (
        "alpaca_w_system.load_open_orca",
        [
            (
                {"question": "q", "response": "r", "system_prompt": "s"},
                "### System:\ns\n### Human:\nq\n### Assistant:\n",
                "r",
            )
        ],
    ),
    "open_orca_chatml": (
        "alpaca_w_system.load_open_orca_chatml",
        [
            (
                {"question": "q", "response": "r", "system_prompt": "s"},
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
                "r",
            )
        ],
    ),
    "gpteacher": (
        "gpteacher",
        [
            (
                {"instruction": "a", "input": "", "response": "c"},
                f"{BELOW}. {COMPLETE}\n\n### Instruction:\na\n\n### Response:\n",
                "c",
            )
        ],
    ),
    "oasst": (
        "oasst",
        [
            (
                {"INSTRUCTION": "a", "RESPONSE": "c", "input": "not this"},
                f"{BELOW}. {COMPLETE}\n\n### Instruction:\na\n\n### Response:\n",
                "c",
            )
        ],
    ),
    "jeopardy": (
        "jeopardy",
        [
            (
                {"question": "q", "category": "k", "answer": "a"},
                f"{WITH_INPUT}\n\n### Instruction:\nq\n\n### Input:\nk\n\n### Response:\n",
                "what is a",
            )
        ],
    ),
    "explainchoice": (
        "explainchoice",
        [
            (
                {"question": "q", "choices": ["x", "y"], "solution": "x"},
                f"{ASK} Explain your reasoning.\n\n\n### Instruction:\nq\n\n"
                '### Input:\n- "x"\n- "y"\n\n### Response:\n',
                "x",
            )
        ],
    ),
    "concisechoice": (
        "concisechoice",
        [
            (
                {"question": "q", "choices": ["x", "y"], "explanation": "y"},
                f'{ASK} Be concise in your response.\n\nUSER: q\n- "x"\n- "y"\nASSISTANT:',
                "y",
            )
        ],
    ),
    "summarizetldr": (
        "summarizetldr",
        [
            (
                {"article": "a", "summary": "s"},
                "USER: Summarize the following article as a TL;DR.\na\nASSISTANT:",
                "s",
            )
        ],
    ),
    "user_written": (
        {
            "system_prompt": "told",
            "system_format": "<{system}> ",
            "field_instruction": "ask",
            "field_input": "more",
            "field_output": "say",
            "field_system": "sys",
            "format": "[{instruction}|{input}] {{",
            "no_input_format": "[{instruction}] ",
        },
        [
            ({"ask": "a{b}", "more": "i", "say": "hello"}, "<told> [a{b}|i] {", "hello"),
            ({"ask": "a", "more": None, "say": "hello", "sys": "own"}, "<own> [a] ", "hello"),
        ],
    ),
    "user_written_without_input": (
        {"format": "[INST] {instruction} [/INST]"},
        [({"instruction": "a", "output": "b"}, "[INST] a [/INST]", "b")],
    ),
    "prompt_completion": (None, [({"prompt": "hello ", "completion": "there"}, "hello ", "there")]),
}
CHAT = [
    {"role": "system", "content": "be in the user"},
    {"role": "user", "content": "hello?"},
    {"role": "assistant", "content": "\nhello there\n"},
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": "assistant"},
]
SEGMENTS = [{"label": False, "text": "<s>hello "}, {"label": True, "text": "there</s>"}, {"label": 0, "text": "\n"}]
LONG = "hello there " * 8


def reference(tokenizer: Any, name: str) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the rows of a format, by plain calls of transformers."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    end = [tokenizer.eos_token_id]
    if name in PROMPTS:
        found = []
        for _, prompt, answer in PROMPTS[name][1]:
            asked, said = tokenizer(prompt).input_ids, plain(answer) + end
            found.append((asked + said, [-100] * len(asked) + said))
        return found
    if name == "completion":
        ids = tokenizer(LONG).input_ids + end
        windows = [ids[start : start + 16] for start in range(0, len(ids), 16)]
        return [(window, window) for window in windows]
    if name == "input_output":
        ids = [plain(segment["text"]) for segment in SEGMENTS]
        return [(ids[0] + ids[1] + ids[2], [-100] * len(ids[0]) + ids[1] + [-100] * len(ids[2]))]
    if name == "chat_marked":
        given = tokenizer.apply_chat_template(
            CHAT, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(given["input_ids"], given["assistant_masks"], strict=True)
        return [(given["input_ids"], [token if learnt else -100 for token, learnt in pairs])]
    assert name == "chat_unmarked"
    ids: list[int] = []
    labels: list[int] = []
    for turn in CHAT:  # special tokens cut the text, so that its parts can be tokenized apart
        for text, learnt in (
            ("<|im_start|>", False),
            (f"{turn['role']}\n{turn['content']}", turn["role"] == "assistant"),
            ("<|im_end|>", turn["role"] == "assistant"),
            ("\n", False),
        ):
            new = plain(text)
            skipped = len(plain("assistant\n")) if learnt and text != "<|im_end|>" else 0
            ids += new
            labels += [-100] * skipped + new[skipped:] if learnt else [-100] * len(new)
    return [(ids, labels)]


OTHERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "completion": ({"type": "completion", "field": "body"}, [{"body": LONG}]),
    "input_output": ({"type": "input_output"}, [{"segments": SEGMENTS}]),
    "chat_marked": ({"type": "chat_template"}, [{"messages": CHAT}]),
    "chat_unmarked": (
        {"type": "chat_template", "chat_template": "jinja", "chat_template_jinja": UNMARKED},
        [{"messages": CHAT}],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", [*PROMPTS, *OTHERS])
def test_tokens_and_labels(write, settings, folder, name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [list(row) for row in reference(tokenizer, name)] == golden
    kind, rows = PROMPTS.get(name, (None, []))
    keys, rows = OTHERS[name] if name in OTHERS else ({"type": kind}, [row for row, *_ in rows])
    file, length = write("rows.jsonl", rows), 16 if name == "completion" else 1000
    prepared = prepare(settings(entry(file, **keys), tokenizer=str(folder), sequence_len=length), None)
    assert [list(row) for row in all_rows(prepared.folder)] == golden


@pytest.mark.parametrize("name", ["alpaca", "input_output", "prompt_completion", "user_written"])
def test_inputs_are_learnt_on_request(write, settings, folder, name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    kind, rows = PROMPTS.get(name, (None, []))
    keys, rows = OTHERS[name] if name in OTHERS else ({"type": kind}, [row for row, *_ in rows])
    config = settings(entry(write("rows.jsonl", rows), **keys), tokenizer=str(folder), sequence_len=1000)
    config.train_on_inputs = True
    assert all_rows(prepare(config, None).folder) == [(tokens, tokens) for tokens, _ in golden]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        made = AutoTokenizer.from_pretrained(chat_tokenizer(Path(place)))
        for format_name in [*PROMPTS, *OTHERS]:
            (GOLDEN / f"{format_name}.json").write_text(json.dumps(reference(made, format_name)) + "\n")
