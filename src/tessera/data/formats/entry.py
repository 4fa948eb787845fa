"""What a config says of how rows are read: an entry of `datasets`, and the keys that all entries share."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from tessera.data.added_tokens import AddedTokens


@dataclass(frozen=True)
class UserPrompt:
    """`type: {...}`: how the user joins the columns of a row to a prompt. The fields are keys of the config."""

    system_prompt: str = ""
    system_format: str = "{system}"
    field_system: str = "system"
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"
    format: str = "{instruction} {input} "
    no_input_format: str = "{instruction} "


@dataclass(frozen=True)
class Entry:
    """One entry of `datasets`; the fields are the keys of the config, in values that do not change."""

    path: str
    type: str | UserPrompt | None = None
    field: str = "text"
    data_files: tuple[str, ...] = ()
    ds_type: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    skip: int = 0
    shards: int | None = None
    shards_idx: int = 0
    chat_template: str | None = None
    chat_template_jinja: str | None = None
    field_messages: str | None = None
    field_system: str = "system"
    field_tools: str = "tools"
    field_thinking: str = "reasoning_content"
    template_thinking_key: str = "reasoning_content"
    split_thinking: bool = False
    message_property_mappings: tuple[tuple[str, str], ...] = ()
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str | None = None
    message_field_training_detail: str | None = None
    roles: tuple[tuple[str, tuple[str, ...]], ...] = ()
    roles_to_train: tuple[str, ...] = ()
    train_on_eos: str | None = None
    train_on_eot: str | None = None
    drop_system_message: bool = False

    @property
    def split_name(self) -> str:
        """`train` of `train[:10%]`; train where nothing is said."""
        return (self.split or "train").partition("[")[0]

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The entry that the config object `settings` says; keys that it lacks, or leaves open, have the defaults."""
        kind = getattr(settings, "type", None)
        given = _given(cls, settings)
        if isinstance(given.get("data_files"), str):
            given["data_files"] = (given["data_files"],)
        if kind is not None and not isinstance(kind, str):
            given["type"] = UserPrompt(**_given(UserPrompt, kind))
        return cls(**given)


@dataclass(frozen=True)
class Reading:
    """The keys of the config that all entries share. `tokenizer`: the folder whose chat template renders chats.

    None: the tokenizer is trained on the data, and has no chat template.
    """

    train_on_inputs: bool = False
    chat_template: str | None = None
    chat_template_jinja: str | None = None
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()
    eot_tokens: tuple[str, ...] = ()
    tokenizer: Path | None = None
    added: AddedTokens = AddedTokens()

    @classmethod
    def of(cls, config: Any) -> Self:
        """What the whole `config` says."""
        given = _given(cls, config)
        named = getattr(config, "tokenizer", None) or getattr(config, "base_model", None)
        given["tokenizer"] = Path(named) if isinstance(named, str | Path) else None
        if hasattr(config, "special_tokens"):
            given["added"] = AddedTokens.of(config)
        return cls(**given)


def _given(kind: Any, settings: Any) -> dict[str, Any]:
    values = {field.name: getattr(settings, field.name, None) for field in fields(kind)}
    return {name: _frozen(value) for name, value in values.items() if value is not None}


def _frozen(value: Any) -> Any:
    """A value that can be compared and hashed, of one that YAML has."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(inner)) for key, inner in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
