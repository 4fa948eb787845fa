"""The keys that name the model and its tokenizer."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tessera.config.sections.section import LocalPath, Section
from tessera.sizes import bounds


class TokenizerConfig(Section):
    """A tokenizer trained on the data before the run starts, saved in output_dir."""

    train: Literal["bpe"] = Field(description="The kind of tokenizer: byte-level byte-pair encoding.")
    vocab_size: int = Field(
        ge=257, le=bounds.TRAINED_VOCABULARY, description="Entries of the vocabulary: 256 bytes, one end mark, merges."
    )


def _kind_of_tokenizer(value: object) -> str:
    return "path" if isinstance(value, str) else "train"


TokenizerChoice = Annotated[
    Annotated[LocalPath, Tag("path")] | Annotated[TokenizerConfig, Tag("train")], Discriminator(_kind_of_tokenizer)
]


class ModelKeys(Section):
    """The model that is trained, and its tokenizer."""

    base_model: LocalPath = Field(
        description="A local folder with config.json and safetensors, or a model of the Hugging Face hub (owner/name)."
    )
    random_init: bool = Field(False, description="Start from random weights; of base_model config.json alone is read.")
    tokenizer: TokenizerChoice | None = Field(
        None,
        description="A folder with a tokenizer, or {train: bpe, vocab_size: N} to train one on the data. "
        "Unset: the tokenizer of base_model.",
    )
