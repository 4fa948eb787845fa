"""Text to token ids, with a tokenizer.json: that of the model, or one trained on the data."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tessera.core.errors import UserError
from tessera.core.files import in_words, read_json, read_text
from tessera.data.samples import Ids

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""Every byte and the end of text: with them any text can be written."""

BATCH = 1024
"""Texts tokenized at a time: enough for every thread, while the library's own records stay few."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, the id of its end-of-sequence token, its folder (None: trained here, not saved yet)."""

    backend: Tokenizer
    eos_id: int
    folder: Path | None = None

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[Ids]:
        """Ids (int32) of each text, without an end-of-sequence token at the end.

        With `special` the tokenizer opens a text as it does for its model (a Llama's begin of text).
        """
        ids: list[Ids] = []
        opening = self.backend.encode("", add_special_tokens=special).ids[:1]
        for start in range(0, len(texts), BATCH):
            batch = self.backend.encode_batch_fast(list(texts[start : start + BATCH]), add_special_tokens=special)
            # a text that begins with the begin-of-text token has it already
            found = (e.ids[1:] if opening and e.ids[:2] == opening * 2 else e.ids for e in batch)
            ids += [np.asarray(row, np.int32) for row in found]
        return [row[:-1] if row.size and row[-1] == self.eos_id else row for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids))

    def digest(self) -> str:
        """Changes whenever the tokenizer gives other ids, or lies elsewhere."""
        return blake2b(f"{self.folder} {self.eos_id} {self.backend.to_str()}".encode(), digest_size=16).hexdigest()


def load_tokenizer(path: Path, key: str) -> TextTokenizer:
    """The tokenizer of a model folder, or of a tokenizer.json; `key` is the config key that named it.

    The end-of-sequence token is that of tokenizer_config.json, special_tokens_map.json, or config.json's
    eos_token_id, the first that has one. UserError: no such file, not a tokenizer, no end-of-sequence token.
    """
    backend = read_backend(path, key)
    folder = path.parent if path.is_file() else path
    _check_complete(backend, folder, key)
    eos_id = _find_eos(backend, folder)
    if eos_id is None:
        hint = "give `eos_token` in tokenizer_config.json, or `eos_token_id` in config.json"
        raise UserError(key, folder, "the tokenizer has no end-of-sequence token", hint)
    return TextTokenizer(backend, eos_id, folder.resolve())


def read_backend(path: Path, key: str) -> Tokenizer:
    """The tokenizer.json of a folder, or at `path`. UserError: no such file, not a tokenizer."""
    try:
        file = path if path.is_file() else path / "tokenizer.json"
        there = file.is_file()
    except OSError as error:  # of a folder on the way
        raise UserError(key, path, in_words(error)) from error
    if not there:
        hint = "tokenizer: {train: bpe, vocab_size: N} trains one on the data; `tokenizer: folder` names another"
        raise UserError(key, path, "no tokenizer.json there", hint)
    try:
        backend = Tokenizer.from_str(read_text(file, key))
    except UserError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise UserError(key, file, f"cannot be read as a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def named_token(backend: Tokenizer, folder: Path, name: str) -> int | None:
    """The id of the token that the tokenizer files of `folder` call `name` (such as "bos_token")."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        text = text_of(_read_object(folder / file).get(name))
        if text is not None and (number := backend.token_to_id(text)) is not None:
            return number
    return None


def special_ids(backend: Tokenizer) -> set[int]:
    """The ids that no ordinary text has."""
    return {number for number, token in backend.get_added_tokens_decoder().items() if token.special}


def token_ids(value: Any) -> list[int]:
    """The ids of a key such as `eos_token_id`, which holds one, a list or nothing."""
    return [item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0]


def _check_complete(backend: Tokenizer, folder: Path, key: str) -> None:
    """Raise UserError where `AutoTokenizer` of transformers gives other ids than tokenizer.json alone.

    That is where other files name tokens that tokenizer.json does not add, or give it settings that it has not.
    """
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    settings = _read_object(folder / "tokenizer_config.json")
    lacking = [
        f"{text} ({file})"
        for file, text, number in _named_elsewhere(folder, settings)
        if text not in added or number not in (None, added[text])
    ]
    hint = f'write a whole one: AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        names = ", ".join(dict.fromkeys(lacking[:5])) + more
        raise UserError(key, folder / "tokenizer.json", f"lacks tokens, or has them under other ids: {names}", hint)
    for name, told in _told_otherwise(backend, folder, settings):
        raise UserError(key, folder / "tokenizer_config.json", f"{name}: {told}", "make the two the same")
    normalizer = json.dumps(json.loads(backend.to_str()).get("normalizer"))
    if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer") and '"Prepend"' in normalizer:
        reason = "prepends a space by its normalizer; transformers builds a LlamaTokenizer anew without, with other ids"
        raise UserError(key, folder / "tokenizer.json", reason, hint)
    if settings.get("split_special_tokens"):
        raise UserError(key, folder / "tokenizer_config.json", "split_special_tokens is not done", "leave it out")
    wanted, has = settings.get("add_prefix_space"), _adds_space(json.loads(backend.to_str()).get("pre_tokenizer"))
    if wanted is None and str(settings.get("tokenizer_class")).startswith(("GPT2", "Qwen2")):
        wanted = False
    if None not in (wanted, has) and wanted != has:
        reason = f"add_prefix_space is {str(wanted).lower()}, in tokenizer.json {str(has).lower()}"
        raise UserError(key, folder / "tokenizer_config.json", reason, "make the two the same")


def _named_elsewhere(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, str, int | None]]:
    """File, text and id (None: not given) of the tokens that files beside tokenizer.json name."""
    for file, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", _read_object(folder / "special_tokens_map.json")),
    ):
        named = [value for name, value in content.items() if name.endswith("_token")]
        for name in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            more = content.get(name) or []
            named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        for token in named:
            if (text := text_of(token)) is not None:
                yield file, text, None
        listed = content.get("added_tokens_decoder")
        for number, token in (listed if isinstance(listed, dict) else {}).items():
            if isinstance(token, dict) and isinstance(token.get("content"), str) and str(number).isdecimal():
                yield file, token["content"], int(number)
    for text, number in _read_object(folder / "added_tokens.json").items():
        yield "added_tokens.json", text, number


def _told_otherwise(backend: Tokenizer, folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Tokens of which tokenizer_config.json says something else than the other files, and what."""
    own, listed = backend.get_added_tokens_decoder(), settings.get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        ours = own.get(int(number)) if str(number).isdecimal() and isinstance(token, dict) else None
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            given, has = token.get(flag) if ours else None, getattr(ours, flag, None)
            if ours and isinstance(given, bool) and given != has:
                yield ours.content, f"{flag} is {str(given).lower()}, in tokenizer.json {str(has).lower()}"
    beside = {} if listed else _read_object(folder / "special_tokens_map.json")  # which is not read beside that
    one, other = (text_of(content.get("eos_token")) for content in (settings, beside))
    if one and other and one != other:
        yield "eos_token", f"is {one}, in special_tokens_map.json {other}"


def text_of(token: Any) -> str | None:
    """The text of a token as tokenizer files name it: alone, or with its flags. None: they name none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _adds_space(pre_tokenizer: dict[str, Any] | None) -> bool | None:
    """Whether a byte-level pre-tokenizer of tokenizer.json puts a space before a text; None where there is none."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    found = [part["add_prefix_space"] for part in parts if part.get("type") == "ByteLevel"]
    return bool(found[0]) if found else None


def _find_eos(backend: Tokenizer, folder: Path) -> int | None:
    named = named_token(backend, folder, "eos_token")
    listed = token_ids(_read_object(folder / "config.json").get("eos_token_id"))
    return named if named is not None else listed[0] if listed else None


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be missing."""
    content = read_json(path, "tokenizer") if path.exists() else {}
    return content if isinstance(content, dict) else {}


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` ids (fewer where the text has no more pairs to merge).

    Any text comes back exactly: the alphabet has all bytes, nothing is normalised. Id 0 is `<|endoftext|>`.
    """
    if vocab_size < SMALLEST_BPE:
        reason = "too small: every byte and the end of text need an id"
        raise UserError("tokenizer.vocab_size", vocab_size, reason, f"at least {SMALLEST_BPE}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END_OF_TEXT)
    assert end is not None
    return TextTokenizer(backend, end)


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, for transformers' `AutoTokenizer`."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.backend.id_to_token(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,  # it would join " ." and " 's" when it decodes
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
