"""The tokenizer of a folder as `AutoTokenizer` of transformers makes it, from whatever files it has.

Nothing is fetched, and no code that came with a folder runs. What the library reads is opened here first: it must be
regular files of an ordinary size.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError, cut_short
from tessera.core.files import in_words, open_file, read_json

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "tiktoken.model",
    "tekken.json",
)
"""Files that a tokenizer's vocabulary may be in, by the names that the classes of transformers give them."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OTHERS = ("merges.txt", "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"
LARGEST = 100 * 2**20
"""Bytes of a file; the largest known tokenizer.json has 35 MB."""


def has_tokenizer(path: Path) -> bool:
    """Whether there is a vocabulary at `path`, a folder or a file of one."""
    folder = folder_of(path)
    return any(os.path.lexists(folder / name) for name in VOCABULARIES)


def folder_of(path: Path) -> Path:
    """The folder that is meant by its path, or by that of its tokenizer.json."""
    return path.parent if os.path.isfile(path) else path


def read_auto(path: Path, key: str) -> Any:
    """The `PreTrainedTokenizerFast` of a folder; it pads nothing and cuts nothing unless a call asks for it.

    UserError, under the config key `key`: no tokenizer is there, a file of it is broken or no ordinary file, it has no
    fast form, or it needs code of its own.
    """
    try:
        if os.path.isfile(path) and path.name not in VOCABULARIES:
            reason = "is a file, of no name that transformers gives to a tokenizer's"
            raise UserError(key, path, reason, "name the folder that the tokenizer is in")
        folder = folder_of(path).absolute()
        there = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        there = set()
    except OSError as error:
        raise UserError(key, path, in_words(error)) from error
    if not there & set(VOCABULARIES):
        reason = "no tokenizer there: neither tokenizer.json, nor tokenizer.model, nor vocab.json with merges.txt"
        hint = "tokenizer: {train: bpe, vocab_size: N} trains one on the data; `tokenizer: folder` names another"
        raise UserError(key, path, reason, hint)
    _check_files(folder, there, key)
    try:
        with _quiet():
            # here, not above: it takes a second, and brings torch with it
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
            _check_whole(found, folder, there, key)
            found.backend_tokenizer.no_truncation()
            found.backend_tokenizer.no_padding()
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # exceptions of every kind, and panics of the Rust part, which are none
        raise UserError(key, folder, *_in_plain_words(error)) from error
    return found


def _check_files(folder: Path, there: set[str], key: str) -> None:
    """Raise UserError for what the library must not open, or what is no JSON: it would not name the file."""
    for name in sorted(there & {*VOCABULARIES, *OTHERS}):
        open_file(folder / name, key, limit=LARGEST).close()
    for name in sorted(there & {*TOKENIZER_SETTINGS, "config.json"}):
        if not isinstance(read_json(folder / name, key, limit=LARGEST), dict):
            raise UserError(key, folder / name, "cannot be read as a tokenizer's: it is no object with keys")
    if TEMPLATES in there:
        for file in sorted((folder / TEMPLATES).glob("*.jinja")):
            open_file(file, key, limit=LARGEST).close()


def _check_whole(found: Any, folder: Path, there: set[str], key: str) -> None:
    """Raise UserError for a tokenizer without a fast form, or one for which its class found no file of its own."""
    name = type(found).__name__
    if not getattr(found, "is_fast", False):
        hint = "a tokenizer.json is needed: convert it with transformers, or name another folder with `tokenizer:`"
        raise UserError(key, folder, f"transformers has no fast form of this tokenizer ({name})", hint)
    wanted = {*type(found).vocab_files_names.values(), "tokenizer.json", "tokenizer.model", "tiktoken.model"}
    if not wanted & there & set(VOCABULARIES) or not found.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        files = ", ".join(sorted(wanted & {*VOCABULARIES, *OTHERS}))
        reason = f"holds no vocabulary for transformers' {name}, which is read from one of: {files}"
        raise UserError(key, folder, reason, "set `tokenizer_class` of tokenizer_config.json to what made the files")


def _in_plain_words(error: BaseException) -> tuple[str, str]:
    """Reason and hint for what went wrong inside the library."""
    told = cut_short(" ".join(str(error).split()) or type(error).__name__, 300)
    if "trust_remote_code" in told:
        return "the tokenizer needs code that comes with it, which is never run", "name another with `tokenizer:`"
    if isinstance(error, ImportError):
        return f"the tokenizer needs a package that is not installed: {told}", "pip install it beside tessera"
    return f"cannot be read as a tokenizer by transformers: {told}", ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers logs: advice for those who wrote the files."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
