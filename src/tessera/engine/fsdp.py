"""Sharded data parallelism: torch's FSDP2 around the layers of a decoder, its collectives through our one door.

    axes              parameters                       gradients
    inner · col       DTensors, cut as specs say      as the products and the gradient rule sum them
    shard · row       dim 0 cut again by FSDP2         reduce-scatter, in a step's last backward, or in each
    replicate · depth repeated                         one all-reduce of what that left

`row` cuts tokens, as `shard` does: its weights are gathered the same way, so FSDP2 serves both at once (`fsdp` of
`Parallel`), in one gather for each layer, and all weights of a layer together. Only the loops of summa and cannon keep
a leg of their own along `row`. Every sum is a sum: nothing is divided, as the loss already is.
"""

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tessera.core.collectives import gather_into, reduce_scatter_into, start_all_reduce
from tessera.core.mesh import Group
from tessera.core.recorder import GATHER_WAIT, SUM_WAIT, begin_span
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, Savers
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs


def build_decoder(
    model: ModelConfig,
    parallel: Parallel,
    fsdp: Fsdp = Fsdp(),
    *,
    gradient_checkpointing: bool = False,
    savers: Savers = Savers(),
    trained: Collection[str] | None = None,
) -> Decoder:
    """The model, its parameters in FSDP2's hands where `parallel` says so; they are empty, as in `Decoder`.

    Only the parameters `trained` get a gradient; None: all do.
    """
    decoder = Decoder(model, parallel, gradient_checkpointing=gradient_checkpointing, savers=savers)
    if trained is not None:
        for name, parameter, _ in named_specs(decoder):
            parameter.requires_grad_(name in trained)
    if parallel.fsdp is not None:
        _shard(decoder, fsdp)
    return decoder


def gradients_travel(decoder: Decoder, last: bool) -> None:
    """Whether the next backward sums gradients over the data axes: a step's last one does, for all of them.

    With `sync_each_batch` each does, and adds to this rank's shards, which are all that is kept between them. Where
    weights are kept after the forward, they stay until the last one either way.
    """
    if isinstance(decoder, FSDPModule):
        travel = last or decoder.sums_each_batch
        decoder.set_requires_gradient_sync(travel)
        decoder.set_is_last_backward(travel)
        if decoder.keeps_gathered:
            decoder.set_reshard_after_backward(last)


def _shard(decoder: Decoder, fsdp: Fsdp) -> None:
    parallel = decoder.parallel
    mesh, over = parallel.mesh, parallel.fsdp
    assert over is not None
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if parallel.compute != parallel.dtype:
        policy = MixedPrecisionPolicy(parallel.compute, parallel.dtype, cast_forward_inputs=False)
    on_cuda = mesh.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": parallel.data_mesh[mesh.name(over)],
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda) if fsdp.offload else OffloadPolicy(),
    }
    units: list[Any] = [*(decoder.layers.values() if fsdp.by_layer else []), decoder]
    stored, copies = mesh.group(over), mesh.group(axis for axis in parallel.served if axis not in over)
    for unit in units:
        # embedding and head are the first that the backward needs: they stay
        made = fully_shard(unit, reshard_after_forward=fsdp.reshard and unit is not decoder, **options)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
        if stored is not None:
            made.set_custom_all_gather(_Gather(stored))
            made.set_custom_reduce_scatter(_Scatter(stored))
        if copies is not None:
            made.set_all_reduce_hook(_sum_over(copies))
        if on_cuda and stored is not None:
            mark_waits(made, stored.axes)
    if fsdp.prefetch and fsdp.by_layer:
        layers = [layer for layer in decoder.layers.values() if isinstance(layer, FSDPModule)]
        for layer, following in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
    decoder.register_forward_hook(_cut_again)
    decoder.keeps_gathered, decoder.sums_each_batch = not fsdp.reshard, fsdp.sync_each_batch
    decoder.to_empty(device="cpu" if fsdp.offload else mesh.device)


def mark_waits(unit: Any, axes: tuple[str, ...]) -> None:
    """Have spans of the recorder that times say where FSDP2 waits for the gathers and sums of `unit`.

    On a GPU it waits on streams, which our door does not see; what it copies out of a gather then is in the time too,
    and what it waits for sums of other layers within the backward is not. Torch has no hook for it, so two methods of
    its own are wrapped, where they are called so.
    """
    state = unit._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        for name, kind in (("wait_for_unshard", GATHER_WAIT), ("finalize_backward", SUM_WAIT)):
            if (wait := getattr(group, name, None)) is not None:
                setattr(group, name, _marked(wait, kind, axes))


def _marked(wait: Callable[[], None], kind: str, axes: tuple[str, ...]) -> Callable[[], None]:
    def marked() -> None:
        if (span := begin_span(kind, axes)) is None:
            return wait()
        span.waited_for = False  # others wait for what was issued before
        span.mark()
        with span.within():
            wait()

    return marked


def _cut_again(decoder: Any, *_: Any) -> None:
    """After a forward that no backward follows: weights that would have been kept for it go back to their shards."""
    if not torch.is_grad_enabled():
        for module in decoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _sum_over(copies: Group) -> Any:
    def hook(reduced: Tensor) -> None:
        # on a GPU FSDP2 calls this on a stream of its own, where nobody stands meanwhile
        start_all_reduce(reduced, copies).wait(marked=not reduced.is_cuda)
        if reduced.is_cuda:  # made on another stream, which would use its memory again when it is dropped
            reduced.record_stream(torch.cuda.current_stream())

    return hook


class _Moves:
    """FSDP2 asks for memory, then for a collective between two such pieces, which goes through our door."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Moves):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return gather_into(output_tensor, input_tensor, self.group, async_op)


class _Scatter(_Moves):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.SUM:
            raise AssertionError(f"gradients are sums here, FSDP2 asks for {op}")
        return reduce_scatter_into(output_tensor, input_tensor, self.group, async_op)
