"""The keys that choose dtypes, and that save memory at the cost of time."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError
from tessera.sizes import bounds


def _kept_in_host_memory(value: object) -> object:
    """axolotl's `legacy` names an older way to do the same."""
    return True if value == "legacy" else value


class NumbersKeys(Section):
    """The dtypes of computation, and what is computed again instead of kept."""

    bf16: Literal["auto", "full", True, False] = Field(
        "auto",
        description="Compute in bfloat16 over float32 parameters; auto: where the device has it. full: parameters, "
        "gradients and optimizer state are bfloat16 too.",
    )
    bfloat16: bool = Field(False, description="The same as bf16: full, as axolotl spells it.")
    tf32: bool = Field(False, description="Let float32 products on CUDA use the TF32 tensor cores.")
    attn_implementation: (
        Literal[
            "eager", "sdpa", "flash", "flash_attention_2", "flash_attention_3", "flex", "flex_attention", "xformers"
        ]
        | None
    ) = Field(
        None,
        description="eager: attention step by step, with scores of sequence_len² for each head. The others, and unset: "
        "the fastest kernel of torch's scaled_dot_product_attention, flash attention where it fits. The run's first "
        "lines name the kernel.",
    )
    flash_attention: bool | None = Field(None, description="The same as attn_implementation: flash_attention_2.")
    sdp_attention: bool | None = Field(None, description="The same as attn_implementation: sdpa.")
    eager_attention: bool | None = Field(None, description="The same as attn_implementation: eager.")
    gradient_checkpointing: bool | Literal["selective", "offload"] = Field(
        False,
        description="Recompute each block in the backward instead of keeping its activations. selective: but for "
        "attention and its communication, whose result is kept. offload: its input is kept in host memory.",
    )
    activation_offloading: Annotated[bool, BeforeValidator(_kept_in_host_memory)] = Field(
        False,
        description="Keep what each block saves for its backward in host memory; beside gradient_checkpointing that is "
        "its input. legacy means the same as true.",
    )
    tiled_mlp: bool = Field(
        False, description="Compute each MLP over some of its tokens after the others, forward and backward."
    )
    tiled_mlp_num_shards: int | None = Field(
        None,
        ge=1,
        le=bounds.WIDTH,
        description="Parts into which tiled_mlp cuts tokens. Unset: a device's tokens / hidden_size, rounded up.",
    )

    @property
    def full_bf16(self) -> bool:
        """Whether parameters, gradients and optimizer state are bfloat16."""
        return self.bfloat16 or self.bf16 == "full"

    @property
    def recompute(self) -> bool:
        """Whether blocks run again in the backward."""
        return bool(self.gradient_checkpointing)

    @property
    def offloads(self) -> bool:
        """Whether what blocks keep for their backward lies in host memory."""
        return self.activation_offloading or self.gradient_checkpointing == "offload"

    @property
    def eager(self) -> bool:
        """Whether attention is computed step by step."""
        return bool(self.eager_attention) or self.attn_implementation == "eager"

    @model_validator(mode="after")
    def _attention_is_asked_for_once(self) -> Self:
        fused = [key for key in ("flash_attention", "sdp_attention") if getattr(self, key)]
        if self.attn_implementation not in (None, "eager"):
            fused.append("attn_implementation")
        if self.eager and fused:
            key = "eager_attention" if self.eager_attention else "attn_implementation"
            reason = f"{fused[0]} is {str(getattr(self, fused[0])).lower()}"
            raise UserError(key, str(getattr(self, key)).lower(), reason, "leave one of the two out")
        return self

    @model_validator(mode="after")
    def _bfloat16_is_asked_for_once(self) -> Self:
        if self.bfloat16 and self.bf16 is False:
            raise UserError("bfloat16", True, "bf16 is false", "write bf16: full, or leave one of the two out")
        return self
