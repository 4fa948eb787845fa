"""The keys that say which rows a run trains on, how long they may be and in which order they come; and its folder."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tessera.config.sections.section import LocalPath, Section
from tessera.core.errors import UserError
from tessera.sizes import bounds


class DatasetConfig(Section):
    """One source of training rows."""

    path: LocalPath = Field(description="A text file, a folder of text files, or a JSONL file (one row a line).")
    type: Literal["completion", "alpaca"] | None = Field(
        None,
        description="completion: text; alpaca: instruction, input, output. Unset: told from the first row, "
        "where `input_ids` means already tokenized.",
    )
    field: str = Field("text", min_length=1, description="The JSONL field that holds a row's text.")
    split: Literal["train"] = Field("train", description="Local files have the one split, train.")


class DataKeys(Section):
    """The rows of training and of evaluation, and the folder that gets all that a run writes."""

    datasets: list[DatasetConfig] = Field(min_length=1, description="The sources of rows, joined in this order.")
    output_dir: LocalPath = Field(
        "./outputs", description="Gets metrics.jsonl, resolved_config.yaml, checkpoint-N folders and the final model."
    )
    sequence_len: int = Field(
        2048, ge=1, le=bounds.TOKENS, description="The longest row, in tokens; text is cut into such windows."
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a row longer than sequence_len; how many is reported."
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
        return self
