"""From a YAML file and `key=value` overrides to a checked `TrainConfig`, and back to YAML.

`reader.py` reads the text, `overrides.py` lays the command line over it, `settled.py` judges the keys of other tools,
`problems.py` tells of mistakes. Relative paths stay as given: they count from the current folder, as in axolotl.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tessera.config import compat
from tessera.config.deepspeed import settle_deepspeed
from tessera.config.fsdp1 import settle_fsdp
from tessera.config.overrides import lay_over
from tessera.config.problems import ConfigError, KeyPath, check_kind, fields_at, place_of, problems_of
from tessera.config.reader import read_yaml
from tessera.config.schema import TrainConfig
from tessera.config.settled import SOURCES, Settled, judged, judged_sources
from tessera.config.streamed import settle_stream, without_effect_in_stream
from tessera.config.words import shown

__all__ = ["ConfigError", "Resolved", "dump_config", "load_config", "make_config", "resolve_config", "written_values"]


@dataclass(frozen=True)
class Resolved:
    """A config, one line for each key that is not as it was written, and where the values came from."""

    config: TrainConfig
    notes: list[str]
    given_as: Mapping[str, str] = field(default_factory=dict)
    """The keys of ours that another key gave, with the name of that one."""
    overridden: frozenset[str] = frozenset()
    """The keys that the command line gave, those inside others with dots."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """The configuration in the YAML file `path` with `overrides` ("key=value", the value YAML) on top of it.

    Also returns one line for each key that is taken under another name, or without effect. Raises `UserError`, with
    every problem of the file in one message.
    """
    resolved = resolve_config(path, overrides)
    return resolved.config, resolved.notes


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """The same, and where each value came from."""
    values = read_yaml(path)
    check_kind(values, str(path))
    overridden = lay_over(values, overrides)
    config, settled = _made(values, str(path))
    return Resolved(config, settled.notes, settled.given_as, frozenset(overridden))


def make_config(values: Mapping[Any, Any], source: str = "config") -> tuple[TrainConfig, list[str]]:
    """The configuration of plain `values`, which errors call `source`; otherwise like `load_config`."""
    config, settled = _made(values, source)
    return config, settled.notes


def _made(values: Mapping[Any, Any], source: str) -> tuple[TrainConfig, Settled]:
    settled = settle(values)
    problems = settled.every_problem()
    try:
        config = _validated(settled.values)
    except ValidationError as error:
        found = problems_of(error, settled.given_as)
        if settled.refuses("pretraining_dataset"):  # its refusal says to write datasets
            found = [problem for problem in found if problem.key != "datasets"]
        problems += found
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(source, problems)
    settled.notes += [*_without_effect(config), *without_effect_in_stream(config, settled.given_as)]
    return config, settled


def settle(given: Mapping[Any, Any]) -> Settled:
    """The keys of ours in `given`; those of other tools are taken as ours, or taken away."""
    out = Settled({})
    judged_values = judged({str(key): value for key, value in given.items()}, compat.TOP, "", out)
    out.values = {key: value for key, value in judged_values.items() if not _is_left_out(key, value)}
    for key in SOURCES:
        if key in out.values:
            out.values[key] = judged_sources(out.values[key], key, out)
    if out.given_as.get("datasets") == "pretraining_dataset":
        out.values["streaming"] = True
    elif out.values.get("streaming") is True and (kinds := _kinds_that_are_prepared(out.values.get("datasets"))):
        out.values["streaming"] = False
        why = f"rows of type {', '.join(kinds)} are prepared before the run, in bounded memory"
        out.notes.append(f"streaming: true has no effect: {why}")
    settle_stream(given, out)
    asked = next((key for key in ("fsdp", "deepspeed") if not compat.asks_for_nothing(out.values.get(key))), None)
    settle_fsdp(out)
    settle_deepspeed(out)
    if asked and compat.asks_for_nothing(out.values.get("dp_shard_size")):
        out.notes.append(f"{asked} shards over all processes that the other sizes leave; --num-processes says how many")
    return out


def _kinds_that_are_prepared(sources: object) -> list[str]:
    """The types of data sets that no stream takes, which has whole texts alone."""
    given = [source.get("type") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return [shown(kind) for kind in given if kind and kind not in ("completion", "pretrain")]


def _is_left_out(key: str, value: object) -> bool:
    """Whether a key that may be left out holds an empty text, list or mapping."""
    known = TrainConfig.model_fields.get(key)
    return value in ("", [], {}) and not (known and known.is_required())


def _validated(values: dict[str, Any]) -> TrainConfig:
    """The config of `values`, of which those that ask for nothing and do not fit their key are as good as not given."""
    while True:
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            places = {place_of(detail["loc"]) for detail in error.errors(include_url=False)}
            empty = {left_out for place in places if (left_out := _asking_for_nothing(values, place))}
            if not empty:
                raise
            for place in empty:
                values = _without(values, place)


def _asking_for_nothing(values: Any, place: KeyPath) -> KeyPath:
    """The key at `place`, or one that holds it, where it may be left out and as good as is; () where there is none."""
    for count, key in enumerate(place, 1):
        if isinstance(values, list) and isinstance(key, int):
            values = values[key]
        elif isinstance(values, dict) and key in values:
            values, known = values[key], fields_at(place[:count]).get(str(key))
            if compat.asks_for_nothing(values) and not (known and known.is_required()):
                return place[:count]
        else:
            break  # the name of a type that the value may have
    return ()


def _without(values: Any, place: KeyPath) -> Any:
    """A copy of `values` without the key at `place`."""
    head, *rest = place
    if isinstance(values, list):
        return [_without(one, tuple(rest)) if index == head else one for index, one in enumerate(values)]
    if rest:
        return {**values, head: _without(values[head], tuple(rest))}
    return {key: value for key, value in values.items() if key != head}


def dump_config(config: TrainConfig) -> str:
    """`config` as YAML, every key resolved; `load_config` of it gives the same configuration."""
    return yaml.safe_dump(written_values(config), sort_keys=False, allow_unicode=True)


def written_values(config: TrainConfig) -> dict[str, Any]:
    """Every key with its value, but for those that do not count beside others."""
    values = config.model_dump()
    if config.warmup_steps is not None or config.lr_scheduler == "constant":
        del values["warmup_ratio"]
    return values


def _without_effect(config: TrainConfig) -> list[str]:
    """What is to be said about keys of ours that do nothing here; the resolved config of a run with auto has such."""
    lines = [f"{key} has no effect: {name} is not asked for" for key, name in config.idle_tracker_keys().items()]
    key, schedule = "tensor_parallel_scratch_gib", config.tensor_parallel_schedule
    limit = getattr(config, key)
    if schedule != "auto" and limit != TrainConfig.model_fields[key].default:
        why = f"it limits schedule auto, and tensor_parallel_schedule is {schedule}"
        lines.append(f"{key}: {limit:g} has no effect: {why}")
    for key in ("dataloader_num_workers", "dataloader_prefetch_factor"):
        value = getattr(config, key)
        if not config.streaming and value != TrainConfig.model_fields[key].default:
            lines.append(
                f"{key}: {value} has no effect: rows are prepared before the run, as streaming is not asked for"
            )
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        value = getattr(config, key)
        if config.optimizer == "sgd" and value != TrainConfig.model_fields[key].default:
            lines.append(f"{key}: {value:g} has no effect: optimizer is sgd")
    for key in ("evals_per_epoch", "eval_strategy", "eval_sample_packing"):
        value = getattr(config, key)
        if value and value != "no" and not config.evaluates:
            lines.append(f"{key}: {shown(value)} has no effect: no rows are held out for evaluation (val_set_size)")
    if config.greater_is_better and not config.compares_evaluations:
        why = "no key compares evaluations (metric_for_best_model, load_best_model_at_end, save_strategy: best, …)"
        lines.append(f"greater_is_better: true has no effect: {why}")
    if config.tiled_mlp_num_shards is not None and not config.tiled_mlp:
        lines.append(f"tiled_mlp_num_shards: {config.tiled_mlp_num_shards} has no effect: tiled_mlp is not asked for")
    if config.sample_packing and config.pad_to_sequence_len is False:
        lines += ["pad_to_sequence_len: false has no effect: rows of packed samples are always padded to sequence_len"]
    return lines
