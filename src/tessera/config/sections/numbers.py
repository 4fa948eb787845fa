"""The keys that choose dtypes, and that save memory at the cost of time."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError


class NumbersKeys(Section):
    """The dtypes of computation, and what is computed again instead of kept."""

    bf16: Literal["auto", "full", True, False] = Field(
        "auto",
        description="Compute in bfloat16 over float32 parameters; auto: where the device has it. full: parameters, "
        "gradients and optimizer state are bfloat16 too.",
    )
    bfloat16: bool = Field(False, description="The same as bf16: full, as axolotl spells it.")
    tf32: bool = Field(False, description="Let float32 products on CUDA use the TF32 tensor cores.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward instead of keeping its activations."
    )

    @property
    def full_bf16(self) -> bool:
        """Whether parameters, gradients and optimizer state are bfloat16."""
        return self.bfloat16 or self.bf16 == "full"

    @model_validator(mode="after")
    def _bfloat16_is_asked_for_once(self) -> Self:
        if self.bfloat16 and self.bf16 is False:
            raise UserError("bfloat16", True, "bf16 is false", "write bf16: full, or leave one of the two out")
        return self
