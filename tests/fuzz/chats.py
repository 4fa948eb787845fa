"""Cases of rows that mean something: chats, templates, prompts, packing; and of tokenizer folders of other kinds."""

import json
from typing import Any

from tests.data.tokenizers_made import MADE

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.containers import SHORT, train
from fuzz.folders import put_odd_file
from fuzz.world import LINE, write_yaml

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TURNS: list[Any] = [
    {"role": "user", "content": "north"},
    {"role": "assistant", "content": "wind"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": [{"type": "text", "text": "river"}]},
]


def spoilt(case: Case, value: Any) -> Any:
    """The same with what is hostile at one place of it, at any depth, or without that place."""
    if isinstance(value, dict) and value and case.dice.random() < 0.85:
        key = case.pick(*value)
        if case.dice.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: spoilt(case, value[key])}
    if isinstance(value, list) and value and case.dice.random() < 0.85:
        at = case.dice.randrange(len(value))
        return [*value[:at], spoilt(case, value[at]), *value[at + 1 :]]
    return hostile.value(case.dice)


def write_rows(case: Case, made: list[Any]) -> None:
    (case.here / "made.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in made).encode("utf-8", "replace"))


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat_template": ("chat_template", {"messages": TURNS, "system": "be", "tools": [{"type": "function"}]}),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    "learnt parts": (
        "chat_template",
        {"messages": [TURNS[0], {"role": "assistant", "content": [{"text": "wind", "train": True}, {"text": "sea"}]}]},
    ),
    "pair of chats": (None, {"prompt": TURNS[:1], "completion": TURNS[1:2]}),
    "input_output": (
        "input_output",
        {"segments": [{"label": False, "text": "north"}, {"label": True, "text": "wind"}]},
    ),
    "prompt_completion": ("prompt_completion", {"prompt": "north", "completion": "wind"}),
    "completion": ("completion", {"text": LINE * 3}),
    "alpaca_w_system": ("alpaca_w_system", {"system": "s", "instruction": "north", "input": "", "output": "wind"}),
    "choices": ("explainchoice", {"question": "north", "choices": ["wind"], "solution": "river"}),
    "user-written": ({"format": "{instruction} {input}"}, {"instruction": "north", "input": "x", "output": "wind"}),
    "tokenized": (None, {"input_ids": [1, 2, 3], "labels": [1, -100, 3], "attention_mask": [1, 1, 0]}),
    "positions": (None, {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}),
}


@group(6)
def row_formats(case: Case) -> None:
    """Rows of every format, one of them with what is hostile at any depth."""
    case.kind = 23
    name = case.cycle(*FORMATS)
    kind, row = FORMATS[name]
    made = [row] * 6
    made[case.pick(0, 2, 5)] = spoilt(case, row)
    write_rows(case, made)
    case.what = f"{name}: {json.dumps(made)[:120]}"
    entry = {} if kind is None or case.dice.random() < 0.2 else {"type": kind}
    more = case.pick({}, {}, {"train_on_inputs": True}, {"sample_packing": True})
    train(case, "./made.jsonl", {"chat_template": "chatml", "sequence_len": 256} | more, **entry)


@group(2)
def chat_keys(case: Case) -> None:
    """The keys that say how chats are read and learnt, in the entry and beside it."""
    case.kind = 17
    write_rows(case, [{"messages": TURNS[:2], "said": TURNS[:2]}] * 6)
    names: dict[str, tuple[Any, ...]] = {
        "chat_template": ("chatml", "tokenizer_default", "tokenizer_default_fallback_chatml", "jinja", "", "../x"),
        "chat_template_jinja": (TEMPLATE, "model/config.json", "/dev/zero", "no.jinja", "{{", "{% x %}", ""),
        "chat_template_kwargs": ({"x": 1}, {"messages": 1}, {"": 1}, {"chat_template": "x"}, {"eos_token": None}),
        "eot_tokens": (["</s>"], [""], ["stone"], ["\0"], [LINE], ["<|endoftext|>"]),
        "train_on_eos": ("all", "turn", "last", "none"), "train_on_eot": ("all", "turn", "last"),
        "roles": ({"assistant": ["user"]}, {"": ["user"]}, {"user": []}), "roles_to_train": (["user"], ["x"], [], [""]),
        "field_messages": ("said", "nothing", ""), "split_thinking": (True,), "field_tools": ("said",),
        "message_property_mappings": ({"role": "content"}, {"content": "x"}, {"": ""}, {"role": "role", "x": "role"}),
        "message_field_training": ("role", "content", ""), "message_field_training_detail": ("content", "x"),
        "template_thinking_key": ("role", "content", ""), "field_thinking": ("role", "content"),
    }  # fmt: skip
    entry: dict[str, Any] = {"type": "chat_template"}
    more: dict[str, Any] = {"chat_template": "chatml"}
    for name in case.dice.sample(list(names), case.pick(1, 2, 3)):
        value = case.pick(*names[name]) if case.dice.random() < 0.75 else hostile.value(case.dice)
        (more if name in ("eot_tokens", "chat_template_kwargs") or case.dice.random() < 0.2 else entry)[name] = value
    case.what = f"{entry!r:.150} {more!r:.150}"
    train(case, "./made.jsonl", more, **entry)


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}", "{{ 9 ** 9 ** 9 }}", "{{ range(10 ** 12) | list }}", "{{ 'a' | center(10 ** 12) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('x' * 100000) }}",
    "{{ raise_exception(3) }}",
    "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=3) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}", "{% include 'x' %}", "{% import 'os' as o %}{{ o }}",
    "{% extends 'x' %}", "{{ messages.append(1) }}", "{{ messages[0].update({'role': 3}) }}", "{{ nothing.at.all }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ 1 / 0 }}", "{{ '%s' % messages }}", "{{ '%999999999d' % 3 }}",
    "{{ '{0.__class__}'.format(messages) }}", "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ strftime_now('%Y' * 100000) }}", "{% generation %}", "{% generation %}{% generation %}x{% endgeneration %}"
    "{% endgeneration %}", "{% break %}", "{{ '\\ud800' }}", "", " ", "{{ messages }}" * 3, "{% if %}", "{{ (" * 3000,
    "{{ 'x' | regex }}", "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "{{ messages[-1].content }}",
    "{{ lipsum(n=99999) }}", "{{ 'a' | replace('a', 'b' * 99999999) | length }}",
    "{{ '\ue0f0\ue0f1\ue0f2\ue0f3\ue0f4' }}",
]  # fmt: skip


@group(4)
def templates(case: Case) -> None:
    """Chat templates that loop, grow, recurse, raise, or reach for what is not theirs: one message, in bounded time."""
    case.kind, odd = 25, case.cycle(*LOOPS)
    write_rows(case, [{"messages": TURNS[:2]}] * 6)
    text = case.pick(odd, odd, TEMPLATE + odd, odd + TEMPLATE)
    more: dict[str, Any] = {"chat_template": "jinja", "chat_template_jinja": text}
    where = case.pick("key", "key", "file", "folder")
    if where == "file":
        (case.here / "t.jinja").write_text(text)
        more["chat_template_jinja"] = "./t.jinja"
    elif where == "folder":
        (case.here / "model/chat_template.jinja").write_text(text)
        more = {}
    case.what = f"{where}: {text[:120]}"
    train(case, "./made.jsonl", more, type="chat_template")
    if (case.here / "ran").exists():
        case.wrong("the template ran a command")


BRACES = [
    "{0.__class__}", "{instruction.__class__}", "{instruction!r}", "{instruction:>999999999999}",
    "{instruction:{input}}",
    "{instruction[0]}", "{}", "{{}}", "{", "}", "{input}", "{instruction:s}", "{instruction!x}", "{system}", "%s",
    "{0}",
    "{instruction:>99999999}", "{instruction:d}", "{ instruction }", "{instruction}" * 5000, "",
]  # fmt: skip


@group(1)
def prompts(case: Case) -> None:
    """Prompts that the user writes, with braces that reach for more than the row."""
    case.kind, key = (
        25,
        case.pick("format", "no_input_format", "system_format", "system_prompt", "field_input", "field_system"),
    )
    own = {"format": "{instruction} {input}", key: case.cycle(*BRACES)}
    case.what = f"type: {own!r:.150}"
    row = {"instruction": "north", "input": case.pick("", ">99999999999"), "output": "wind", "system": "be"}
    write_rows(case, [row] * 6)
    train(case, "./made.jsonl", type=own)


@group(3)
def tokenizer_folders(case: Case) -> None:
    """Folders of every kind that AutoTokenizer takes, damaged, with code of their own, or without a fast form."""
    case.kind, name = 21, case.cycle(*MADE)
    folder = case.here / "other"
    MADE[name](folder)
    form = case.pick("garbled", "cut", "odd", "code", "slow", "swapped", "whole")
    file = case.pick(*sorted(path for path in folder.iterdir() if path.is_file()))
    case.what = f"{name}, {form} {file.name} "
    if form == "garbled":
        file.write_bytes(hostile.garbled(file.read_bytes(), case.dice))
    elif form == "cut":
        file.write_bytes(file.read_bytes()[: case.dice.randrange(file.stat().st_size + 1)])
    elif form == "odd":
        put_odd_file(case, file)
    elif form == "swapped":
        file.write_bytes(case.pick(b"", b"\0" * 999, LINE.encode(), hostile.json_text(case.dice)))
    elif form in ("code", "slow"):
        settings = folder / "tokenizer_config.json"
        said = json.loads(settings.read_text()) if settings.exists() else {}
        said["tokenizer_class"] = case.pick("MyTokenizer", "ByT5Tokenizer", "CanineTokenizer", "../x", 3, None)
        if form == "code":
            said["auto_map"] = case.pick(
                {"AutoTokenizer": ["my.MyTokenizer", None]}, {"AutoTokenizer": "my.X"}, [], "x"
            )
            (folder / "my.py").write_text("open('ran', 'w')\n")
        settings.write_text(json.dumps(said))
    more = {"tokenizer": "./other", "random_init": True, "special_tokens": case.pick({}, {}, {"eos_token": "</s>"})}
    write_yaml(case.here / "run.yaml", SHORT | more)
    case.tessera(case.pick("train", "preprocess"), "run.yaml")
    if (case.here / "ran").exists():
        case.wrong("code that lay beside the tokenizer was run")


@group(2)
def packing_keys(case: Case) -> None:
    """The keys of packing and of what is evaluated, over rows of lengths that fit badly."""
    case.kind = 16
    lengths = case.pick([1], [2], [16], [17], [15, 1], [8, 9], [1, 2, 3, 40])
    write_rows(case, [{"input_ids": [5] * lengths[i % len(lengths)]} for i in range(case.pick(1, 2, 9, 40))])
    data = case.pick("./made.jsonl", "./made.jsonl", "./book.txt", "./alpaca.jsonl")
    choices: dict[str, tuple[Any, ...]] = {
        "eval_sample_packing": (True, False, None), "pad_to_sequence_len": (True, False),
        "sample_packing": (True, True, "yes"),
        "val_set_size": (0, 1, 0.5, 9), "eval_steps": (1, 0.5), "sequence_len": (2, 16, 17, 1),
        "micro_batch_size": (1, 3),
        "excess_length_strategy": ("drop", "truncate", "raise"), "max_steps": (1, -1), "num_epochs": (1, 0.01),
        "flash_attention": (True, False), "attn_implementation": ("eager", "sdpa", "flash_attention_2", "x"),
        "gradient_accumulation_steps": (1, 3), "warmup_steps": (0.1, 2), "saves_per_epoch": (1, 7),
        "evals_per_epoch": (1, 3),
        "save_strategy": ("epoch", "best", "no"), "load_best_model_at_end": (True,), "early_stopping_patience": (1, 0),
        "metric_for_best_model": ("loss", "eval_loss", "x"), "save_only_model": (True,),
        "optimizer": ("muon", "sgd", "x"),
        "unfrozen_parameters": (["lm_head"], ["["], ["x"], []), "lr_scheduler": ("cosine", "x", "polynomial"),
        "lr_scheduler_kwargs": ({"power": 2}, {"x": 1}, {"num_cycles": 10**400}),
        "optim_args": ("a=b", "x", {"eps": "x"}),
    }  # fmt: skip
    chosen = {name: case.pick(*choices[name]) for name in case.dice.sample(list(choices), 4)}
    settings = {"sample_packing": True} | chosen
    case.what = f"rows of {lengths}, {data}, {settings!r:.200}"
    train(case, data, settings)
