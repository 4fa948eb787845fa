"""The configuration of a run: sections/ has every key with its meaning, unit, range and default; here they are joined.

Relative paths (base_model, datasets, tokenizer, output_dir) count from the current folder. Anything that does not fit
raises a `UserError` naming the key: the checks of one section's keys are with them, those between sections here.
`compat.py` has the keys of other tools, `load.py` reads YAML.
"""

from typing import Any

from pydantic import model_validator

from tessera.config.sections.batch import BatchKeys
from tessera.config.sections.chat import ChatKeys
from tessera.config.sections.checkpoints import CheckpointKeys
from tessera.config.sections.data import DataKeys, DatasetConfig
from tessera.config.sections.health import HealthKeys
from tessera.config.sections.layout import FsdpConfig, LayoutKeys, MeshConfig
from tessera.config.sections.log import LogKeys
from tessera.config.sections.model import ModelKeys, SpecialTokensConfig, TokenizerConfig
from tessera.config.sections.numbers import NumbersKeys
from tessera.config.sections.optimizer import OptimizerKeys
from tessera.config.sections.output import OutputKeys
from tessera.config.sections.packing import PackingKeys
from tessera.config.sections.preparation import PreparationKeys
from tessera.config.sections.profiler import ProfilerKeys
from tessera.config.sections.section import Section
from tessera.config.sections.stream import StreamKeys
from tessera.config.sections.trackers import TrackerKeys
from tessera.core.errors import UserError

SECTIONS: dict[str, type[Section]] = {
    "datasets": DatasetConfig,
    "test_datasets": DatasetConfig,
    "tokenizer": TokenizerConfig,
    "special_tokens": SpecialTokensConfig,
    "tensor_parallel_mesh": MeshConfig,
    "fsdp_config": FsdpConfig,
}
"""The keys whose values have keys of their own, with those."""


class TrainConfig(
    TrackerKeys,
    ProfilerKeys,
    OutputKeys,
    CheckpointKeys,
    LogKeys,
    HealthKeys,
    LayoutKeys,
    NumbersKeys,
    OptimizerKeys,
    BatchKeys,
    StreamKeys,
    PreparationKeys,
    ChatKeys,
    PackingKeys,
    DataKeys,
    ModelKeys,  # the keys of the last base come first in tables and files
):
    """One training run."""

    @model_validator(mode="after")
    def _keys_of_several_sections_agree(self) -> "TrainConfig":
        policy = self.fsdp_config.mixed_precision_policy
        if policy is not None and self.bf16 != "auto" and bool(self.bf16) != (policy == "bf16"):
            key, reason = "fsdp_config.mixed_precision_policy", f"bf16 is {str(self.bf16).lower()}"
            raise UserError(key, policy, reason, "leave one of the two out")
        if policy == "fp32" and self.full_bf16:
            reason = "parameters are bfloat16 (bf16: full)"
            raise UserError("fsdp_config.mixed_precision_policy", policy, reason, "leave one of the two out")
        _check_evaluation(self)
        if self.streaming:
            _check_stream(self)
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.val_set_size or getattr(self, "test_datasets", None))


def _check_evaluation(config: TrainConfig) -> None:
    """Raise UserError where keys need evaluations that the others do not give."""
    if config.eval_steps is not None and not config.evaluates:
        reason = "no rows are held out for evaluation"
        raise UserError("eval_steps", config.eval_steps, reason, "set val_set_size, for example 0.05")
    key = config.compares_evaluations
    if not key or not (config.eval_strategy == "no" or not config.evaluates):
        return
    reason = "eval_strategy is no" if config.eval_strategy == "no" else "no rows are held out for evaluation"
    hint = "set eval_strategy: steps" if config.eval_strategy == "no" else "set val_set_size, for example 0.05"
    raise UserError(key, getattr(config, key), f"compares evaluations, but {reason}", hint)


def _check_stream(config: TrainConfig) -> None:
    """Raise UserError where keys do not go with a stream, which has no end and is not known before."""
    if config.max_steps is None:
        raise UserError(
            "max_steps", None, "is required where data are streamed: a stream has no end", "max_steps: 1000"
        )
    if config.val_set_size:
        reason = "no rows of a stream can be held out"
        raise UserError("val_set_size", config.val_set_size, reason, "remove it; test_datasets are evaluated on")
    if isinstance(config.tokenizer, TokenizerConfig):
        reason = "no tokenizer is trained on a stream"
        raise UserError("tokenizer", config.tokenizer.vocab_size, reason, "give the folder of one, or leave it out")


def defaults_taken(config: TrainConfig) -> dict[str, Any]:
    """The keys that the user did not give, with the values that hold; of sections none."""
    values = {key: getattr(config, key) for key in type(config).model_fields if key not in config.model_fields_set}
    return {key: value for key, value in values.items() if not isinstance(value, Section)}
