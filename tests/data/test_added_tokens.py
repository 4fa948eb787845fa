"""`special_tokens` and `tokens`: what they add has the ids that transformers gives it, and export and reload agree."""

import json
import shutil

import pytest
from tests.data.helpers import encoded
from tests.data.tokenizers_made import AWKWARD, MADE

from tessera.config.sections.model import SpecialTokensConfig
from tessera.data.added_tokens import MARKS, AddedTokens
from tessera.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe, with_tokens

TEXTS = [*AWKWARD, "a hello b", "<|im_end|>", "the <x>sea<|im_end|>north hello<|turn|>"]


class Keys:
    """The keys of a config that name tokens."""

    def __init__(self, tokens=(), **special):
        self.special_tokens, self.tokens = SpecialTokensConfig(**special), tokens


def added(tokens=(), **special) -> AddedTokens:
    return AddedTokens.of(Keys(tokens, **special))


ALL = added(
    ["hello"], pad_token="<pad>", eos_token="<|im_end|>", bos_token="<x>", additional_special_tokens=["<|turn|>", "<y>"]
)


def saved(tokenizer, source, folder):
    """As a person loads what the run leaves: with the model's config.json beside it."""
    from transformers import AutoTokenizer

    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    if (source / "config.json").exists():
        shutil.copy(source / "config.json", folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", MADE)
def test_a_tokenizer_with_added_tokens_is_the_one_that_is_loaded_again(tmp_path, name):
    source = tmp_path / "source"
    MADE[name](source)
    old, ours = load_tokenizer(source, "tokenizer"), load_tokenizer(source, "tokenizer", ALL)
    theirs = saved(ours, source, tmp_path / "saved")
    assert ours.folder is None and sorted(ours.files) == ["tokenizer.json", "tokenizer_config.json"]
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|im_end|>", "<pad>", "<x>")
    assert ours.eos_id == theirs.eos_token_id and ours.vocab_size == len(theirs) > old.vocab_size
    for text in TEXTS:
        ids = encoded(ours, [text], special=False)[0].tolist()
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == (expected[:-1] if expected[-1:] == [ours.eos_id] else expected)
        assert ours.auto(text)["input_ids"] == theirs(text)["input_ids"]
    if name != "split_specials":
        assert encoded(ours, ["a<|turn|>"], special=False)[0][-1] == theirs.convert_tokens_to_ids("<|turn|>")
    plain = "north wind"  # no text without the new tokens has other ids
    assert encoded(ours, [plain], special=False)[0].tolist() == encoded(old, [plain], special=False)[0].tolist()


def test_new_tokens_have_the_ids_that_axolotl_gives_them(tmp_path):
    """The marks in the order bos, eos, pad, unk; ordinary tokens; further special ones."""
    MADE["plain"](tmp_path)
    given = added(
        ["hello", "sea"], unk_token="<u>", pad_token="<p>", eos_token="<e>", additional_special_tokens=["<t>"]
    )
    auto = load_tokenizer(tmp_path, "tokenizer", given).auto
    size = load_tokenizer(tmp_path, "tokenizer").vocab_size
    texts = ["<e>", "<p>", "<u>", "hello", "sea", "<t>"]
    assert auto.convert_tokens_to_ids(texts) == list(range(size, size + 6))
    assert [auto.added_tokens_decoder[size + place].special for place in range(6)] == [True] * 3 + [False] * 2 + [True]


def test_what_the_tokenizer_has_already_changes_no_id_and_no_file(tmp_path):
    MADE["tokens_in_settings"](tmp_path)
    plain = load_tokenizer(tmp_path, "tokenizer")
    same = load_tokenizer(tmp_path, "tokenizer", added(pad_token="<pad>", additional_special_tokens=["<|turn|>"]))
    assert same.folder == plain.folder == tmp_path and same.digest() == plain.digest() and not same.files
    other = load_tokenizer(tmp_path, "tokenizer", added(pad_token="<extra>"))
    assert other.vocab_size == plain.vocab_size and other.digest() != plain.digest()
    assert [row.tolist() for row in encoded(other, TEXTS)] == [row.tolist() for row in encoded(plain, TEXTS)]
    assert json.loads(other.files["tokenizer_config.json"])["pad_token"] == "<extra>"


def test_a_token_with_flags_keeps_them_when_it_is_named(tmp_path):
    MADE["tokens_with_flags"](tmp_path)
    plain = load_tokenizer(tmp_path, "tokenizer")
    ours = load_tokenizer(tmp_path, "tokenizer", added(pad_token="<|turn|>", additional_special_tokens=["<|turn|>"]))
    assert ours.auto.pad_token == "<|turn|>"
    assert [row.tolist() for row in encoded(ours, TEXTS)] == [row.tolist() for row in encoded(plain, TEXTS)]


@pytest.mark.parametrize("mark", MARKS)
def test_every_mark_is_set(tmp_path, mark):
    MADE["plain"](tmp_path)
    ours = load_tokenizer(tmp_path, "tokenizer", added(**{mark: "<mark>"}))
    assert getattr(ours.auto, mark) == "<mark>" and ours.vocab_size == 331
    assert json.loads(ours.files["tokenizer_config.json"])[mark] == "<mark>"


def test_a_begin_that_is_set_by_a_switch_is_the_new_one(tmp_path):
    MADE["llama_legacy"](tmp_path)
    ours = load_tokenizer(tmp_path, "tokenizer", added(bos_token="<x>"))
    assert encoded(ours, ["a"])[0][0] == ours.auto.convert_tokens_to_ids("<x>") == ours.vocab_size - 1


def test_a_trained_tokenizer_takes_tokens_too(tmp_path):
    trained = train_bpe(["the sea and the wind"], 300)
    ours = with_tokens(trained, ALL)
    theirs = saved(ours, tmp_path, tmp_path / "saved")
    assert ours.vocab_size == trained.vocab_size + 6 == len(theirs)
    assert ours.eos_id == theirs.eos_token_id != trained.eos_id
    for text in TEXTS:
        assert ours.auto(text)["input_ids"] == theirs(text)["input_ids"]
    assert with_tokens(trained, added(eos_token="<|endoftext|>")) is trained
