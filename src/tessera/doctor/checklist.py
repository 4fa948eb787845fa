"""What makes steps faster or smaller: on, off or not possible here, and what turning it on would change."""

from collections.abc import Mapping
from typing import Any

import torch

from tessera.core.device import dtype_name, has_bf16, has_tf32
from tessera.core.errors import UserError
from tessera.core.text import counted, human
from tessera.doctor.finding import Finding
from tessera.doctor.layout import Placed
from tessera.engine.optimizer import EXACT
from tessera.plan.memory import gathered_units
from tessera.train.kernel import attention_line
from tessera.train.less_memory import held_bytes
from tessera.train.settings import step_shape


def checklist(placed: Placed) -> list[Finding]:
    """Nine lines, one for each thing to turn on."""
    return [
        _flash(placed),
        _bf16(placed),
        _tf32(placed),
        _optimizer(placed),
        _recompute(placed),
        _loss(placed),
        Finding("compile", "not possible", "Tessera compiles nothing: torch's own kernels run, with the same numbers"),
        _prefetch(placed),
        _workers(placed),
    ]


def _held(placed: Placed, change: Mapping[str, Any], compute: torch.dtype | None = None) -> int | None:
    """The bytes that a rank holds with other keys; None where the formulas do not know it."""
    config = placed.config.model_copy(update=dict(change))
    copies = placed.mesh.device.type == "cpu"
    try:
        return held_bytes(config, placed.model, compute or placed.parallel.compute, copies)
    except (UserError, ValueError, ArithmeticError):
        return None


def _less(placed: Placed, change: Mapping[str, Any], compute: torch.dtype | None = None) -> str:
    """What a rank holds less or more with other keys, in words."""
    now, then = _held(placed, {}), _held(placed, change, compute)
    if now is None or then is None:
        return "other memory"
    return f"{human(abs(now - then))} {'less' if then <= now else 'more'} on a rank"


def _flash(placed: Placed) -> Finding:
    config, model, name = placed.config, placed.model, "flash kernel"
    line = attention_line(model, placed.parallel, config.sequence_len, packed=config.sample_packing)
    line = line.removeprefix("attention: ")
    if "not flash" not in line and not config.eager:
        return Finding(name, "on", line)
    change = "no scores of sequence_len² are kept, and each step's attention is one kernel"
    if config.eager:
        return Finding(name, "off", line, f"leave attn_implementation out: {change}")
    if model.attention_dropout:
        return Finding(name, "off", line, f"attention_dropout 0 in config.json: {change}; the model drops less")
    if placed.mesh.device.type == "cuda" and placed.parallel.compute == torch.float32 and has_bf16(placed.mesh.device):
        return Finding(name, "off", line, f"bf16: true: {change}; it computes in bfloat16")
    return Finding(name, "not possible", line)


def _bf16(placed: Placed) -> Finding:
    device, name = placed.mesh.device, "bf16"
    if placed.parallel.compute == torch.bfloat16:
        return Finding(name, "on", "products are in bfloat16, sums of statistics and the update in float32")
    effect = f"bf16: true: {_less(placed, {'bf16': True}, torch.bfloat16)}; numbers have three digits"
    if device.type == "cpu":
        text = f"computes in {dtype_name(placed.parallel.compute)}, as CPUs do by themselves: most emulate bfloat16"
        return Finding(name, "off", text, effect)
    if not has_bf16(device):
        return Finding(name, "not possible", "this GPU would emulate it")
    return Finding(name, "off", "products in float32 are several times slower than tensor cores", effect)


def _tf32(placed: Placed) -> Finding:
    device, name = placed.mesh.device, "TF32"
    if not has_tf32(device):
        what = "CPUs have none" if device.type == "cpu" else "needs a GPU of the Ampere generation or later"
        return Finding(name, "not possible", what)
    if placed.config.tf32:
        return Finding(name, "on", "products in float32 run on tensor cores, with three digits")
    if placed.parallel.compute == torch.bfloat16:
        return Finding(name, "off", "products are in bfloat16 already: it would change hardly anything")
    return Finding(name, "off", "float32 products use no tensor cores", "tf32: true: they do, with three digits")


def _optimizer(placed: Placed) -> Finding:
    chosen, name = placed.config.optimizer, "fused optimizer"
    if chosen == EXACT[0]:
        return Finding(name, "on", f"{chosen}: one kernel updates many parameters")
    if chosen in EXACT:
        mend = f"optimizer: {EXACT[0]}: the same update but for rounding, each number read and written once"
        return Finding(name, "off", f"{chosen}: a kernel for each operation of the update", mend)
    return Finding(name, "not possible", f"{chosen} has no fused form; {EXACT[0]} is another optimizer")


def _recompute(placed: Placed) -> Finding:
    config, name = placed.config, "recompute"
    if not config.recompute:
        less = _less(placed, {"gradient_checkpointing": True})
        mend = f"gradient_checkpointing: true: {less}, a third more products; selective: attention is not run again"
        return Finding(name, "off", "layers keep what their backward needs", mend)
    how = "" if config.gradient_checkpointing is True else f", {config.gradient_checkpointing}"
    more = _less(placed, {"gradient_checkpointing": False})
    text = f"each layer runs again in the backward{how}; without it {more}, and a quarter of the products fewer"
    return Finding(name, "on", text)


def _loss(placed: Placed) -> Finding:
    shape, mesh = step_shape(placed.config, placed.parallel), placed.mesh
    rows = shape.tokens_on(mesh, placed.parallel.streams.ids)
    vocabulary = -(-placed.model.vocab_size // mesh.sizes["col"])
    chunk = min(rows, shape.chunk_tokens)
    whole = human(rows * vocabulary * placed.parallel.compute.itemsize)
    text = f"head and loss are one, {counted(chunk, 'token')} at a time: {whole} of logits a rank never exist together"
    return Finding("fused loss", "on", text)


def _prefetch(placed: Placed) -> Finding:
    name = "forward_prefetch"
    if placed.parallel.fsdp is None:
        return Finding(name, "not possible", "no weights are gathered: they are not sharded over a data axis")
    *layers, _ = gathered_units(placed.model, placed.parallel)
    layer = human(max(size for size, _ in layers) * placed.parallel.compute.itemsize)
    if placed.config.fsdp_config.forward_prefetch:
        return Finding(name, "on", f"the next layer's weights ({layer}) travel while a layer computes")
    mend = f"fsdp_config.forward_prefetch: true: they are asked for before, and {layer} more are held"
    return Finding(name, "off", "the CPU asks for a layer's weights after it has begun the layer before", mend)


def _workers(placed: Placed) -> Finding:
    config, name = placed.config, "data workers"
    if not config.streaming:
        return Finding(name, "on", "not needed: rows are tokenized before the run and mapped into memory")
    workers = config.dataloader_num_workers
    if workers:
        ahead = counted(config.dataloader_prefetch_factor, "step")
        return Finding(name, "on", f"{counted(workers, 'worker')} beside each rank, {ahead} ahead")
    mend = "dataloader_num_workers: 1: texts are tokenized while the step computes; the rows stay the same"
    return Finding(name, "off", "each rank tokenizes before its step", mend)
