"""Text to token ids: with the tokenizer of a folder, as transformers has it, or one trained on the data."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tessera.core.errors import UserError
from tessera.core.files import read_json, read_object
from tessera.data.added_tokens import AddedTokens, TokenizerKeys, written
from tessera.data.auto_tokenizer import LARGEST, folder_of, has_tokenizer, read_auto

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""Every byte and the end of text: with them any text can be written."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, the id of its end-of-sequence token, its folder (None: it is saved nowhere yet).

    `backend` is the part that tokenizes, `made` the tokenizer of transformers around it, where that was loaded. `files`
    are those of a tokenizer to which tokens were added, by their names.
    """

    backend: Tokenizer
    eos_id: int
    folder: Path | None = None
    made: Any = field(default=None, compare=False, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def auto(self) -> Any:
        """The same as transformers has it, a `PreTrainedTokenizerFast`: for chat templates.

        It may share `backend`.
        """
        if self.made is not None:
            return self.made
        from transformers import PreTrainedTokenizerFast  # here: it takes a second, and most runs do without

        end = self.backend.id_to_token(self.eos_id)
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, eos_token=end, clean_up_tokenization_spaces=False)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: pickling a backend loses whether it splits special tokens."""
        return self.__dict__ | {"split": self.backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["backend"].encode_special_tokens = state.pop("split")
        self.__dict__.update(state)

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids))

    def digest(self) -> str:
        """Changes whenever the tokenizer gives other ids; not with the place where it lies."""
        split = "split" if self.backend.encode_special_tokens else ""  # which to_str leaves out
        told = f"{self.eos_id} {self.backend.to_str()}{split}"
        files = [name.encode() + self.files[name] for name in sorted(self.files)]
        return blake2b(b"".join([told.encode(), *files]), digest_size=16).hexdigest()


def load_tokenizer(path: Path, key: str, added: AddedTokens | None = None) -> TextTokenizer:
    """The tokenizer of a folder, or of the one that a tokenizer.json lies in; `key` is the config key that named it.

    Where `added` tokens change it, it is what transformers makes of it once it is saved, and has no folder.
    The end-of-sequence token is that of transformers' tokenizer, or the first of config.json's eos_token_id where
    that has none. UserError: as `read_auto`, or there is no end-of-sequence token.
    """
    auto, folder = read_auto(path, key), folder_of(path)
    if added and added.give_to(auto):
        return _saved_and_read(auto, folder, key)
    eos_id = _end_of(auto, folder, key)
    return TextTokenizer(auto.backend_tokenizer, eos_id, folder.resolve(), auto)


def given_tokenizer(config: TokenizerKeys, added: AddedTokens) -> TextTokenizer | int:
    """The tokenizer that `config` names, with `added` tokens; the size of one that is to be trained.

    Raises UserError.
    """
    given = config.tokenizer
    if given is None:
        return load_tokenizer(Path(config.base_model), "base_model", added)
    if isinstance(given, str | Path):
        return load_tokenizer(Path(given), "tokenizer", added)
    return given.vocab_size


def named_folder(config: TokenizerKeys) -> Path | None:
    """The folder of the tokenizer that `config` names; None where one is trained."""
    given = config.base_model if config.tokenizer is None else config.tokenizer
    return folder_of(Path(given)).resolve() if isinstance(given, str | Path) else None


def _saved_and_read(auto: Any, folder: Path, key: str) -> TextTokenizer:
    """A tokenizer of `folder` that was changed, as it is when its files have been written and read."""
    _end_of(auto, folder, key)  # written into the files, where config.json alone has it
    files = written(auto, _read_object(folder / "tokenizer_config.json"))
    with TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        if (folder / "config.json").is_file():  # it says which class reads them
            shutil.copyfile(folder / "config.json", Path(name) / "config.json")
        again = read_auto(Path(name), key)
        return TextTokenizer(again.backend_tokenizer, _end_of(again, folder, key), None, again, files)


def _end_of(auto: Any, folder: Path, key: str) -> int:
    """The id of the end of sequence, which `auto` names from now on."""
    eos_id: int | None = auto.eos_token_id
    if eos_id is None:
        eos_id = next(iter(token_ids(_read_object(folder / "config.json").get("eos_token_id"))), None)
        if eos_id is None:
            hint = "give `eos_token` in tokenizer_config.json, or `eos_token_id` in config.json"
            raise UserError(key, folder, "the tokenizer has no end-of-sequence token", hint)
        auto.eos_token = auto.backend_tokenizer.id_to_token(eos_id)
    return eos_id


def special_ids(backend: Tokenizer) -> set[int]:
    """The ids that no ordinary text has."""
    return {number for number, token in backend.get_added_tokens_decoder().items() if token.special}


def token_ids(value: Any) -> list[int]:
    """The ids of a key such as `eos_token_id`, which holds one, a list or nothing."""
    return [item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0]


def text_of(token: Any) -> str | None:
    """The text of a token as tokenizer files name it: alone, or with its flags. None: they name none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be missing."""
    return read_object(path, "tokenizer") if path.exists() else {}


def frame(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text, and those behind it."""
    found = backend.encode("a", add_special_tokens=True)
    own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
    return (found.ids[: own[0]], found.ids[own[-1] + 1 :]) if own else ([], [])


def byte_level() -> Any:
    """The words of a text for a byte-level BPE, as GPT-2 has them."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` ids (fewer where the text has no more pairs to merge).

    Any text comes back exactly: the alphabet has all bytes, nothing is normalised. Id 0 is `<|endoftext|>`.
    """
    if vocab_size < SMALLEST_BPE:
        reason = "too small: every byte and the end of text need an id"
        raise UserError("tokenizer.vocab_size", vocab_size, reason, f"at least {SMALLEST_BPE}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level()
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


def with_tokens(tokenizer: TextTokenizer, added: AddedTokens) -> TextTokenizer:
    """A tokenizer that was trained here, with `added` tokens."""
    auto = replace(tokenizer).auto  # one of its own, which may change
    if not added.give_to(auto):
        return tokenizer
    return TextTokenizer(auto.backend_tokenizer, auto.eos_token_id, None, auto, written(auto, {}))


def tokens_needed(config: TokenizerKeys) -> int:
    """The rows of a vocabulary that holds every id of the config's tokenizer; 0 where it has none. Raises UserError.

    Of one that is still to be trained, which must fit the model by itself, those of the tokens that are added to it.
    """
    added, given = AddedTokens.of(config), config.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given.vocab_size + len(added.texts) if added else 0
    path, key = (Path(config.base_model), "base_model") if given is None else (Path(given), "tokenizer")
    if not added and not has_tokenizer(path):  # rows may come tokenized
        return 0
    auto = read_auto(path, key)
    added.give_to(auto)
    return max(len(auto), 1 + max(auto.get_vocab().values()))


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, for transformers' `AutoTokenizer`."""
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    if tokenizer.files:
        return
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.backend.id_to_token(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,  # it would join " ." and " 's" when it decodes
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_loaded(tokenizer: TextTokenizer, path: Path) -> None:
    """Write a tokenizer as it is loaded: `read_loaded` has no need of transformers, which takes seconds to import."""
    folder = None if tokenizer.folder is None else str(tokenizer.folder)
    settings = {"eos_id": tokenizer.eos_id, "folder": folder, "split": tokenizer.backend.encode_special_tokens}
    path.write_text(json.dumps({"backend": tokenizer.backend.to_str(), **settings}))


def read_loaded(path: Path) -> TextTokenizer:
    """The tokenizer that `write_loaded` has written. UserError: it cannot be read."""
    found = read_json(path, "output_dir", limit=2 * LARGEST)
    backend = Tokenizer.from_str(found["backend"])
    backend.encode_special_tokens = found["split"]
    return TextTokenizer(backend, found["eos_id"], None if found["folder"] is None else Path(found["folder"]))
