"""A DeepSpeed config, in our keys: `deepspeed: FILE`, or the same values in the YAML itself.

| DeepSpeed | ours |
|---|---|
| ZeRO-3 | FSDP2 over the processes that the other sizes leave |
| ZeRO-1, ZeRO-2 | the same, with fsdp_config.reshard_after_forward: false |
| ZeRO-0 | dp_shard_size: 1, with dp_replicate_size |
| offload of parameters or optimizer to cpu | fsdp_config.offload_params: true |
| bf16: {enabled: true} | bf16: true |
| batch sizes, gradient_clipping | as TAKEN says |
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from tessera.config import compat
from tessera.config.compat import asks_for_nothing
from tessera.config.fsdp1 import replicate
from tessera.config.reader import nearest
from tessera.config.settled import Settled
from tessera.config.words import shown
from tessera.core.errors import UserError
from tessera.core.files import read_json

_CPU, _BF16 = {"device": "cpu"}, {"bf16": {"enabled": True}}


def _zero(stage: int, **more: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


WELL_KNOWN: dict[str, dict[str, Any]] = {
    "zero1.json": _zero(1),
    "zero1_torch_compile.json": _zero(1),
    "zero2.json": _zero(2, offload_optimizer=_CPU),
    "zero2_torch_compile.json": _zero(2, offload_optimizer=_CPU),
    "zero3.json": _zero(3),
    "zero3_bf16.json": _zero(3) | _BF16,
    "zero3_bf16_cpuoffload_all.json": _zero(3, offload_optimizer=_CPU, offload_param=_CPU) | _BF16,
    "zero3_bf16_cpuoffload_params.json": _zero(3, offload_param=_CPU) | _BF16,
}
"""The files of axolotl's folder deepspeed_configs, which are seldom where its example configs are tried."""

TAKEN = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}


def settle_deepspeed(out: Settled) -> None:
    """Take `deepspeed` as keys of ours."""
    given = out.values.pop("deepspeed", None)
    if asks_for_nothing(given):
        return
    config = given if isinstance(given, dict) else _read(given, out)
    if config is None:
        return
    if not asks_for_nothing(out.values.get("fsdp_config")):
        out.refuse("deepspeed", given, "and fsdp_config is given too", "keep one of the two")
        return
    for name, value in _fields(config):
        _take(name, value, out)


def _read(given: object, out: Settled) -> dict[str, Any] | None:
    """The values in the JSON file `given`, or those that axolotl's file of that name has."""
    if not isinstance(given, str):
        out.refuse("deepspeed", given, "must be the path of a JSON file", "for example deepspeed: zero3.json")
        return None
    try:
        values = read_json(given, "deepspeed", hint=f"known without a file: {', '.join(WELL_KNOWN)}")
    except UserError as error:
        known = WELL_KNOWN.get(PurePath(given).name)
        if known is None or error.reason != "does not exist":
            out.problems.append(error)
            return None
        out.notes.append(f"deepspeed: {given} does not exist; taken as the file of that name in axolotl's examples")
        return known
    if not isinstance(values, dict):
        out.refuse("deepspeed", given, "holds no keys with values", "give a DeepSpeed config")
        return None
    return values


def _fields(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The keys with values, those of zero_optimization as `zero.key`."""
    for key, value in config.items():
        if key == "zero_optimization" and isinstance(value, dict):
            yield "zero.stage", value.get("stage", 0)
            yield from ((f"zero.{inner}", each) for inner, each in value.items() if inner != "stage")
        else:
            yield str(key), value


def _take(name: str, value: Any, out: Settled) -> None:
    """Set what one key of a DeepSpeed config means."""
    by = f"deepspeed.{name.replace('zero.', 'zero_optimization.')}"
    row = compat.find(compat.DEEPSPEED.others, name)
    if name == "zero.stage":
        _take_stage(by, value, out)
    elif name in ("zero.offload_optimizer", "zero.offload_param"):
        _take_offload(by, value, out)
    elif asks_for_nothing(value) or value == "auto":
        return  # auto: as the YAML says
    elif name in TAKEN:
        out.take(TAKEN[name], value, by, value)
    elif name == "bf16":
        if _is_enabled(value):
            if out.values.get("bf16") == "auto":
                del out.values["bf16"]
            out.take("bf16", True, f"{by}.enabled", True)
    elif name == "optimizer":
        _judge_optimizer(by, value, out)
    elif isinstance(row, compat.Refused):
        if not row.lets_pass(value) and (not isinstance(value, dict) or _is_enabled(value)):
            out.refuse(by, value, f"is not supported ({row.what})", row.instead)
    elif name == "zero_optimization":
        out.refuse(by, value, "must be keys with values", "for example zero_optimization: {stage: 3}")
    elif row is None:
        known = [*compat.DEEPSPEED.others, *TAKEN, "zero.stage", "bf16", "optimizer", "zero_optimization"]
        out.refuse(by, value, "is not a known key", nearest(name, known).replace("zero.", ""))


def _is_enabled(value: object) -> bool:
    """Whether {enabled: …} asks for something; auto leaves it to the YAML."""
    return not isinstance(value, dict) or value.get("enabled", True) not in (False, "auto", "false")


def _take_stage(by: str, stage: object, out: Settled) -> None:
    if stage == 3:
        out.notes.append(f"{by}: 3 is FSDP2 here")
    elif stage in (1, 2) and not isinstance(stage, bool):
        out.take("fsdp_config.reshard_after_forward", False, by, stage)
        out.notes.append(
            f"{by}: {stage} is FSDP2 with reshard_after_forward: false here: parameters and gradients are stored cut "
            "too, and gathered once a micro-batch"
        )
    elif stage == 0 and not isinstance(stage, bool):
        replicate(by, stage, out)
    else:
        out.refuse(by, stage, "is not a stage of ZeRO", "write 0, 1, 2 or 3")


def _take_offload(by: str, value: object, out: Settled) -> None:
    device = value.get("device", "none") if isinstance(value, dict) else value
    if device == "cpu":
        out.take("fsdp_config.offload_params", True, by, value)
        if by.endswith("optimizer"):
            out.notes.append(f"{by}: parameters and gradients are kept in host memory too (fsdp_config.offload_params)")
    elif not asks_for_nothing(device) and device != "none":
        out.refuse(by, value, f"offload to {shown(device)} is not supported", "write device: cpu there, or none")


def _judge_optimizer(by: str, value: object, out: Settled) -> None:
    """Only AdamW with everything auto is what the YAML says."""
    kind, params = (value.get("type"), value.get("params", {})) if isinstance(value, dict) else (value, {})
    numbers = params.values() if isinstance(params, dict) else [params]
    if str(kind).lower() not in ("adamw", "adam") or any(number != "auto" for number in numbers):
        hint = "remove it there, and write optimizer and learning_rate in the YAML"
        out.refuse(by, value, "is not supported (an optimizer with settings of its own)", hint)
