"""Parallel: what every layer of one model shares of its layout."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.distributed.device_mesh import DeviceMesh

from tessera.core.axes import AXES, MODEL_AXES
from tessera.core.mesh import Mesh
from tessera.layout.context import Context
from tessera.layout.streams import HIDDEN, Layout, LinearPlan, Streams, column_parallel, row_parallel
from tessera.product.overlap import Overlap
from tessera.sizes.schedule import Schedule


@dataclass(frozen=True)
class Parallel:
    """What every layer of one model shares: the mesh, the layouts of the streams, the schedule and the dtypes.

    Parameters are held in `dtype`; products run in `compute` (bf16 over fp32 parameters, or the same). `attention` is
    the hidden stream inside attention; `weights_over` the token axes along which weights are stored cut, and gathered
    by the products; `overlap` moves weights early and their gradients late. `fsdp`, where data or sequence
    axes are above 1, are the axes over which FSDP2 stores parameters cut (engine/fsdp.py); it gathers them layer by
    layer. `context` says how attention reaches keys and values where several ranks share a sequence.
    """

    mesh: Mesh
    residual: Layout
    dtype: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    schedule: Schedule = Schedule()
    attention: Layout = HIDDEN
    weights_over: tuple[str, ...] = ("row",)
    overlap: Overlap = field(default_factory=Overlap, compare=False)
    fsdp: tuple[str, ...] | None = None
    context: Context = Context()

    @property
    def streams(self) -> Streams:
        """The layouts of the streams, as one value."""
        return Streams(self.residual, self.attention)

    @property
    def owners(self) -> tuple[str, ...]:
        """The axes along which ranks own parts of one stream of tokens, the first major: in the order of a group."""
        joined = self.attention.tokens if self.context.joined else ()
        return tuple(axis for axis in AXES if axis == "ring" or axis in joined)

    @property
    def cuts_sequences(self) -> bool:
        """Whether a rank has a part of each sequence alone."""
        return bool(self.mesh.present(("ulysses", *self.owners)))

    @property
    def served(self) -> tuple[str, ...]:
        """The axes along which FSDP2 sums every gradient: all that cut the batch, but for those of `weights_over`."""
        tokens = (*self.streams.batch, *self.streams.ids)
        return () if self.fsdp is None else tuple(axis for axis in tokens if axis not in self.weights_over)

    @cached_property  # torch takes half a millisecond to cut one out of another, and every parameter asks
    def device_mesh(self) -> DeviceMesh | None:
        """Where parameters are DTensors before FSDP2 has cut them; None where they are plain tensors."""
        if self.fsdp is None:
            return self.mesh.device_mesh
        axes = self.parameter_axes
        return self.data_mesh[axes] if axes else None

    @property
    def parameter_axes(self) -> tuple[str, ...]:
        """The model axes above size 1 that FSDP2 leaves to the layers. It takes at most two."""
        return tuple(axis for axis in self.mesh.present(MODEL_AXES) if axis not in self.served)

    @property
    def data_mesh(self) -> DeviceMesh:
        """All ranks: the replicas, the axes `fsdp` as one dim, and the parameters' axes."""
        assert self.fsdp is not None
        return self.mesh.arranged([self.fsdp, *((axis,) for axis in self.parameter_axes)])

    def column(self, hidden: Layout = HIDDEN) -> LinearPlan:
        """The plan of a column-parallel layer, residual → hidden."""
        return column_parallel(self.residual, hidden, self.weights_over)

    def row(self, hidden: Layout = HIDDEN) -> LinearPlan:
        """The plan of a row-parallel layer, hidden → residual."""
        return row_parallel(self.residual, hidden, self.weights_over)
