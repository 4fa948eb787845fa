"""Small tokenizers built as those of well-known models are, and awkward texts for them."""

import json
import random
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FRAGMENTS = [
    *"aZeß今日本語한국ب1290 \n\t.,;:!?'\"_-/\\()<>{}|&", " ", " ", "  ", "    ", "\n\n", "\r\n", " \n ", "\u00a0",
    "\u3000", "\u200b", "the", "The", "don't", "I'LL", " new york", "New York", "word", "words", "wor", "naïve",
    "e\u0301", "\u0301", "ﬁne", "①", "½", "🙂", "👩\u200d👩", "3.14", "1,000,000", "x = y+1", "def f(a):\n    return\n",
    "<mask>", " <mask> ", "<r>", "<r>   ", "<|end|>", "</s>", "<s>", "▁", "▁a", "<0x0A>", "。", "、", "，", "！\n",
    "...", "--", "http://a.b/c?d=e", "\x00", "ABC", "ǅ", "Ġ", "é,", "a,b,c", "end.\n", "end.\n\nNext",
]  # fmt: skip


def awkward(seed: int, fragments: int = 120) -> str:
    """A text of random pieces, most of which are hard for one tokenizer or another."""
    draw = random.Random(seed)
    return "".join(draw.choice(FRAGMENTS) for _ in range(fragments))


CORPUS = [awkward(seed, 60) for seed in range(1000, 1060)]


def bpe(pre_tokenizer=None, normalizer=None, special: tuple[str, ...] = (), **model: object) -> Tokenizer:
    """A BPE of bytes, or with a fallback to them, trained on awkward texts."""
    backend = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=[*special, *fallback], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return without_added(backend, fallback)


def without_added(backend: Tokenizer, texts: list[str]) -> Tokenizer:
    """The same with `texts` as ordinary entries of the vocabulary, as SentencePiece's byte tokens are."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in texts]
    return Tokenizer.from_str(json.dumps(content))


def no_words_across_blanks(backend: Tokenizer) -> Tokenizer:
    """The same without tokens that have a blank behind another character: SentencePiece makes none."""
    content = json.loads(backend.to_str())
    model = content["model"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    crossing = [t for t in model["vocab"] if "▁" in t.lstrip("▁") or ("\n" in t and t.strip("\n"))]
    model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & set(crossing)]
    kept = [token for token in model["vocab"] if token not in crossing]
    model["vocab"] = {token: number for number, token in enumerate(kept)}
    for token in content["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    return Tokenizer.from_str(json.dumps(content))


def split_by(regex: str, prefix: bool = False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )


def opened(backend: Tokenizer, single: str) -> Tokenizer:
    """The same, which puts special tokens around a text: `single` is the template."""
    names = [name for name in single.split() if name != "$A"]
    backend.add_special_tokens(names)
    ids = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return backend


def _gpt2() -> Tokenizer:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _roberta() -> Tokenizer:
    backend = opened(bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "<s> $A </s>")
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def _llama3() -> Tokenizer:
    return opened(bpe(split_by(LLAMA3), ignore_merges=True), "<|begin|> $A")


def _qwen2() -> Tokenizer:
    return bpe(split_by(QWEN2), normalizers.NFC())


def _cl100k() -> Tokenizer:
    return bpe(split_by(CL100K))


def _o200k() -> Tokenizer:
    return bpe(split_by(O200K))


def _deepseek() -> Tokenizer:
    splits = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", LLAMA3]
    parts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in splits]
    return bpe(pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def _starcoder() -> Tokenizer:
    return bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]))


def _llama2() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ("<unk>", "<s>", "</s>")
    backend = bpe(None, normalizer, special, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    return opened(no_words_across_blanks(backend), "<s> $A")


def _mistral() -> Tokenizer:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend = bpe(metaspace, None, ("<unk>", "<s>", "</s>"), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    return opened(no_words_across_blanks(backend), "<s> $A")


def _gemma() -> Tokenizer:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    normalizer = normalizers.Replace(" ", "▁")
    backend = bpe(split, normalizer, special, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = no_words_across_blanks(backend)
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    return opened(backend, "<bos> $A")


def unigram(pre_tokenizer) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Strip(False, True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _t5() -> Tokenizer:
    return opened(unigram(pre_tokenizers.Metaspace()), "$A </s>")


def _bert() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return opened(backend, "[CLS] $A [SEP]")


def _odd_tokens() -> Tokenizer:
    backend = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.Lowercase())
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<r>", rstrip=True), "<|end|>"])
    backend.add_tokens(
        [
            AddedToken("word", single_word=True),
            AddedToken("New York", normalized=True),
            AddedToken("a,b", normalized=False, lstrip=True, rstrip=True),
            AddedToken("end.\n", normalized=False),
            AddedToken("  ", normalized=False),
        ]
    )
    return backend


ZOO: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": _gpt2, "roberta": _roberta, "llama3": _llama3, "qwen2": _qwen2, "cl100k": _cl100k, "o200k": _o200k,
    "deepseek": _deepseek, "starcoder": _starcoder, "llama2": _llama2, "mistral": _mistral, "gemma": _gemma, "t5": _t5,
    "bert": _bert, "odd tokens": _odd_tokens,
}  # fmt: skip


@cache
def zoo(name: str) -> Tokenizer:
    """One of them, made once."""
    return ZOO[name]()
