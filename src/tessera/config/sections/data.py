"""The keys that say which rows a run trains on, how long they may be and in which order they come; and its folder."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WrapValidator, model_validator

from tessera.config.sections.section import LocalPath, Section
from tessera.core.errors import UserError
from tessera.sizes import bounds


class PromptConfig(Section):
    """`type: {…}` of a data set: a prompt that the user writes, around the columns of a row."""

    system_prompt: str | None = Field(None, description="The system prompt of rows without one of their own.")
    system_format: str | None = Field(None, description="Text around the system prompt; default: '{system}'.")
    field_system: str | None = Field(None, description="Column with a row's system prompt; default: system.")
    field_instruction: str | None = Field(None, description="Column with the instruction; default: instruction.")
    field_input: str | None = Field(None, description="Column with the input; default: input.")
    field_output: str | None = Field(None, description="Column with the answer, which is learnt; default: output.")
    format: str | None = Field(
        None, description="The prompt of a row with an input: text with {instruction} and {input} in it."
    )
    no_input_format: str | None = Field(
        None,
        description="The same for a row without an input. Unset: `format` where that has no {input}, "
        "else '{instruction} '.",
    )


def _kind_of_rows(value: Any, validate: Any) -> Any:
    """A name, or a `PromptConfig` of a mapping. Raises ValueError, which pydantic tells of the key as a whole."""
    if not isinstance(value, Mapping):
        if value is not None and not isinstance(value, str):
            raise ValueError("must be text, or keys with values")
        return value
    for key, text in value.items():
        if key not in PromptConfig.model_fields:
            raise ValueError(f"has the key {key}; known: {', '.join(PromptConfig.model_fields)}")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{key} must be text")
    return PromptConfig(**value)


def _text_or_texts(value: Any, validate: Any) -> Any:
    """Text or a list of texts. Raises ValueError."""
    texts = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be text, or a list of texts")
    return value


KindOfRows = Annotated[str | PromptConfig | None, WrapValidator(_kind_of_rows)]
TextOrTexts = Annotated[str | list[str] | None, WrapValidator(_text_or_texts)]


class DatasetConfig(Section):
    """One source of training rows."""

    path: LocalPath = Field(
        description="A file, a folder with files of one format, or a data set of the Hugging Face hub (owner/name). "
        "Rows: .jsonl, .json, .csv, .tsv, .parquet, .arrow; .txt and other plain text is text. May be compressed."
    )
    type: KindOfRows = Field(
        None,
        description="What a row is: completion, alpaca, chat_template, input_output, … or a prompt of your own as "
        "{format: …}. Unset: told from the keys of the first row.",
    )
    field: str = Field("text", min_length=1, description="completion: the column that holds a row's text.")
    data_files: TextOrTexts = Field(
        None, description="Files in the folder or data set `path`, such as 'train/*.jsonl'. Unset: all."
    )
    ds_type: str | None = Field(
        None, description="Read files as json, csv, tsv, parquet, arrow or text. Unset: by their endings."
    )
    name: str | None = Field(None, description="The configuration of a data set that has several.")
    split: str | None = Field(
        None, description="The split, and the part of it: train, validation, train[:10%], train[100:200]. Unset: train."
    )
    revision: str | None = Field(None, description="The version of a data set of the hub: a branch, tag or commit.")
    shards: int | None = Field(
        None,
        ge=1,
        le=bounds.STEPS,
        description="Read one of this many equal parts, which follow one another in the data set.",
    )
    shards_idx: int | None = Field(
        None, ge=0, le=bounds.STEPS, description="Which of the shards is read, from 0. Unset: 0."
    )
    skip: int | None = Field(None, ge=0, le=bounds.STEPS, description="Skip this many rows at the beginning.")
    preprocess_shards: int | None = Field(
        None,
        ge=1,
        le=bounds.STEPS,
        description="Has no effect: rows are never held all at once, whatever their number.",
    )
    chat_template: str | None = Field(None, description="Of this data set alone; see chat_template below.")
    chat_template_jinja: str | None = Field(None, description="Of this data set alone; see chat_template_jinja below.")
    field_messages: str | None = Field(
        None, description="chat_template: the column with the messages. Unset: messages, or conversations."
    )
    field_system: str | None = Field(
        None, description="chat_template: a column with a system prompt, put before the messages; default: system."
    )
    field_tools: str | None = Field(None, description="chat_template: the column with the tools; default: tools.")
    field_thinking: str | None = Field(
        None, description="chat_template: a message's key with its reasoning; default: reasoning_content."
    )
    template_thinking_key: str | None = Field(
        None, description="chat_template: what the template calls the reasoning; default: reasoning_content."
    )
    split_thinking: bool | None = Field(
        None, description="chat_template: take the reasoning out of an answer that begins with <think>…</think>."
    )
    message_property_mappings: dict[str, str] | None = Field(
        None,
        description="chat_template: what the template calls a key, and what the messages call it, such as "
        "{role: from, content: value}. Unset: role and content, or from and value.",
    )
    message_field_role: str | None = Field(None, description="The same for role alone.")
    message_field_content: str | None = Field(None, description="The same for content alone.")
    message_field_training: str | None = Field(
        None, description="chat_template: a message's key that says whether it is learnt. Unset: train, or weight."
    )
    message_field_training_detail: str | None = Field(
        None, description="chat_template: a message's key with the parts of its content that are learnt."
    )
    roles: dict[str, list[str]] | None = Field(
        None, description="chat_template: the roles of the template, each with what the messages call it."
    )
    roles_to_train: list[str] | None = Field(
        None, description="chat_template: the roles whose turns are learnt; default: [assistant]."
    )
    train_on_eos: Literal["all", "turn", "last"] | None = Field(
        None,
        description="chat_template: learn the token that ends a turn of every role (all), of learnt turns (turn, the "
        "default), or of the last one (last).",
    )
    train_on_eot: Literal["all", "turn", "last"] | None = Field(
        None, description="The same for eot_tokens alone. Unset: as train_on_eos."
    )
    drop_system_message: bool | None = Field(
        None, description="chat_template: leave out a system message that a chat begins with."
    )


class DataKeys(Section):
    """The rows of training and of evaluation, and the folder that gets all that a run writes."""

    datasets: list[DatasetConfig] = Field(min_length=1, description="The sources of rows, joined in this order.")
    test_datasets: list[DatasetConfig] | None = Field(
        None, description="Rows to evaluate on, given as `datasets` are; then val_set_size holds no rows out."
    )
    output_dir: LocalPath = Field(
        "./outputs", description="Gets metrics.jsonl, resolved_config.yaml, checkpoint-N folders and the final model."
    )
    sequence_len: int = Field(
        2048, ge=1, le=bounds.TOKENS, description="The longest row, in tokens; text is cut into such windows."
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a row longer than sequence_len; how many is reported."
    )
    min_sample_len: int | None = Field(
        None, ge=0, le=bounds.TOKENS, description="Drop the rows that have fewer tokens; how many is reported."
    )
    train_on_inputs: bool = Field(
        False, description="Count prompt tokens in the loss too, in rows made of a prompt and an answer."
    )
    val_set_size: float | int = Field(
        0,
        ge=0,
        le=bounds.STEPS,
        description="Rows held out for evaluation: a fraction below 1, or a whole number of rows.",
    )
    shuffle: bool = Field(True, description="Draw rows in random order; false feeds them in file order.")
    seed: int = Field(
        42, ge=0, le=bounds.SEED, description="Seeds weights, the order of rows, the held-out split and dropout."
    )

    @model_validator(mode="after")
    def _held_out_rows_are_a_share_or_a_number(self) -> Self:
        if isinstance(self.val_set_size, float) and self.val_set_size >= 1:
            reason = "neither a fraction below 1 nor a whole number of rows"
            raise UserError("val_set_size", self.val_set_size, reason, f"for rows, write {round(self.val_set_size)}")
        if self.val_set_size and self.test_datasets:
            reason = "test_datasets are evaluated on: no rows need be held out"
            raise UserError("val_set_size", self.val_set_size, reason, "leave one of the two out")
        return self
