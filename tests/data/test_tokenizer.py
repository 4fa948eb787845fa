"""Tokenizers are trained, saved, loaded; their end-of-sequence token is found."""

import json

import pytest
from tests.data.helpers import TEXT, encoded
from tokenizers import Tokenizer, processors

from tessera.core.errors import UserError
from tessera.data.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer, save_tokenizer, train_bpe

ODD = "  naïve\t日本 🙂 ok . it 's\r\n\x00\u2028 end  \n don 't"


@pytest.mark.parametrize("beside", [None, {"model_type": "llama"}, {"model_type": "gpt2"}])
def test_transformers_loads_what_was_trained_and_text_comes_back(tmp_path, beside):
    from transformers import AutoTokenizer

    ours = train_bpe([TEXT], 300)
    save_tokenizer(ours, tmp_path)
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (ids,) = encoded(ours, [ODD])
    assert theirs(ODD)["input_ids"] == ids.tolist()
    assert theirs.decode(ids.tolist()) == ours.decode(ids.tolist()) == ODD
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (END_OF_TEXT, ours.eos_id, ours.vocab_size)


def test_the_vocabulary_is_as_large_as_asked_where_the_text_allows():
    assert train_bpe([TEXT], 270).vocab_size == 270
    assert 257 < train_bpe([TEXT], 5000).vocab_size < 400
    with pytest.raises(UserError, match="at least 257"):
        train_bpe([TEXT], 256)


def test_loading_gives_the_same_ids(tokenizer):
    loaded = load_tokenizer(tokenizer.folder, "tokenizer")
    file = load_tokenizer(tokenizer.folder / "tokenizer.json", "tokenizer")
    assert (
        encoded(loaded, [ODD])[0].tolist() == encoded(file, [ODD])[0].tolist() == encoded(tokenizer, [ODD])[0].tolist()
    )
    assert loaded.digest() == file.digest()
    other = TextTokenizer(train_bpe([TEXT], 265).backend, loaded.eos_id, loaded.folder)
    assert loaded.digest() != other.digest()


def special(tmp_path, tokenizer, **files):
    """A copy of the small tokenizer with the tokens <s>, </s> and these files."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return backend


@pytest.mark.parametrize(
    ("files", "token"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": 3}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        ({"config": {"eos_token_id": 65}}, 65),
        ({"config": {"eos_token_id": [66, 67]}}, 66),
    ],
)
def test_end_of_sequence_is_found(tmp_path, tokenizer, files, token):
    backend = special(tmp_path, tokenizer, **files)
    expected = backend.token_to_id(token) if isinstance(token, str) else token
    loaded = load_tokenizer(tmp_path, "base_model")
    assert loaded.eos_id == loaded.auto.eos_token_id == expected


def test_special_tokens_open_a_text_and_never_end_it(tmp_path, tokenizer):
    backend = special(tmp_path, tokenizer, tokenizer_config={"eos_token": "</s>"})
    start, end = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=200)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, "base_model")
    plain = encoded(tokenizer, [TEXT])[0].tolist()
    assert encoded(loaded, [TEXT])[0].tolist() == [start, *plain]
    assert encoded(loaded, [TEXT], special=False)[0].tolist() == plain


def test_bad_tokenizers_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no tokenizer there: neither tokenizer.json") as error:
        load_tokenizer(tmp_path, "base_model")
    assert str(error.value).startswith(f"base_model: {tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, "base_model")
    special(tmp_path, tokenizer)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path, "base_model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        load_tokenizer(tmp_path, "base_model")


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_an_end_in_the_text_and_that_of_the_tokenizer_are_left_to_the_row(tmp_path, tokenizer, single):
    backend = special(tmp_path, tokenizer, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    ids = [(text, backend.token_to_id(text)) for text in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, "base_model")
    plain = encoded(tokenizer, [TEXT])[0].tolist()
    assert encoded(loaded, [TEXT + "</s>"])[0].tolist() == [ids[0][1], *plain]


def test_a_text_that_begins_with_the_begin_token_has_it_once(tmp_path, tokenizer):
    backend = special(tmp_path, tokenizer, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, "base_model")
    plain = encoded(tokenizer, [TEXT])[0].tolist()
    for text in (TEXT, "<s>" + TEXT):
        assert encoded(loaded, [text])[0].tolist() == [start, *plain]
