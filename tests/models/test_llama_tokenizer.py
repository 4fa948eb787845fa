"""A Llama 2 folder, whose tokenizer transformers builds anew: refused with what to do, and the ids are equal then."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer

from tessera.core.errors import UserError
from tessera.data.tokenizer import load_tokenizer


def test_ids_are_those_of_autotokenizer_or_the_folder_is_refused(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "▁a▁": 7}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"other ids\n.*save_pretrained"):
        load_tokenizer(tmp_path, "base_model")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    ours, texts = load_tokenizer(tmp_path, "base_model"), ["a b", "  ab", "</s> a", "b<s>a"]
    found = [row.tolist() for row in ours.encode(texts)]
    assert found == [list(theirs(text)["input_ids"]) for text in texts]
