"""Random layouts of models of real widths, whose peak by formula is compared with that of the traced step."""

import random
from dataclasses import dataclass, replace

import torch

from distributed.model_cases import GPT2, LLAMA
from support.mesh import shared_mesh
from tessera.core.errors import UserError
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.resolve import check_layout, parallel_of
from tessera.layout.shape import Fsdp, Savers, StepShape, length_multiple
from tessera.models.config import LayerKind, ModelConfig
from tessera.plan.count import batches_of, make_state
from tessera.sizes.context import ContextParallel
from tessera.sizes.rules import TensorParallel

MESHES = [
    ("1d", {}),
    ("1d", {"col": 2}),
    ("1d", {"col": 8}),
    ("2d", {"row": 2, "col": 2}),
    ("2d", {"row": 2, "col": 4}),
    ("2d", {"row": 4, "col": 4}),
    ("2.5d", {"depth": 2, "row": 2, "col": 2}),
    ("3d", {"inner": 2, "row": 2, "col": 2}),
    ("3d", {"inner": 2, "row": 1, "col": 4}),
]
DTYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


@dataclass(frozen=True)
class PeakCase:
    """One rank's step; `offload`: FSDP2 keeps its states on the host."""

    model: ModelConfig
    shape: StepShape
    tensor: TensorParallel
    sizes: dict[str, int]
    context: ContextParallel
    dtype: torch.dtype
    compute: torch.dtype
    offload: bool = False

    @property
    def served(self) -> bool:
        """Whether FSDP2 has the parameters in its hands."""
        return bool({"replicate", "shard", "ring", "ulysses"} & set(self.sizes))

    def parallel(self, mesh: Mesh) -> Parallel:
        dtypes = self.dtype, self.compute
        return parallel_of(
            self.tensor, mesh, self.shape.batch, self.model.dimensions, None, *dtypes, context=self.context
        )

    def __str__(self) -> str:
        tensor, shape, model = self.tensor, self.shape, self.model
        words = [model.family, " ".join(f"{axis}{size}" for axis, size in self.sizes.items()) or "alone"]
        words += [f"slices {tensor.slices}" if tensor.slices > 1 else tensor.schedule]
        words += ["keep"] * tensor.keep_gathered + ["no-sp"] * (not tensor.sequence_parallel)
        words += ["no-prefetch"] * (not tensor.prefetch) + ["no-defer"] * (not tensor.defer)
        words += [f"{shape.micro_batches}×{shape.batch}×{shape.sequence}", str(self.compute).removeprefix("torch.")]
        words += ["pure"] * (self.dtype == self.compute) + ["recompute"] * shape.recompute
        words += ["tied"] * model.tied + ["documents"] * bool(shape.documents) + ["qk-norm"] * model.qk_norm
        words += ["windows"] * (len(model.layer_kinds) > 1) + ["offload"] * self.offload
        words += ["each batch"] * (shape.sync_each_batch and shape.micro_batches > 1 and self.served)
        words += ["kept weights"] * (not shape.reshard) + ["all at once"] * (not shape.by_layer)
        words += [f"{self.context.mode} in {self.context.chunks}"] if self.context.size > 1 else []
        return " ".join([*words, str(shape.savers) if shape.savers != Savers() else ""])


def random_case(seed: int) -> PeakCase:
    """The layout number `seed`: what is drawn anew until it fits. Every other has few words: its loss takes little."""
    dice = random.Random(seed)
    while True:
        case = _drawn(dice)
        if case is not None:
            if dice.random() < 0.3:  # which means something to FSDP2 with several micro-batches alone
                case = replace(case, shape=replace(case.shape, sync_each_batch=True))
            return replace(case, model=replace(case.model, vocab_size=4096)) if seed % 2 else case


def _drawn(dice: random.Random) -> PeakCase | None:
    model = _model(dice)
    mode, mesh = dice.choice(MESHES)
    schedule = dice.choice(["gather", "gather", "gather", "slices", "summa", "cannon"])
    in_slices = schedule == "slices"
    tensor = TensorParallel(
        mode,
        mesh={"inner": 1, "depth": 1, "row": 1, "col": 1} | mesh,
        schedule="gather" if in_slices else schedule,
        slices=dice.choice([2, 4]) if in_slices else 1,
        keep_gathered=schedule == "gather" and dice.random() < 0.25,
        sequence_parallel=schedule in ("summa", "cannon") or dice.random() < 0.75,
        prefetch=schedule != "gather" or dice.random() < 0.6,
        defer=schedule != "gather" or dice.random() < 0.6,
        depth_weights="shard" if "depth" in mesh and dice.random() < 0.3 else "replicate",
    )
    data = {}
    if dice.random() < 0.55:
        data = dice.choice([{"shard": 2}, {"shard": 8}, {"replicate": 2, "shard": 2}, {"replicate": 2}])
    context = ContextParallel()
    if dice.random() < 0.35:
        size, ulysses = dice.choice([(2, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
        chunks = dice.choice([1, 2]) if ulysses > 1 else 1
        context = ContextParallel(size, dice.choice(["exchange", "ring"]), ulysses, chunks)
    sizes = {axis: n for axis, n in (data | context.sizes | mesh).items() if n > 1}
    shape = _shape(dice, model)
    dtype, compute = dice.choice(DTYPES)
    case = PeakCase(model, shape, tensor, sizes, context, dtype, compute)
    case = replace(case, offload=case.served and dice.random() < 0.15)
    return case if _fits(case) else None


def _model(dice: random.Random) -> ModelConfig:
    width, head = dice.choice([1024, 2048, 4096]), dice.choice([64, 128])
    heads = width // head
    changed = {
        "vocab_size": dice.choice([32000, 50257, 128256]),
        "hidden_size": width,
        "num_layers": dice.choice([2, 3]),
        "num_heads": heads,
        "head_dim": head,
        "ffn_size": dice.choice([width * 11 // 4, 4 * width]),
        "max_positions": 8192,
        "tied": dice.random() < 0.4,
    }
    if dice.random() < 0.7:
        kinds = (
            (LayerKind(1024), LayerKind(), LayerKind())[: changed["num_layers"]]
            if dice.random() < 0.15
            else (LayerKind(),)
        )
        return replace(
            LLAMA,
            **changed,
            num_kv_heads=heads // dice.choice([1, 4, 8]),
            qk_norm=dice.random() < 0.2,
            layer_kinds=kinds,
        )
    dropped = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
    return replace(GPT2, **changed, num_kv_heads=heads, head_bias=not changed["tied"], **dropped)


def _shape(dice: random.Random, model: ModelConfig) -> StepShape:
    batch, sequence = dice.choice([1, 2, 4, 8]), dice.choice([1024, 2048, 4096, 8192])
    micro_batches = dice.choice([1, 1, 2])
    again = dice.choice(["", "", "true", "selective", "offload"])
    documents = ()
    if dice.random() < 0.3:
        documents = tuple(_starts(dice, batch, sequence) for _ in range(micro_batches))
    return StepShape(
        batch,
        sequence,
        micro_batches,
        recompute=again != "",
        label_smoothing=dice.random() < 0.2,
        reshard=dice.random() < 0.75,
        by_layer=dice.random() < 0.9,
        savers=Savers(again == "selective", again == "offload", dice.choice([1, 1, 1, None, 4])),
        documents=documents,
    )


def _starts(dice: random.Random, batch: int, sequence: int) -> tuple[int, ...]:
    """Where documents of a few hundred tokens and more begin in rows that they fill."""
    starts = []
    for row in range(batch):
        first = 0
        while first < sequence:
            starts.append(row * sequence + first)
            first += dice.randrange(200, sequence)
    return tuple(starts)


def _fits(case: PeakCase) -> bool:
    shape, axes = case.shape, case.tensor.axes
    data = {axis: n for axis, n in case.sizes.items() if axis not in axes}
    if shape.tokens > 32768:
        return False
    try:
        check_layout(case.tensor, data, case.model.dimensions, shape.batch)
    except UserError:
        return False
    parallel = case.parallel(Mesh(case.sizes, rank=0))
    if shape.sequence % length_multiple(shape.batch, parallel.residual, parallel.mesh):
        return False
    heads = case.model.num_heads // parallel.mesh.size(parallel.attention.features)
    ulysses = case.sizes.get("ulysses", 1)
    return heads % (ulysses * case.context.chunks) == 0


def peak_of_real_rank(case: PeakCase) -> int:
    """On a rank of a pool: the tracked peak of any step but the first."""
    mesh, shape = shared_mesh(case.sizes), case.shape
    parallel = case.parallel(mesh)
    with PeakMemory() as memory:
        fsdp = Fsdp(shape.reshard, by_layer=shape.by_layer, sync_each_batch=shape.sync_each_batch)
        decoder = build_decoder(case.model, parallel, fsdp, gradient_checkpointing=shape.recompute, savers=shape.savers)
        decoder.initialize(seed=5)
        optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.1)
        step, batches = Step(decoder, optimizer, max_grad_norm=1.0), batches_of(shape)
        make_state(decoder, optimizer)
        step(batches, 0, 1e-3)  # which learns the order of weights, and makes what FSDP2 keeps
        optimizer.zero_grad(set_to_none=True)
        memory.peak = memory.current
        step(batches, 1, 1e-3)
    return memory.peak
