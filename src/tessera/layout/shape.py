"""The shape of a step: what one data rank runs, padded so that its tokens divide, and what FSDP2 is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from tessera.core.arrays import common_divisor, common_multiple
from tessera.core.axes import SEQUENCE_AXES
from tessera.core.mesh import Mesh
from tessera.layout.streams import HIDDEN, Layout


def padded_length(length: int, batch: int, residual: Layout, mesh: Mesh) -> int:
    """Sequences of `length` tokens, padded so that the tokens of `batch` of them divide over both streams."""
    return length + -length % length_multiple(batch, residual, mesh)


def length_multiple(batch: int, residual: Layout, mesh: Mesh) -> int:
    """What sequence lengths must be a multiple of, so that the tokens of `batch` sequences divide over both streams."""
    cuts = (mesh.size((*SEQUENCE_AXES, *layout.tokens)) for layout in (residual, HIDDEN))
    return common_multiple(*(ranks // common_divisor(ranks, batch) for ranks in cuts))


@dataclass(frozen=True)
class Fsdp:
    """What FSDP2 can be asked for.

    `reshard`: a layer's weights are dropped after its forward and gathered again for its backward, else kept for it;
    `prefetch`: the next layer's are gathered before this one's forward has been issued; `offload`: parameters,
    gradients and optimizer live in host memory; `by_layer`: each decoder layer is gathered by itself, else all at once;
    `sync_each_batch`: gradients are summed after every micro-batch: no whole ones are kept until the step's last.
    """

    reshard: bool = True
    prefetch: bool = False
    offload: bool = False
    by_layer: bool = True
    sync_each_batch: bool = False


@dataclass(frozen=True)
class Savers:
    """How layers get by with less memory between their forward and their backward; the numbers stay.

    `attention_once`: a layer that is computed again takes attention's result from its first run. `offload`: what layers
    keep for their backward lies in host memory. `mlp_tiles`: the MLP goes over its tokens in so many parts, which its
    backward computes again one by one; None: as many as `nn.mlp.tiles_of` says.
    """

    attention_once: bool = False
    offload: bool = False
    mlp_tiles: int | None = 1


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step runs on a data rank: `micro_batches` of `batch` sequences of `sequence` tokens (padded).

    `reshard`, `by_layer` and `sync_each_batch` are those of `Fsdp`; `recompute`: each layer runs again in its backward.
    `documents` has of each micro-batch the tokens, counted row after row, at which documents begin; empty: every row is
    one.
    """

    batch: int
    sequence: int
    micro_batches: int = 1
    recompute: bool = False
    label_smoothing: bool = False
    chunk_tokens: int = 1024  # of the loss, see nn/loss.py
    reshard: bool = True
    by_layer: bool = True
    sync_each_batch: bool = False
    savers: Savers = Savers()
    documents: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def document_starts(self) -> tuple[tuple[int, ...], ...]:
        """Of each micro-batch, at which of its tokens documents begin, as `MicroBatch.document_starts` has them."""
        return self.documents or (tuple(range(0, self.tokens, self.sequence)),) * self.micro_batches

    def tokens_on(self, mesh: Mesh, axes: Iterable[str]) -> int:
        """The tokens of a micro-batch on a rank, where `axes` cut them beside the sequence axes."""
        return self.tokens // mesh.size((*SEQUENCE_AXES, *axes))
