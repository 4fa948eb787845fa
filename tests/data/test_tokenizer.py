"""Tokenizers are trained, saved, loaded; their end-of-sequence token is found."""

import errno
import json
from pathlib import Path

import pytest
from tests.data.helpers import TEXT
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
    (ids,) = ours.encode([ODD])
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
    assert loaded.encode([ODD])[0].tolist() == file.encode([ODD])[0].tolist() == tokenizer.encode([ODD])[0].tolist()
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
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": 3}}, "</s>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
        ({"config": {"eos_token_id": 65}}, 65),
        ({"config": {"eos_token_id": [66, 67]}}, 66),
    ],
)
def test_end_of_sequence_is_found(tmp_path, tokenizer, files, token):
    backend = special(tmp_path, tokenizer, **files)
    expected = backend.token_to_id(token) if isinstance(token, str) else token
    assert load_tokenizer(tmp_path, "base_model").eos_id == expected


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
    plain = tokenizer.encode([TEXT])[0].tolist()
    assert loaded.encode([TEXT])[0].tolist() == [start, *plain]
    assert loaded.encode([TEXT], special=False)[0].tolist() == plain


def test_bad_tokenizers_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no tokenizer.json") as error:
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


def test_a_text_that_begins_with_the_begin_token_has_it_once(tmp_path, tokenizer):
    backend = special(tmp_path, tokenizer, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, "base_model")
    plain = tokenizer.encode([TEXT])[0].tolist()
    for text in (TEXT, "<s>" + TEXT):
        assert loaded.encode([text])[0].tolist() == [start, *plain]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer_config": {"eos_token": "</s>", "additional_special_tokens": ["<turn>"]}}, "<turn> (tok"),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "<gone>"),
        ({"tokenizer_config": {"eos_token": "</s>", "unk_token": {"content": "def"}}}, "def"),
        ({"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {"999": {"content": "<s>"}}}}, "<s>"),
        ({"tokenizer_config": {"eos_token": "</s>", "extra_special_tokens": {"image": "<image>"}}}, "<image>"),
        ({"special_tokens_map": {"eos_token": "</s>", "pad_token": "<pad>"}}, "<pad> (special"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "added_tokens": {"<tool>": 300}}, "<tool> (added"),
        ({"tokenizer_config": {"eos_token": "</s>", "add_prefix_space": True}}, "add_prefix_space is true"),
        ({"tokenizer_config": {"eos_token": "</s>", "split_special_tokens": True}}, "split_special_tokens"),
        ({"tokenizer_config": {"eos_token": "</s>", "model_specific_special_tokens": {"image": "<image>"}}}, "<image>"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<s>"}}, "eos_token: is </s>"),
    ],
)
def test_what_other_files_say_and_tokenizer_json_does_not_is_refused_by_name(tmp_path, tokenizer, files, named):
    special(tmp_path, tokenizer, **files)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path, "base_model")
    assert named in str(error.value)


def test_a_token_that_takes_spaces_with_it_in_one_file_alone_is_refused_as_autotokenizer_gives_other_ids(
    tmp_path, tokenizer
):
    from transformers import AutoTokenizer

    number = special(tmp_path, tokenizer).token_to_id("</s>")
    token = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}

    def written(**flags: bool) -> None:
        listed = settings | {"added_tokens_decoder": {str(number): token | flags}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))

    written()
    ours, text = load_tokenizer(tmp_path, "base_model"), "north </s> wind"
    assert ours.encode([text])[0].tolist() == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    written(lstrip=True)
    assert ours.encode([text])[0].tolist() != AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    with pytest.raises(UserError, match="</s>: lstrip is true, in tokenizer.json false"):
        load_tokenizer(tmp_path, "base_model")


def test_a_tokenizer_in_a_folder_that_cannot_be_searched_is_refused(tmp_path, monkeypatch):
    looked_at = Path.stat

    def stat(path, **how):
        if path.name == "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked_at(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match="permission denied"):
            load_tokenizer(path, "tokenizer")


def test_a_folder_written_whole_as_the_refusal_says_has_the_ids_of_autotokenizer(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    settings = {
        "eos_token": "<end>",
        "additional_special_tokens": ["<turn>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special(tmp_path, tokenizer, tokenizer_config=settings)
    with pytest.raises(UserError, match="save_pretrained"):
        load_tokenizer(tmp_path, "base_model")
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path, "base_model"), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("north <turn> wind", "<turn>", ODD):
        assert ours.encode([text])[0].tolist() == theirs(text)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id
