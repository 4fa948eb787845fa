"""The layouts of 1D, 2D, 2.5D and 3D said in torch's DTensor: sharded parameters, matmul, explicit `redistribute`.

axis     column layer: x → y                      row layer: x → y
depth    tokens                                   tokens
row      tokens; W gathered                       tokens; W gathered
col      x from tokens gathered; y by features    x by features; y summed, scattered over tokens
inner    x by features; y summed and scattered    x from tokens gathered; y by features
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

AXES = ("inner", "depth", "row", "col")


class Linear(nn.Module):
    """One layer whose W [out, in] is stored with `stored` and multiplied as `gathered` (placements by mesh dim)."""

    def __init__(self, whole: Tensor, mesh: DeviceMesh, column: bool) -> None:
        super().__init__()
        names = mesh.mesh_dim_names or ()
        outer, inner = ("col", "inner") if column else ("inner", "col")
        stored: dict[str, Placement] = {outer: Shard(0), inner: Shard(1), "row": Shard(1 if column else 0)}
        self.gathered = [Replicate() if n == "row" else stored.get(n, Replicate()) for n in names]
        moved: dict[str, Placement] = {"depth": Shard(0), "row": Shard(0), outer: Replicate(), inner: Shard(1)}
        left: dict[str, Placement] = {"depth": Shard(0), "row": Shard(0), outer: Shard(1), inner: Shard(0)}
        self.moved, self.left = [moved[n] for n in names], [left[n] for n in names]
        self.weight = nn.Parameter(distribute_tensor(whole, mesh, [stored.get(n, Replicate()) for n in names]))

    def forward(self, x: DTensor) -> DTensor:
        weight = self.weight.redistribute(placements=self.gathered)  # type: ignore[attr-defined]
        y = x.redistribute(placements=self.moved) @ weight.T
        return y.redistribute(placements=self.left)


class MLP(nn.Module):
    """x + W₂ gelu(W₁ x)."""

    def __init__(self, up: Tensor, down: Tensor, mesh: DeviceMesh) -> None:
        super().__init__()
        self.up, self.down = Linear(up, mesh, column=True), Linear(down, mesh, column=False)

    def forward(self, x: DTensor) -> DTensor:
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """Layers of `weights` (up, down) on a mesh with these axis sizes; takes and gives this rank's residual shard."""

    def __init__(self, weights: list[tuple[Tensor, Tensor]], sizes: dict[str, int]) -> None:
        super().__init__()
        names = tuple(axis for axis in AXES if sizes.get(axis, 1) > 1)
        ranks = torch.arange(torch.distributed.get_world_size()).reshape([sizes[n] for n in names])
        self.mesh = DeviceMesh("cpu", ranks, mesh_dim_names=names)
        self.residual = [Shard(1) if n == "inner" else Shard(0) for n in names]
        self.layers = nn.ModuleList(MLP(up, down, self.mesh) for up, down in weights)

    def forward(self, shard: Tensor) -> Tensor:
        x = DTensor.from_local(shard, self.mesh, self.residual, run_check=False)
        for layer in self.layers:
            x = layer(x)
        return x.to_local()
