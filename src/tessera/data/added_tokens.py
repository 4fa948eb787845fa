"""What a config gives to a tokenizer: `special_tokens`, `tokens` and `chat_template`, as axolotl does.

In this order, so that new ones have the ids that they have there: marks, ordinary tokens, further special ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from tokenizers import AddedToken

from tessera.data.chat_templates import template_text

SETTINGS = "tokenizer_config.json"
MARKS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TokenKeys(Protocol):
    """The keys of the config that name tokens; `special_tokens` has one attribute for each of MARKS, and
    `additional_special_tokens`."""

    @property
    def special_tokens(self) -> Any: ...
    @property
    def tokens(self) -> Sequence[str] | None: ...


class TokenizerSettings(Protocol):
    """`tokenizer: {train: bpe, vocab_size: N}`."""

    @property
    def vocab_size(self) -> int: ...


class TokenizerKeys(TokenKeys, Protocol):
    """The keys of the config that say which tokenizer a run has."""

    @property
    def base_model(self) -> str: ...
    @property
    def tokenizer(self) -> str | Path | TokenizerSettings | None: ...


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that a config names: (mark, text) pairs, ordinary tokens, and further special ones.

    `template` are `chat_template` and `chat_template_jinja`, unless they name the one that the tokenizer has.
    """

    marks: tuple[tuple[str, str], ...] = ()
    ordinary: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    template: tuple[str | None, str | None] | None = None

    @classmethod
    def of(cls, config: TokenKeys) -> "AddedTokens":
        special = config.special_tokens
        named = ((mark, getattr(special, mark)) for mark in MARKS)
        marks = tuple((mark, text) for mark, text in named if text is not None)
        asked = (getattr(config, "chat_template", None), getattr(config, "chat_template_jinja", None))
        template = None if asked in ((None, None), ("tokenizer_default", None)) else asked
        return cls(marks, tuple(config.tokens or ()), tuple(special.additional_special_tokens), template)

    def __bool__(self) -> bool:
        return bool(self.marks or self.ordinary or self.further or self.template)

    @property
    def texts(self) -> set[str]:
        """The texts of all of them."""
        return {text for _, text in self.marks} | {*self.ordinary, *self.further}

    def give_to(self, auto: Any) -> bool:
        """Set the marks and the template of `auto`, a tokenizer of transformers, and add what it lacks.

        Returns whether that changed it. UserError: no such template.
        """
        before = _state(auto)
        if self.template:
            auto.chat_template = template_text(*self.template, auto)
        for mark, text in self.marks:
            if text in _special(auto):  # with the flags that it has
                setattr(auto, mark, text)
            else:
                auto.add_special_tokens({mark: _token(text, special=True)})
        auto.add_tokens([_token(text) for text in self.ordinary if text not in auto.added_tokens_encoder])
        further = [_token(text, special=True) for text in self.further if text not in _special(auto)]
        auto.add_special_tokens({"additional_special_tokens": further}, replace_extra_special_tokens=False)
        if (auto.add_bos_token or auto.add_eos_token) and {"bos_token", "eos_token"} & dict(self.marks).keys():
            auto.update_post_processor()  # it would put the old ones around a text
        return _state(auto) != before


def _token(text: str, special: bool = False) -> AddedToken:
    return AddedToken(text, lstrip=False, rstrip=False, normalized=False, special=special)


def _special(auto: Any) -> set[str]:
    return {str(token) for token in auto.added_tokens_decoder.values() if token.special}


def _state(auto: Any) -> tuple[Any, ...]:
    added = {number: (str(token), token.special) for number, token in auto.added_tokens_decoder.items()}
    return dict(auto.special_tokens_map), list(auto.extra_special_tokens), added, auto.chat_template


def written(auto: Any, settings: dict[str, Any]) -> dict[str, bytes]:
    """The files that transformers saves of a tokenizer, made from one whose tokenizer_config.json says `settings`.

    Saving forgets some of these, such as `legacy` of a Llama's: they are kept.
    """
    with TemporaryDirectory() as folder:
        auto.save_pretrained(folder, save_jinja_files=False)  # the template in the settings: two files in all
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    saved = json.loads(files[SETTINGS])
    tokens = ("_token", "_tokens", "_decoder", "_map")  # these are saved as they are now, or in tokenizer.json
    kept = {key: value for key, value in settings.items() if not key.endswith(tokens)}
    files[SETTINGS] = (json.dumps(kept | saved, indent=2) + "\n").encode()
    return files
