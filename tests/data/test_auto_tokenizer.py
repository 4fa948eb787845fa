"""The ids of a text are those of AutoTokenizer, for tokenizer folders of every kind; or a plain word says why not."""

import json
import os
import pickle
from pathlib import Path

import pytest
from tests.data.helpers import encoded
from tests.data.tokenizers_made import AWKWARD, FAST, MADE

from tessera.core import errors
from tessera.data.tokenizer import load_tokenizer


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def without_ends(ids: list[int], opening: list[int], eos: int, closes: bool) -> list[int]:
    """What AutoTokenizer gives, but for a doubled begin and the end of sequence, which rows get by themselves."""
    ids = ids[1:] if opening and ids[:2] == opening * 2 else ids
    ids = ids[:-1] if closes else ids
    return ids[:-1] if ids and ids[-1] == eos else ids


@pytest.mark.parametrize("name", MADE)
def test_ids_are_those_of_autotokenizer(tmp_path, name):
    MADE[name](tmp_path)
    reference, ours = theirs(tmp_path), load_tokenizer(tmp_path, "tokenizer")
    assert ours.eos_id == reference.eos_token_id
    assert ours.vocab_size == len(reference) > 10
    empty = reference("")["input_ids"]
    closes = len(empty) > 0 and empty[-1] == ours.eos_id
    opening = empty[:1] if len(empty) > closes else []
    found = encoded(ours, AWKWARD)
    for text, ids in zip(AWKWARD, found, strict=True):
        expected = reference(text)["input_ids"]
        assert ids.tolist() == without_ends(expected, opening, ours.eos_id, closes), text
        inner = reference(text, add_special_tokens=False)["input_ids"]
        assert encoded(ours, [text], special=False)[0].tolist() == without_ends(inner, [], ours.eos_id, False), text
    handed = pickle.loads(pickle.dumps(ours))  # as to a worker
    assert [row.tolist() for row in encoded(handed, AWKWARD)] == [ids.tolist() for ids in found]
    assert len({tuple(ids.tolist()) for ids in found}) > len(found) / 2, "nothing is told apart"
    assert ours.auto(AWKWARD[4])["input_ids"] == reference(AWKWARD[4])["input_ids"]


def test_no_other_file_says_what_tokenizer_json_alone_does_not(tmp_path):
    """The list bites: read by itself, tokenizer.json gives other ids in many of these folders, or is not there."""
    from tokenizers import Tokenizer

    other = []
    for name, make in MADE.items():
        make(tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        if not file.exists():
            other.append(name)
            continue
        alone, ours = Tokenizer.from_file(str(file)), load_tokenizer(tmp_path / name, "tokenizer")
        alone.no_truncation()
        if any(alone.encode(text).ids != ours.auto(text)["input_ids"] for text in AWKWARD):
            other.append(name)
    assert len(other) >= 16


def test_what_transformers_is_asked_for_leaves_no_trace(tmp_path):
    MADE["tokens_in_settings"](tmp_path)
    ours = load_tokenizer(tmp_path, "tokenizer")
    found = [ids.tolist() for ids in encoded(ours, AWKWARD)]
    ours.auto(AWKWARD, padding="max_length", max_length=2, truncation=True)
    assert ours.backend.padding and ours.backend.truncation
    assert [ids.tolist() for ids in encoded(ours, AWKWARD)] == found


def spoil(folder: Path, name: str, content: object) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def say(folder: Path, class_name: str, **settings: object) -> None:
    spoil(folder, "tokenizer_config.json", {"tokenizer_class": class_name} | settings)


def own_code(folder: Path) -> None:
    spoil(folder, "tokenization_own.py", "raise SystemExit('it ran')")
    say(folder, "Own", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})


def in_python_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    MADE["gpt2_files"](folder)
    say(folder, "CTRLTokenizer")


def of_another_class(folder: Path) -> None:
    os.rename(folder / "tokenizer.json", folder / "vocab.txt")
    say(folder, "LlamaTokenizer")


WRONG = {
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "no tokenizer there: neither tokenizer.json"),
    "broken": (lambda f: spoil(f, "tokenizer.json", "{"), "cannot be read as a tokenizer by transformers"),
    "settings": (lambda f: spoil(f, "tokenizer_config.json", "{"), "tokenizer_config.json\n  cannot be read as JSON"),
    "a list": (lambda f: spoil(f, "special_tokens_map.json", []), "special_tokens_map.json\n  cannot be read as a"),
    "type": (lambda f: say(f, FAST, eos_token=3), "cannot be read as a tokenizer"),
    "number": (lambda f: spoil(f, "added_tokens.json", {"<x>": "a"}), "cannot be read as a tokenizer"),
    "pipe": (lambda f: fifo(f, "tokenizer.json"), "tokenizer.json\n  is no regular file"),
    "pipe beside": (lambda f: fifo(f, "merges.txt"), "merges.txt\n  is no regular file"),
    "gigantic": (lambda f: os.truncate(f / "tokenizer.json", 2**40), "is too large: 1 TiB"),
    "device": (lambda f: os.symlink("/dev/zero", f / "added_tokens.json"), "is no regular file"),
    "no end": (lambda f: say(f, FAST), "no end-of-sequence token"),
    "own code": (own_code, "needs code that comes with it, which is never run"),
    "in Python alone": (in_python_alone, "no fast form of this tokenizer (CTRLTokenizer)"),
    "of another class": (of_another_class, "holds no vocabulary for transformers' LlamaTokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_message(tmp_path, name):
    MADE["plain"](tmp_path)
    make, told = WRONG[name]
    make(tmp_path)
    with pytest.raises(errors.UserError) as error:
        load_tokenizer(tmp_path, "base_model")
    assert told in str(error.value) and str(error.value).startswith(f"base_model: {tmp_path}")
    assert len(str(error.value)) < 1500 and "it ran" not in str(error.value)


def test_a_file_of_another_name_is_refused_and_not_its_neighbour_taken(tmp_path):
    MADE["plain"](tmp_path)
    (tmp_path / "other.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    with pytest.raises(errors.UserError, match="other.json\n  is a file"):
        load_tokenizer(tmp_path / "other.json", "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer.json", "tokenizer").folder == tmp_path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    tmp_path.chmod(0)
    with pytest.raises(errors.UserError, match="permission denied"):
        load_tokenizer(tmp_path, "tokenizer")
    tmp_path.chmod(0o700)
