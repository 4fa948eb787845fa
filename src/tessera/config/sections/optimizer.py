"""The keys of the optimizer, the learning rate and the loss."""

import ast
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tessera.config.sections.section import Section
from tessera.config.sections.steps import StepsOrShare
from tessera.core.errors import UserError
from tessera.sizes import bounds

Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "sgd",
    "muon",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "ao_adamw_8bit",
    "ao_adamw_4bit",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "rex",
]


def _or_unset(value: object) -> object:
    """What is empty asks for nothing."""
    return value or None


def _as_mapping(value: object) -> object:
    """`a=1,b=true` as transformers writes it, as keys with values."""
    if not isinstance(value, str):
        return _or_unset(value)
    found: dict[str, Any] = {}
    for part in filter(None, value.replace(" ", "").split(",")):
        name, equals, text = part.partition("=")
        if not equals:
            raise ValueError("is not keys with values, for example {momentum: 0.9} or momentum=0.9")
        found[name] = _value(text)
    return _or_unset(found)


def _as_list(value: object) -> object:
    """One pattern may stand alone; an empty list asks for nothing."""
    return [value] if isinstance(value, str) and value else _or_unset(value)


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


class OptimizerKeys(Section):
    """How gradients change weights, and how the loss is formed."""

    optimizer: Optimizer = Field(
        "adamw_torch_fused",
        description="adamw_torch_fused, adamw_torch and sgd are those of torch; muon is torch.optim.Muon for the "
        "matrices of the layers and AdamW for all else. adamw_torch_8bit and _4bit keep AdamW's state in 8 or 4 bits "
        "(torchao); adamw_bnb_8bit, adamw_8bit, paged_adamw_8bit and paged_adamw_32bit are those of bitsandbytes.",
    )
    optim_args: Annotated[dict[str, Any] | None, BeforeValidator(_as_mapping)] = Field(
        None,
        description="Further options of the optimizer, as keys with values or as text, e.g. momentum=0.9 with sgd.",
    )
    learning_rate: float = Field(
        2e-5, ge=0, le=bounds.NUMBER, description="The highest learning rate, reached after warm-up."
    )
    lr_scheduler: Scheduler = Field(
        "cosine",
        description="How the learning rate changes after warm-up, by the names of transformers (cosine and linear "
        "decay to 0), or rex.",
    )
    lr_scheduler_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_or_unset)] = Field(
        None, description="Options of the schedule, as transformers names them, e.g. {min_lr: 1e-6}."
    )
    cosine_min_lr_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With lr_scheduler cosine or rex: decay to this share of learning_rate instead of 0.",
    )
    cosine_constant_lr_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With cosine_min_lr_ratio: the share of all steps after which the rate stays at its lowest. "
        "0 and unset: it is the lowest at the end.",
    )
    warmup_steps: StepsOrShare | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description="Optimizer steps over which the learning rate rises; a number below 1 is a share of all steps. "
        "Unset: from warmup_ratio.",
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
    unfrozen_parameters: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(
        None,
        description="Train only the parameters whose Hugging Face name begins with one of these regular expressions "
        "(dots are literal), e.g. model.layers.1[0-9].; the others stay as they are. Unset: train all.",
    )

    @model_validator(mode="after")
    def _warm_up_is_given_once_and_used(self) -> Self:
        given = self.model_fields_set
        if "warmup_ratio" in given and self.warmup_ratio and self.warmup_steps is not None:
            raise UserError("warmup_ratio", self.warmup_ratio, "warmup_steps is given too", "give one of the two")
        warmup = self.warmup_steps or ("warmup_ratio" in given and self.warmup_ratio)
        if self.lr_scheduler == "constant" and warmup:
            hint = "use lr_scheduler: constant_with_warmup, or leave the warm-up out"
            raise UserError("lr_scheduler", self.lr_scheduler, "has no warm-up, but warm-up is given", hint)
        return self

    @model_validator(mode="after")
    def _the_lowest_rate_is_of_a_schedule_that_has_one(self) -> Self:
        lowest, constant = self.cosine_min_lr_ratio, self.cosine_constant_lr_ratio
        if lowest and self.lr_scheduler not in ("cosine", "rex"):
            reason = f"lr_scheduler is {self.lr_scheduler}"
            raise UserError("cosine_min_lr_ratio", lowest, reason, "write lr_scheduler: cosine, or leave it out")
        if constant and not (lowest and self.lr_scheduler == "cosine"):
            hint = "write lr_scheduler: cosine and cosine_min_lr_ratio: 0.1 beside it, or leave it out"
            raise UserError("cosine_constant_lr_ratio", constant, "needs cosine and its cosine_min_lr_ratio", hint)
        if lowest and self.lr_scheduler_kwargs:
            reason = "cosine_min_lr_ratio is given too"
            raise UserError("lr_scheduler_kwargs", self.lr_scheduler_kwargs, reason, "give one of the two")
        return self
