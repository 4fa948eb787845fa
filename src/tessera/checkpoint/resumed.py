"""What a resumed run does differently from the one that made its checkpoint."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tessera.core.errors import as_yaml

QUIET = {
    # where things go, and how often they are said or saved
    "output_dir",
    "logging_steps",
    "eval_steps",
    "evals_per_epoch",
    "eval_strategy",
    "save_*",
    "saves_per_epoch",
    "load_best_model_at_end",
    "early_stopping_patience",
    "check_replicas_steps",
    "device_peak_tflops",
    "logging_dir",
    "report_to",
    "use_tensorboard",
    "*wandb*",
    "*mlflow*",
    "*trackio*",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
    # the layout: any reads any
    "tensor_parallel_*",
    "sequence_parallel",
    "context_parallel_*",
    "ulysses_*",
    "dp_*",
    "fsdp*",
    "group_timeout_minutes",
    # how far a stream is tokenized ahead
    "dataloader_*",
    # the kernel of attention
    "attn_implementation",
    "*_attention",
    # how much padding there is, and how rows held out are joined
    "pad_to_sequence_len",
    "eval_sample_packing",
    # of no effect once weights come from a checkpoint, or on memory alone
    "random_init",
    "gradient_checkpointing",
    "activation_offloading",
    "tiled_mlp*",
}
"""Patterns of keys that change neither the course of a run nor its numbers (but for rounding)."""

MOST, LONGEST = 50, 1000
"""Lines that are said, and characters of a value in one."""


def differences(then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """One line for each key that is not as it was and matters, at most MOST of them.

    A key that `then` lacks, because it came later, is taken to have been as in `defaults`.
    """
    lines = []
    for key in dict.fromkeys([*now, *then]) if then else []:
        if any(fnmatchcase(key, pattern) for pattern in QUIET):
            continue
        if key not in now:
            lines.append(f"resuming without {_shown(key)}, the checkpoint was made with {_shown(then[key])}")
        elif (before := then.get(key, defaults.get(key, now[key]))) != now[key]:
            lines.append(f"resuming with {key}: {_shown(now[key])}, the checkpoint was made with {_shown(before)}")
    more = len(lines) - MOST
    return [*lines[:MOST], f"and {more} other keys that are not as they were"] if more > 0 else lines


def _shown(value: object) -> str:
    """A value on one line as YAML has it, whatever a checkpoint may hold."""
    if isinstance(value, float) and abs(value) < 2**53 and value.is_integer():
        value = int(value)
    shown = "unset" if value is None else as_yaml(value)
    shown = shown if shown.isprintable() else ascii(shown)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
