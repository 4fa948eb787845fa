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


TokenText = Annotated[str, Field(min_length=1, max_length=1000)]


class SpecialTokensConfig(Section):
    """What the special tokens of the tokenizer are; one that it lacks is added to it."""

    bos_token: TokenText | None = Field(None, description="The token that opens a text.")
    eos_token: TokenText | None = Field(None, description="The token that ends a text: rows end on it.")
    pad_token: TokenText | None = Field(
        None, description="The token that pads; training needs none: it is written into the exported tokenizer."
    )
    unk_token: TokenText | None = Field(None, description="The token for what the tokenizer cannot write.")
    sep_token: TokenText | None = Field(None, description="The token between two parts.")
    cls_token: TokenText | None = Field(None, description="The token whose output stands for the whole text.")
    mask_token: TokenText | None = Field(None, description="The token that hides others.")
    additional_special_tokens: list[TokenText] = Field(
        [], max_length=bounds.ADDED_TOKENS, description="Further special tokens, such as the marks of a chat."
    )


def _kind_of_tokenizer(value: object) -> str:
    return "path" if isinstance(value, str) else "train"


TokenizerChoice = Annotated[
    Annotated[LocalPath, Tag("path")] | Annotated[TokenizerConfig, Tag("train")], Discriminator(_kind_of_tokenizer)
]


class ModelKeys(Section):
    """The model that is trained, and its tokenizer."""

    base_model: LocalPath = Field(
        description="A local folder with config.json and safetensors, or a model of the Hugging Face hub (owner/name). "
        "Where sizes alone are needed (inspect, count, verify, doctor), also a name or a size of docs/models.md: 70B."
    )
    random_init: bool = Field(False, description="Start from random weights; of base_model config.json alone is read.")
    tokenizer: TokenizerChoice | None = Field(
        None,
        description="A folder with a tokenizer, or {train: bpe, vocab_size: N} to train one on the data. "
        "Unset: the tokenizer of base_model.",
    )
    special_tokens: SpecialTokensConfig = Field(
        SpecialTokensConfig.model_validate({}),
        description="Special tokens to set or to add. The vocabulary of the model grows where ids go beyond it.",
    )
    tokens: list[TokenText] | None = Field(
        None, max_length=bounds.ADDED_TOKENS, description="Ordinary tokens to add to the tokenizer."
    )
    resize_token_embeddings_to_32x: bool = Field(
        False, description="Where the vocabulary grows, grow it to the next multiple of 32."
    )
