"""Chats: what is rendered, what of it is learnt, and every key that changes either."""

import json

import pytest
from tests.data.chats import MARKED, UNMARKED, chat_tokenizer
from tests.data.helpers import all_rows, entry
from transformers import AutoTokenizer

from tessera.config.sections.model import SpecialTokensConfig
from tessera.core.errors import UserError
from tessera.data.chat_templates import template_names, template_text
from tessera.data.formats.entry import Reading
from tessera.data.prepare import prepare
from tessera.data.sources import read_documents, read_files


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("hello"), said("one"), user("more"), said("two")]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer whose template marks no answers, and whose end of sequence is not the end of a turn."""
    return chat_tokenizer(tmp_path_factory.mktemp("unmarked"), UNMARKED)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("marked"), MARKED)


@pytest.fixture
def chat(write, folder):
    """(rendered text, learnt texts) of one row, and the notes."""

    def chat(row, *, tokenizer=folder, notes=None, shared=None, **keys):
        row = {"messages": row} if isinstance(row, list) else row
        source = entry(write("chat.jsonl", [row]), keys.pop("type", "chat_template"), **keys)
        reading = Reading(tokenizer=tokenizer, **shared or {})
        (file,) = read_files([source], None, reading, notes)
        (document,) = read_documents(file)
        (segment,) = document.segments
        assert not document.opened and not document.ended and not document.cut
        return segment.text, [segment.text[start:end] for start, end in segment.learnt]

    return chat


def test_only_the_answers_are_learnt_and_what_ends_them(chat):
    notes: list[str] = []
    text, learnt = chat(TALK, notes=notes)
    assert text == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    assert learnt == ["one", END, "two", END]
    assert notes == [f"turns end with {END}, as the chat template writes them (eot_tokens chooses another token)"]


@pytest.mark.parametrize("content", ["\n", "é", "hello", " t hello", "ends on a line\n", "user", "assistant\n", "</s>"])
def test_labels_are_those_of_the_generation_mask(write, settings, marked, content):
    turns = [user(content), said(content), user("x"), said("hello " + content)]
    tokenizer = AutoTokenizer.from_pretrained(marked)
    given = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    mask = zip(given["input_ids"], given["assistant_masks"], strict=True)
    config = settings(entry(write("a.jsonl", [{"messages": turns}])), tokenizer=str(marked), sequence_len=500)
    labels = [token if learnt else -100 for token, learnt in mask]
    assert all_rows(prepare(config, None).folder) == [(given["input_ids"], labels)]


@pytest.mark.parametrize("name", template_names())
def test_templates_by_name_mark_answers_that_are_found_without_the_marks_too(chat, name):
    turns = [user("hello"), said("one"), user("more"), said("two")]
    _, learnt = chat(turns, chat_template=name)
    assert [text for text in learnt if "one" in text and "two" not in text] and "two" in learnt[-1]
    assert not any("hello" in text or "more" in text for text in learnt)
    _, found = chat(turns, chat_template=name, train_on_eos="turn", roles_to_train=["assistant", "nobody"])
    kept = "".join(found).replace("<|im_end|>", "").replace("</s>", "").replace("<end_of_turn>", "")
    assert kept == "onetwo"


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [
        ({"roles_to_train": ["user"]}, ["hello", END, "more", END]),
        ({"roles_to_train": ["human"]}, ["hello", END, "more", END]),
        ({"train_on_eos": "turn"}, ["one", END, "two", END]),
        ({"train_on_eos": "all"}, [END, "one", END, END, "two", END]),
        ({"train_on_eos": "last"}, ["one", "two", END]),
        ({"train_on_eot": "last"}, ["one", "two", END]),
    ],
)
@pytest.mark.parametrize("marks", [False, True])
def test_roles_and_ends_of_turns(chat, folder, marked, keys, learnt, marks):
    _, found = chat(TALK, tokenizer=marked if marks else folder, **keys)
    assert "".join(found) == "".join(learnt)


def test_tokens_that_end_a_turn_are_named(chat, tmp_path):
    """Two of them here: the template writes both, and each has a rule of its own."""
    template = UNMARKED.replace("<|im_end|>\\n", "<|im_end|>\\n</s>")
    both = chat_tokenizer(tmp_path, template)
    assert chat(TALK, tokenizer=both)[1] == ["one", "</s>", "two", "</s>"]  # the end of sequence alone is known
    shared = {"eot_tokens": (END,)}
    assert chat(TALK, tokenizer=both, shared=shared)[1] == ["one", END, "</s>", "two", END, "</s>"]
    _, learnt = chat(TALK, tokenizer=both, shared=shared, train_on_eos="last", train_on_eot="turn")
    assert learnt == ["one", END, "two", END, "</s>"]
    with pytest.raises(UserError, match="eot_tokens: <nothing>\n  is not one token"):
        chat(TALK, tokenizer=both, shared={"eot_tokens": ("<nothing>",)})
    with pytest.raises(UserError, match="train_on_eot\n  is all, and train_on_eos turn"):
        chat(TALK, tokenizer=both, shared={"eot_tokens": ("</s>",)}, train_on_eot="all")


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ({"train": False}, {}),
        ({"weight": 0}, {}),
        ({"learn": False}, {"message_field_training": "learn"}),
    ],
)
def test_a_turn_says_itself_whether_it_is_learnt(chat, folder, marked, marks, flags, keys):
    turns = [user("hello"), said("one", **flags), user("more"), said("two")]
    text, learnt = chat(turns, tokenizer=marked if marks else folder, **keys)
    assert "".join(learnt) == "two" + END and str(flags) not in text
    asked = [{**user("hello"), **dict.fromkeys(flags, True)}, *turns[1:]]
    assert "".join(chat(asked, tokenizer=marked if marks else folder, **keys)[1]) == f"hello{END}two{END}"
    with pytest.raises(UserError, match="line 1\n  turn 2 has .*: 'no'"):
        chat([user("x"), said("y", **dict.fromkeys(flags, "no"))], **keys)


def test_parts_of_a_turn_are_learnt(chat):
    detail = [{"begin_offset": 0, "end_offset": 3, "train": True}, {"begin_offset": 4, "end_offset": 8, "train": False}]
    turns = [user("x"), said("one, two and three", parts=detail), user("y"), said("two")]
    assert chat(turns, message_field_training_detail="parts")[1] == ["one,", END, "two", END]
    assert chat(turns)[1] == ["one, two and three", END, "two", END]
    with pytest.raises(UserError, match="turn 2 has training details"):
        chat([user("x"), said("y", parts=[{"begin": 0}])], message_field_training_detail="parts")


def test_parts_of_a_content_say_themselves_whether_they_are_learnt(chat):
    parts = [{"type": "text", "text": "one", "train": False}, {"type": "text", "text": " two"}, " three"]
    given = [user("x"), said(parts), user("y"), said("four")]
    text, learnt = chat(given)
    assert "one two three" in text and learnt == [" two", " three", END, "four", END]


def test_an_empty_answer_teaches_nothing(chat):
    assert chat([user("x"), said(""), user("y"), said("two")])[1] == ["two", END]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": TALK}, {}),
        ({"conversations": TALK}, {}),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "one"}, *TALK[2:]]}, {}),
        ({"dialog": TALK, "messages": [user("other")]}, {"field_messages": "dialog"}),
        (
            {"messages": [{"who": m["role"], "what": m["content"], "role": "x", "content": "y"} for m in TALK]},
            {"message_property_mappings": {"role": "who", "content": "what"}},
        ),
        ({"messages": [{"who": m["role"], "content": m["content"]} for m in TALK]}, {"message_field_role": "who"}),
        ({"messages": [{"role": m["role"], "what": m["content"]} for m in TALK]}, {"message_field_content": "what"}),
        (
            {"messages": [{**m, "role": {"user": "ask", "assistant": "say"}[m["role"]]} for m in TALK]},
            {"roles": {"user": ["ask"], "assistant": ["say"]}},
        ),
        ({"messages": [{**m, "name": None} for m in TALK], "system": None, "tools": None}, {}),
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]}, {}),
    ],
)
def test_messages_of_any_keys_make_the_same_chat(chat, row, keys):
    assert chat(row, **keys) == chat(TALK)


def test_sharegpt_is_read_as_a_chat_and_told(chat):
    notes: list[str] = []
    row = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "one"}, *TALK[2:]]}
    assert chat(row, type="sharegpt", notes=notes) == chat(TALK)
    assert "sharegpt is read as chat_template" in notes[0]


def test_of_a_folder_sharegpt_is_told_once(write, folder):
    for name in ("d/a.jsonl", "d/b.jsonl"):
        path = write(name, [{"messages": TALK}])
    notes: list[str] = []
    assert len(read_files([entry(path.parent, "sharegpt")], None, Reading(tokenizer=folder), notes)) == 2
    assert sum("sharegpt" in note for note in notes) == 1


def test_a_system_prompt_of_its_own_column(chat):
    told = [{"role": "system", "content": "be"}, *TALK]
    assert chat({"messages": TALK, "system": "be"}) == chat(told)
    assert chat({"messages": TALK, "rules": "be"}, field_system="rules") == chat(told)
    assert chat({"messages": told, "system": "other"}) == chat(told)
    assert chat(told, drop_system_message=True) == chat(TALK)


THINKING = (
    "{% for m in messages %}{{ '[' + m.role + ']' + ('<' + m.thought + '>' if m.thought else '') + m.content }}"
    "{{ '</s>' }}{% endfor %}"
)


def test_reasoning_is_handed_to_the_template_under_its_name(chat, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, THINKING)
    keys = {"field_thinking": "why", "template_thinking_key": "thought"}
    text, learnt = chat([user("q"), said("a", why="since")], tokenizer=tokenizer, **keys)
    assert text == "[user]q</s>[assistant]<since>a</s>" and learnt == ["<since>a", "</s>"]
    assert chat([user("q"), said("a", why="since")], tokenizer=tokenizer)[0] == "[user]q</s>[assistant]a</s>"
    split = {"split_thinking": True, "template_thinking_key": "thought"}
    within = [user("q"), said("<think>\nsince\n</think>\n\na")]
    assert chat(within, tokenizer=tokenizer, **split)[0] == text
    assert "<think>" in chat(within, tokenizer=tokenizer)[0]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_and_calls_reach_the_template(chat, given):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [user("q"), said(None, tool_calls=[call]), {"role": "tool", "content": "7"}, said("seven")]
    text, learnt = chat({"messages": turns, "kit": given}, chat_template="qwen_25", field_tools="kit")
    assert '"name": "f", "parameters": {"type": "object"}' in text
    assert learnt == [
        f'<tool_call>\n{{"name": "f", "arguments": {{"x": 1}}}}\n</tool_call>{END}',
        f"seven{END}",
    ]
    assert '"parameters"' not in chat({"messages": turns, "kit": given}, chat_template="qwen_25")[0]
    with pytest.raises(UserError, match="line 1\n  the tools cannot be read"):
        chat({"messages": turns, "tools": "[{"}, chat_template="qwen_25")


def test_which_template(chat, tmp_path, folder):
    bare = chat_tokenizer(tmp_path / "bare", None)
    chatml = chat(TALK, chat_template="chatml")
    assert "<start_of_turn>model" in chat(TALK, chat_template="gemma")[0]
    assert chat(TALK, tokenizer=bare, chat_template="tokenizer_default_fallback_chatml") == chatml
    assert chat(TALK, chat_template="tokenizer_default_fallback_gemma") == chat(TALK)
    assert chat(TALK, shared={"chat_template": "chatml"}) == chatml
    assert chat(TALK, shared={"chat_template": "gemma"}, chat_template="chatml") == chatml
    own = "{% for m in messages %}{{ m.role + ':' + m.content + mark + eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    for given in (own, str(tmp_path / "own.jinja")):
        for keys in ({"chat_template": "jinja"}, {}):
            shared = {"chat_template_kwargs": (("mark", "!"),)}
            text, learnt = chat(TALK[:2], shared=shared, chat_template_jinja=given, **keys)
            assert text == "user:hello!</s>assistant:one!</s>" and learnt == ["one"]  # "!" stands before the end


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"chat_template": "chatmll"}, "chat_template: chatmll\n  is not known\n  known: tokenizer_default"),
        ({"chat_template": "jinja"}, "needs chat_template_jinja"),
        ({"chat_template": "chatml", "chat_template_jinja": "{{ x }}"}, "chat_template is chatml"),
        ({"chat_template_jinja": "nowhere.jinja"}, "chat_template_jinja: nowhere.jinja\n  does not exist"),
        ({"chat_template_jinja": "{% for %}"}, "line 1\n  the chat template refuses this chat"),
        ({"chat_template_jinja": "{{ raise_exception('no such role') }}"}, "line 1\n .*no such role"),
        ({"chat_template_jinja": "{{ messages[0].content }}"}, "leaves out turn 2, which is learnt"),
        (
            {"chat_template_jinja": "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"},
            r"writes turn 2 more than once\n  put \{% generation %\}",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_refused(chat, keys, told):
    with pytest.raises(UserError, match=told):
        chat(TALK[:2], **keys)


def test_a_tokenizer_without_a_template_or_none_at_all(chat, tmp_path):
    with pytest.raises(UserError, match="has no chat template\n  chat_template: alpaca | chatml"):
        chat(TALK, tokenizer=chat_tokenizer(tmp_path / "bare", None))
    with pytest.raises(UserError, match="not for one that is trained on them"):
        chat(TALK, tokenizer=None)
    with pytest.raises(UserError, match="no tokenizer there"):
        chat(TALK, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "x"}, "`messages` must be a list of messages; the row has text"),
        ({"messages": []}, "`messages` must be a list of messages"),
        ({"messages": ["hi"]}, "`messages` must be a list of messages"),
        ({"messages": [{"content": "x"}]}, "turn 1 has no role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"has the role 'bot'.*\n  roles: {assistant: \[bot\]}"),
        ({"messages": [user("x"), {"role": "assistant"}]}, "turn 2 has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "turn 1 has a content that is"),
        (
            {"messages": [user("x"), said("", tool_calls=[{"function": {"arguments": "{"}}])]},
            "turn 2 has no valid JSON",
        ),
        ({"messages": [user("x"), said("", tool_calls=[{"function": {"name": "f"}}])]}, "writes no tool calls"),
        ({"messages": TALK, "loss_mask": [0, 1, 0, 1]}, "`loss_mask` would change"),
    ],
)
def test_rows_that_are_no_chats_are_refused_with_their_line(chat, row, told):
    with pytest.raises(UserError, match=f"line 1\n  .*{told}"):
        chat(row)


def test_prompt_and_completion_that_are_chats(chat):
    row = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert chat(row, type=None) == (chat(TALK)[0], ["two", END])
    assert chat({"prompt": TALK[:3], "completion": "two"}, type=None) == (chat(TALK)[0], ["two", END])


def test_inputs_are_learnt_on_request(chat):
    assert "".join(chat(TALK, shared={"train_on_inputs": True})[1]) == f"hello{END}one{END}more{END}two{END}"


def test_a_chat_ends_where_its_turns_end(write, settings, folder):
    """So the model that is handed out stops there when it generates."""
    config = settings(entry(write("a.jsonl", [{"messages": TALK}])), tokenizer=str(folder), sequence_len=500)
    assert prepare(config, None).manifest.end_tokens == [0, 3]


@pytest.mark.parametrize(
    "keys",
    [
        {"roles_to_train": ["user"]},
        {"chat_template": "chatml"},
        {"train_on_eos": "last"},
        {"drop_system_message": True},
    ],
)
def test_another_setting_is_another_key_of_the_cache(write, folder, keys):
    path = write("a.jsonl", [{"messages": TALK}])
    plain, other = (read_files([entry(path, **each)], None, Reading(tokenizer=folder))[0].key for each in ({}, keys))
    assert plain != other


def test_a_template_that_is_asked_for_goes_out_with_the_tokenizer(write, settings, folder):
    rows = write("chat.jsonl", [{"messages": TALK}])
    own = {"tokenizer": str(folder), "sequence_len": 400, "val_set_size": 0}
    prepared = prepare(settings(entry(rows, "chat_template"), chat_template="llama3", **own), None)
    there = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    assert there.get_chat_template() == template_text("llama3", None, there)
    assert there.get_chat_template() != AutoTokenizer.from_pretrained(folder).get_chat_template()
    kept = prepare(settings(entry(rows, "chat_template"), chat_template="tokenizer_default", **own), None)
    assert kept.tokenizer_folder == folder.resolve()


def test_tokens_of_a_template_that_the_tokenizer_lacks_are_told_of(write, folder):
    path = write("a.jsonl", [{"messages": TALK}])
    lacking = "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"

    def told(**keys):
        notes: list[str] = []
        read_files([entry(path, **keys)] * 2, None, Reading(tokenizer=folder), notes)
        return [note for note in notes if "pieces" in note]

    (line,) = told(chat_template="llama3")
    assert line.startswith(f"the tokenizer does not have {lacking} of the chat template: they are trained as pieces")
    assert told() == told(chat_template="chatml") == []


def test_tokens_that_the_config_adds_end_turns_too(write, settings, folder):
    rows = write("chat.jsonl", [{"messages": TALK}])
    template = "{% for m in messages %}{{ m['content'] }}<|over|>{{ eos_token }}{% endfor %}"
    keys = {"tokenizer": str(folder), "sequence_len": 400, "tokens": ["<|over|>"], "eot_tokens": ["<|over|>"]}
    keys["special_tokens"] = SpecialTokensConfig(eos_token="<|end|>")
    config = settings(entry(rows, "chat_template"), chat_template_jinja=template, **keys)
    prepared = prepare(config, None)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    over, end = tokenizer.convert_tokens_to_ids(["<|over|>", "<|end|>"])
    ((tokens, labels),) = all_rows(prepared.folder)
    assert tokens.count(over) == tokens.count(end) == 4
    assert labels.count(over) == labels.count(end) == 2, "after each answer, and after no question"
