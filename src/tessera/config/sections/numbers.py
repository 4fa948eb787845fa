"""The keys that choose dtypes, and that save memory at the cost of time."""

from typing import Literal

from pydantic import Field

from tessera.config.sections.section import Section


class NumbersKeys(Section):
    """The dtypes of computation, and what is computed again instead of kept."""

    bf16: Literal["auto", True, False] = Field(
        "auto", description="Compute in bfloat16 over float32 parameters; auto: where the device has it."
    )
    tf32: bool = Field(False, description="Let float32 products on CUDA use the TF32 tensor cores.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward instead of keeping its activations."
    )
