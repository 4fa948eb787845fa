"""Tokenizer folders of every kind that models come with, made small: `MADE[name](folder)` writes one."""

import base64
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "the sea and the north wind, a lamp in the river's cold stone; seven maps read. Naïve café 数学 🙂 x=1 y=22"
TEXT = "\n".join(f"{WORDS[i:]} {WORDS[:i]}" for i in range(40))
FAST = "PreTrainedTokenizerFast"
AWKWARD = [
    "",
    " ",
    "north",
    " north",
    "  north\t wind \n\n",
    "the sea</s> and <s>the <|turn|>wind",
    "<|turn|>north <|turn|> wind<|turn|> ",
    "<s>the sea",
    "the sea</s>",
    "</s></s>",
    "<pad>lamp<unk> <extra> x",
    "naïve café 数学 🙂 ﬁ Å \u00a0\u2028 \u200b",
    "NORTH Wind's lamp, don't . ok !",
    "▁the▁sea",
    "<0x0A>\x00",
    "\r\nx=1\n\ty=22",
    "<|endoftext|>the sea<|im_end|>",
    "[CLS] the [SEP]",
]


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def settings(folder: Path, class_name: str | None = FAST, **content: Any) -> None:
    write(folder, "tokenizer_config.json", ({"tokenizer_class": class_name} if class_name else {}) | content)


@cache
def _byte_level(special: tuple[str, ...]) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend.to_str()


def byte_level(*special: str) -> Tokenizer:
    return Tokenizer.from_str(_byte_level(special or ("<s>", "</s>")))


def save(backend: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


def opened(backend: Tokenizer, single: str) -> Tokenizer:
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return backend


def plain(folder: Path) -> None:
    save(byte_level(), folder)
    settings(folder, bos_token="<s>", eos_token="</s>")


def opened_and_ended(folder: Path) -> None:
    save(opened(byte_level(), "<s> $A </s>"), folder)
    settings(folder, bos_token="<s>", eos_token="</s>")


def tokens_in_settings(folder: Path) -> None:
    plain(folder)
    more = ["<|turn|>", "<extra>"]
    settings(folder, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=more)


def tokens_with_flags(folder: Path) -> None:
    """Tokens that take spaces with them, that are whole words only, that are matched in the normalized text."""
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    flags = [
        AddedToken("<|turn|>", lstrip=True, rstrip=True, special=True),
        AddedToken("lamp", single_word=True, normalized=False),
        AddedToken("NORTH", normalized=True),
        AddedToken("Wind", normalized=False),
    ]
    backend.add_tokens(flags)
    save(backend, folder)
    settings(folder, eos_token="</s>")


def flags_in_settings(folder: Path) -> None:
    """added_tokens_decoder says of tokens of tokenizer.json what that does not."""
    backend = byte_level()
    backend.add_special_tokens(["<|turn|>", "<extra>"])
    save(backend, folder)
    flags = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}
    number = backend.token_to_id("<|turn|>")
    listed = {str(number): {"content": "<|turn|>"} | flags, str(number + 2): {"content": "<|im_end|>"} | flags}
    settings(folder, eos_token="</s>", added_tokens_decoder=listed)


def special_tokens_map(folder: Path) -> None:
    save(byte_level(), folder)
    settings(folder)
    token = {"content": "</s>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    write(folder, "special_tokens_map.json", {"eos_token": token, "pad_token": "<pad>", "bos_token": "<s>"})


def added_tokens_file(folder: Path) -> None:
    plain(folder)
    size = byte_level().get_vocab_size()
    write(folder, "added_tokens.json", {"<|turn|>": size, "<extra>": size + 1})


def bos_switch(folder: Path) -> None:
    save(byte_level(), folder)
    settings(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def eos_switch(folder: Path) -> None:
    save(opened(byte_level(), "<s> $A"), folder)
    settings(folder, bos_token="<s>", eos_token="</s>", add_bos_token=False, add_eos_token=True)


def split_specials(folder: Path) -> None:
    plain(folder)
    settings(folder, bos_token="<s>", eos_token="</s>", split_special_tokens=True)


def prefix_space(folder: Path) -> None:
    save(byte_level("<|endoftext|>"), folder)
    settings(folder, "GPT2Tokenizer", eos_token="<|endoftext|>", add_prefix_space=True)


def gpt2_files(folder: Path, **more: Any) -> None:
    content = json.loads(byte_level("<|endoftext|>").to_str())["model"]
    write(folder, "vocab.json", content["vocab"])
    write(folder, "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["merges"]) + "\n")
    settings(folder, "GPT2Tokenizer", **more)


def gpt2_without_class(folder: Path) -> None:
    gpt2_files(folder)
    (folder / "tokenizer_config.json").unlink()
    write(folder, "config.json", {"model_type": "gpt2"})


def qwen2(folder: Path) -> None:
    backend = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.normalizer = normalizers.NFC()
    save(backend, folder)
    write(folder, "config.json", {"model_type": "qwen2"})
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    texts = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    listed = {str(number): {"content": text} | flags for number, text in enumerate(texts)}
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    settings(folder, "Qwen2Tokenizer", added_tokens_decoder=listed, add_bos_token=False, **names)


def llama3(folder: Path) -> None:
    """A byte-level tokenizer.json beside another class' name, as Llama 3 folders have it."""
    save(opened(byte_level(), "<s> $A"), folder)
    write(folder, "config.json", {"model_type": "llama"})
    settings(folder, bos_token="<s>", eos_token="</s>")


def llama_class_of_bytes(folder: Path) -> None:
    llama3(folder)
    settings(folder, "LlamaTokenizer", bos_token="<s>", eos_token="</s>")


@cache
def sentencepiece_model(kind: str) -> bytes:
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=made,
        vocab_size=420 if kind == "bpe" else 120,
        model_type=kind,
        byte_fallback=kind == "bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


def llama_model_file(folder: Path, **more: Any) -> None:
    """tokenizer.model alone, as the first Llamas came."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    write(folder, "config.json", {"model_type": "llama"})
    settings(folder, "LlamaTokenizer", **more)


def llama_legacy(folder: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    llama_model_file(folder, legacy=True, add_bos_token=True, add_eos_token=True, **names)


def llama_not_legacy(folder: Path) -> None:
    llama_model_file(folder, legacy=False, add_prefix_space=False)


def llama_prepending(folder: Path) -> None:
    """A tokenizer.json of Llama 2, which puts ▁ before a text by its normalizer."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "t": 5, "h": 6, "e": 7, "▁t": 8, "he": 9, "▁the": 10}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    save(backend, folder)
    settings(folder, "LlamaTokenizer", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram(folder: Path, class_name: str = FAST, file: str = "tokenizer.json") -> None:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    save(backend, folder)
    settings(folder, class_name, unk_token="<unk>", eos_token="</s>", bos_token="<s>")


def t5_model_file(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model("unigram"))
    settings(folder, "T5Tokenizer", extra_ids=5, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def t5(folder: Path) -> None:
    unigram(folder, "T5Tokenizer")
    settings(folder, "T5Tokenizer", extra_ids=0, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def gemma(folder: Path) -> None:
    """Spaces become ▁, nothing is put before a text, what is unknown is written in bytes."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special[:4], show_progress=False)
    backend.train_from_iterator([TEXT.replace(" ", "▁")], trainer)
    content = json.loads(backend.to_str())
    for piece in bytes_:
        content["model"]["vocab"].setdefault(piece, len(content["model"]["vocab"]))
    write(folder, "tokenizer.json", content)
    write(folder, "config.json", {"model_type": "gemma"})
    settings(folder, "GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def bert(folder: Path, **more: Any) -> None:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    save(backend, folder)
    settings(folder, "BertTokenizer", eos_token="[SEP]", do_lower_case=False, **more)


def bert_vocab_file(folder: Path) -> None:
    bert(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    write(folder, "vocab.txt", "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)))


def tiktoken_file(folder: Path) -> None:
    """tokenizer.model in the format of tiktoken, as Llama 3 first came: every byte, then merges."""
    pieces = [bytes([number]) for number in range(256)]
    pieces += [text.encode() for text in ("th", "he", "the", " t", " the", "in", "an", "nd", "and", " and")]
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
    write(folder, "tokenizer.model", "".join(lines))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    settings(folder, extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|turn|>"], **names)


def class_that_is_not(folder: Path) -> None:
    plain(folder)
    settings(folder, "NobodysTokenizer", bos_token="<s>", eos_token="</s>")


def class_of_others(folder: Path) -> None:
    """config.json says Qwen2, tokenizer_config.json a GPT-2."""
    qwen2(folder)
    settings(folder, "GPT2Tokenizer", eos_token="<|im_end|>")


def cut_and_padded(folder: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=200)
    save(backend, folder)
    settings(folder, eos_token="</s>")


MADE: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (
        plain, opened_and_ended, tokens_in_settings, tokens_with_flags, flags_in_settings, special_tokens_map,
        added_tokens_file, bos_switch, eos_switch, split_specials, prefix_space, gpt2_files, gpt2_without_class,
        qwen2, llama3, llama_class_of_bytes, llama_model_file, llama_legacy, llama_not_legacy, llama_prepending,
        unigram, t5, t5_model_file, gemma, bert, bert_vocab_file, tiktoken_file, class_that_is_not, class_of_others,
        cut_and_padded,
    )
}  # fmt: skip
