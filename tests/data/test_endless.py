"""Files and templates that are small and mean more than any machine has: one message, in bounded time and memory."""

import bz2
import gzip
import lzma
import threading

import pytest
import zstandard
from tests.data.chats import chat_tokenizer
from tests.data.helpers import entry

from tessera.core.errors import UserError
from tessera.data.formats import bounded, container, json_rows
from tessera.data.formats.entry import Entry, Reading, UserPrompt
from tessera.data.formats.known import reader_of
from tessera.data.formats.template import template_of
from tessera.data.prepare import prepare
from tessera.data.samples import Origin

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("ending", PACK)
def test_a_file_that_unpacks_to_many_times_its_size_is_refused(write, settings, monkeypatch, ending):
    monkeypatch.setattr(container, "ANYWAY", 1 << 16)
    block = b'{"text": "%s"}\n' % (b"north wind " * 400)
    path = write(f"a.jsonl{ending}", PACK[ending](block * 100))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        prepare(settings(path), None)
    assert not (path.parent / "out").exists()
    monkeypatch.setattr(container, "ANYWAY", 1 << 20)
    assert prepare(settings(path), None).manifest.train_rows


def test_no_more_of_a_line_is_read_than_a_row_may_have(write, settings, monkeypatch):
    monkeypatch.setattr(json_rows, "SMALL", 200)
    path = write("a.jsonl", [{"text": "north " * 30}, {"text": "wind " * 60}])
    with pytest.raises(UserError, match=r"a.jsonl, line 2\n  longer than 200 bytes"):
        prepare(settings(entry(path, "completion")), None)


@pytest.mark.parametrize(
    "braces", ["{instruction:>99999999999}", "{instruction:{input}}", "{instruction!r}", "{0.__class__}", "{input.x}"]
)
def test_braces_of_a_prompt_hold_a_name_alone(braces):
    with pytest.raises(UserError, match="is not known here\n  in braces may stand instruction and input"):
        reader_of(Entry("a", UserPrompt(format=braces)), "user-written", None)


def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "LONGEST", 0.01)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = template_of(Entry("a"), Reading(tokenizer=chat_tokenizer(tmp_path), chat_template_jinja=loop), [])
    with pytest.raises(UserError, match="the chat template refuses this chat: it takes longer than"):
        template.render([{"role": "user", "content": "north"}], None, Origin(tmp_path))


def test_a_template_that_ends_is_rendered_in_any_thread(tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = template_of(Entry("a"), Reading(tokenizer=chat_tokenizer(tmp_path), chat_template_jinja=text), [])
    turns, found = [{"role": "user", "content": "north"}], []
    thread = threading.Thread(target=lambda: found.append(template.render(turns, None, Origin(tmp_path))))
    thread.start()
    thread.join()
    assert found == [template.render(turns, None, Origin(tmp_path))] == [("north", [])]


@pytest.mark.parametrize(
    "text", ["{{ 9 ** 9 ** 9 }}", "{% set n = 2 %}{{ n ** n }}{% generation %}x{% endgeneration %}"]
)
def test_a_template_with_powers_is_refused(tmp_path, text):
    reading = Reading(tokenizer=chat_tokenizer(tmp_path), chat_template_jinja=text)
    with pytest.raises(UserError, match=r"the template raises to a power \(\*\*\)"):
        template_of(Entry("a"), reading, [])


def test_asterisks_that_are_no_power_are_taken(tmp_path):
    text = "{# **bold** #}**{{ messages[0].content }}**{{ '**' }}"
    reading = Reading(tokenizer=chat_tokenizer(tmp_path), chat_template_jinja=text)
    assert template_of(Entry("a"), reading, []).text == text
