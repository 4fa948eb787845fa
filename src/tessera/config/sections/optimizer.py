"""The keys of the optimizer, the learning rate and the loss."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError
from tessera.sizes import bounds


class OptimizerKeys(Section):
    """How gradients change weights, and how the loss is formed."""

    optimizer: Literal["adamw_torch_fused", "adamw_torch"] = Field(
        "adamw_torch_fused", description="torch.optim.AdamW with its fused kernel, or without."
    )
    learning_rate: float = Field(
        2e-5, ge=0, le=bounds.NUMBER, description="The highest learning rate, reached after warm-up."
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="The course of the learning rate after warm-up, to zero for cosine and linear."
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description="Optimizer steps over which the learning rate rises. Unset: from warmup_ratio.",
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps that are warm-up, rounded up.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients.")
    adam_epsilon: float = Field(1e-8, ge=0, le=bounds.NUMBER, description="Added to AdamW's denominator.")
    weight_decay: float = Field(
        0.0, ge=0, le=bounds.NUMBER, description="AdamW's decoupled decay, applied to every parameter."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, le=bounds.NUMBER, description="Gradients are scaled down to this global norm; 0 never scales."
    )
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over the whole vocabulary."
    )

    @model_validator(mode="after")
    def _warm_up_is_given_once_and_used(self) -> Self:
        given = self.model_fields_set
        if {"warmup_steps", "warmup_ratio"} <= given and self.warmup_steps is not None:
            raise UserError("warmup_ratio", self.warmup_ratio, "warmup_steps is given too", "give one of the two")
        warmup = self.warmup_steps or ("warmup_ratio" in given and self.warmup_ratio)
        if self.lr_scheduler == "constant" and warmup:
            hint = "use lr_scheduler: constant_with_warmup, or leave the warm-up out"
            raise UserError("lr_scheduler", self.lr_scheduler, "has no warm-up, but warm-up is given", hint)
        return self
