"""The keys of the YAML file, from their definitions: the page of documentation, a first file, a JSON Schema."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from tessera.config import compat, deepspeed, fsdp1
from tessera.config.explain import OTHER_FORMS
from tessera.config.schema import SECTIONS, DatasetConfig, TrainConfig
from tessera.config.sections.section import Section
from tessera.config.settled import SOURCES
from tessera.config.streamed import NO_EFFECT
from tessera.core.errors import as_yaml

_FSDP1 = {
    "full_shard, FULL_SHARD, auto_wrap": "nothing more: FSDP2 does it",
    "shard_grad_op, SHARD_GRAD_OP": "`fsdp_config: {reshard_after_forward: false}`",
    "no_shard, NO_SHARD": "`dp_shard_size: 1`; `dp_replicate_size` must be given",
    "hybrid_shard, HYBRID_SHARD": "nothing more; `dp_replicate_size` must be given",
    "hybrid_shard_zero2": "`fsdp_config: {reshard_after_forward: false}`; `dp_replicate_size` must be given",
    "offload": "`fsdp_config: {offload_params: true}`",
}
_DEEPSPEED = {
    "ZeRO-3": "nothing more: it is FSDP2",
    "ZeRO-1, ZeRO-2": "`fsdp_config: {reshard_after_forward: false}`; parameters are stored cut too",
    "ZeRO-0": "`dp_shard_size: 1`; `dp_replicate_size` must be given",
    "offload_optimizer or offload_param: {device: cpu}": "`fsdp_config: {offload_params: true}`",
    "bf16: {enabled: true}": "`bf16: true`",
    **{theirs: f"`{ours}`" for theirs, ours in deepspeed.TAKEN.items()},
}


def keys_page() -> str:
    """docs/keys.md: every key that a file may hold, and what becomes of it."""
    parts = [
        "# Every key",
        "This page is written by `tessera config keys`. A key of any name that is null, false or empty asks for "
        "nothing. Any key can be given on the command line too: `--learning-rate 1e-5`, `--datasets.0.path x.jsonl`.",
        "## What Tessera does",
        _table(("key", "default", "meaning"), _own_rows()),
        "## Other names",
        "These names from other tools are taken as well. Giving both names with different values is an error.",
        _table(("key", "is called"), ([f"`{key}`", _in_our_words(row)] for key, row in compat.TOP.ours.items())),
        "### FSDP1",
        "The words of `fsdp` and of `fsdp_config.sharding_strategy` mean:",
        _table(("word", "here"), _FSDP1.items()),
        "`fsdp_config.activation_checkpointing` is `gradient_checkpointing`. Keys of `fsdp_config` may begin with "
        "`fsdp_`. FSDP2 is used whatever `fsdp_version` says.",
        "### DeepSpeed",
        "`deepspeed` names a DeepSpeed config, or holds its values. Known without a file, as axolotl's examples have "
        f"them: {', '.join(f'`{name}`' for name in deepspeed.WELL_KNOWN)}. `auto` is what the YAML says.",
        _table(("DeepSpeed", "here"), _DEEPSPEED.items()),
        "## No effect",
        "These keys are taken, and a run says in one line why they change nothing.",
        _table(("key", "why"), _no_effect_rows()),
        "### In a stream",
        "With `streaming: true` or `pretraining_dataset` these have no effect either, or have none for another reason. "
        "Those on how rows are prepared hold for `test_datasets`.",
        _table(("key", "why"), ([f"`{key}`", why] for key, why in NO_EFFECT.items())),
        "## Refused",
        "A run with one of these keys does not start.",
        _table(("key", "asks for", "instead"), _refused_rows()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _own_rows() -> Iterable[list[str]]:
    tables: dict[str, type[Section]] = {"": TrainConfig, **SECTIONS}
    for key, section in tables.items():
        if key in SOURCES[1:]:
            continue  # has the keys of datasets
        prefix = f"{key}[]." if key == "datasets" else f"{key}." if key else ""
        for name, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{_as_yaml(field.default)}`"
            default = "" if isinstance(field.default, Section) else default
            yield [f"`{prefix}{name}`", default, field.description or ""]


def _as_yaml(value: object) -> str:
    return "unset" if value is None else as_yaml(value)


def _in_our_words(ours: compat.OurName) -> str:
    return f"`{ours.key}`" + (f", divided by {ours.divisor}" if ours.divisor != 1 else "")


_PLACES = {"": compat.TOP, "datasets[].": compat.DATASETS, "fsdp_config.": compat.FSDP, "deepspeed.": compat.DEEPSPEED}


def _no_effect_rows() -> Iterable[list[str]]:
    rows = [(prefix + key, why) for prefix, table in _PLACES.items() for key, why in table.no_effect.items()]
    rows += [(f"plugins: {plugin}", why) for plugin, why in compat.NO_EFFECT_PLUGINS.items()]
    return ([f"`{_written(key)}`", why] for key, why in rows)


def _refused_rows() -> Iterable[list[str]]:
    for prefix, table in _PLACES.items():
        for key, row in table.refused.items():
            passes = ", ".join(f"`{_as_yaml(value)}`" for value in row.neutral if not compat.asks_for_nothing(value))
            what = row.what + (f" ({passes} may stay)" if passes else "")
            yield [f"`{_written(prefix + key)}`", what, row.instead]
    for key, values in compat.REFUSED_VALUES.items():
        yield [f"`{key}`", f"one of {', '.join(f'`{value}`' for value in values)}", _instead_of(key)]
    yield ["`plugins`", "any other plugin", "remove it"]


def _instead_of(key: str) -> str:
    return compat.INSTEAD_OF_VALUES.get(key, "another value").removeprefix("supported: ")


def _written(key: str) -> str:
    return key.replace("deepspeed.zero.", "deepspeed.zero_optimization.")


# ---- A first file


STARTER: dict[str, dict[str, str]] = {
    "The model": {"base_model": "./my-llama"},
    "The data": {"datasets": "", "sequence_len": "2048", "val_set_size": "0.02"},
    "The length of the run": {"num_epochs": "1", "micro_batch_size": "1", "gradient_accumulation_steps": "8"},
    "The optimizer": {"optimizer": "adamw_torch_fused", "learning_rate": "2e-5", "lr_scheduler": "cosine"}
    | {"warmup_ratio": "0.03", "weight_decay": "0.0", "max_grad_norm": "1.0"},
    "Memory and speed": {"bf16": "auto", "gradient_checkpointing": "false"},
    "The layout: the product of these sizes is the number of processes": {
        "dp_shard_size": "1",
        "tensor_parallel_size": "1",
        "tensor_parallel_mode": "1d",
    },
    "What the run writes": {"output_dir": "./outputs/first", "logging_steps": "1", "save_steps": "500"}
    | {"save_total_limit": "2"},
}
"""The keys of a first file, with values to begin with."""


def starter() -> str:
    """A YAML file to begin with, in which every key is explained. `load_config` takes it."""
    lines = ["# A run of tessera train. Every key: tessera config keys"]
    for title, keys in STARTER.items():
        lines += ["", f"# ---- {title}"]
        for key, value in keys.items():
            lines += _comment(TrainConfig.model_fields[key].description or "")
            lines.append(f"{key}: {value}" if value else f"{key}:")
            if key == "datasets":
                lines += [*_comment(DatasetConfig.model_fields["path"].description or "", "  "), "  - path: ./book.txt"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "", width: int = 100) -> list[str]:
    """`text` as comment lines."""
    return textwrap.wrap(text, width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


# ---- A schema for editors


_NOTHING: dict[str, Any] = {"enum": [None, False, "", [], {}]}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML file: what the loader takes, with the meaning of each key."""
    schema = TrainConfig.model_json_schema()
    schema["properties"] = _properties(schema["properties"], compat.TOP, schema.get("required", []))
    words = {"enum": [*fsdp1.WORDS]}
    schema["properties"] |= {
        "fsdp": {"description": OTHER_FORMS["fsdp"], "anyOf": [{"type": "array", "items": words}, {}]},
        "deepspeed": {
            "description": OTHER_FORMS["deepspeed"],
            "type": ["string", "object", "null"],
        },
        "plugins": {
            "description": OTHER_FORMS["plugins"],
            "type": ["array", "null"],
            "items": {"enum": [*compat.NO_EFFECT_PLUGINS]},
        },
    }
    for key in SOURCES:
        one = {"anyOf": [{"$ref": f"#/$defs/{SECTIONS[key].__name__}"}, {"type": "string"}]}
        forms = [{"type": "array", "items": one, "minItems": 1}, *one["anyOf"]]
        blank = [] if key == "datasets" else [{"type": "null"}]
        schema["properties"][key] = {
            "description": schema["properties"][key]["description"],
            "anyOf": [*forms, *blank],
        }
    schema["properties"]["pretraining_dataset"] = {
        "description": "Called datasets here, with streaming: true.",
        "anyOf": schema["properties"]["datasets"]["anyOf"],
    }
    schema["required"].remove("datasets")
    schema["anyOf"] = [{"required": [key]} for key in ("datasets", "pretraining_dataset")]
    _open(schema, compat.TOP)
    for name, table in (("DatasetConfig", compat.DATASETS), ("FsdpConfig", compat.FSDP)):
        part = schema["$defs"][name]
        part["properties"] = _properties(part["properties"], table, part.get("required", []))
        _open(part, table)
    fsdp = schema["$defs"]["FsdpConfig"]
    fsdp["properties"] |= {
        "activation_checkpointing": {"description": "Called gradient_checkpointing here."},
        "sharding_strategy": {"description": "The strategy in the words of FSDP1."},
        "version": {"description": "FSDP2 is used whatever this says."},
    }
    fsdp["patternProperties"]["^fsdp_"] = {"description": "The same key without fsdp_."}
    return schema


def _properties(own: Mapping[str, Any], table: compat.Verdicts, required: Iterable[str]) -> dict[str, Any]:
    """Our keys, which may be left blank, and with them those of other tools that have a name without *."""
    found = {key: part if key in required else _or_blank(part) for key, part in own.items()}
    for key, ours in table.ours.items():
        found[key] = {"description": f"Called {ours.key} here."} | ({} if ours.divisor != 1 else found[ours.key])
    return found | {key: _other(row) for key, row in table.others.items() if "*" not in key}


def _or_blank(part: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: part[name] for name in ("title", "description", "default") if name in part}
    return told | {"anyOf": [{name: value for name, value in part.items() if name not in told}, {"type": "null"}]}


def _other(row: str | compat.Refused) -> dict[str, Any]:
    if isinstance(row, str):
        return {"description": f"No effect: {row}."}
    return {
        "description": f"Not supported ({row.what}): {row.instead}.",
        "enum": [*_NOTHING["enum"], *(value for value in row.neutral if not compat.asks_for_nothing(value))],
    }


def _open(part: dict[str, Any], table: compat.Verdicts) -> None:
    """Let the keys of other tools through that a name with * stands for, and every key that asks for nothing."""
    globs = {key: row for key, row in table.others.items() if "*" in key}
    part["patternProperties"] = {f"^{key.replace('*', '.*')}$": _other(row) for key, row in globs.items()}
    part["additionalProperties"] = _NOTHING
