"""Training runs that others published, as layouts, models and seconds of a step: llm-foundry's and torchtitan's tables.

The tables lie in the folder of the validation data (`benchmarks.fit_curves.data_folder`); they are no part of the
project. `work_of` says what a rank does in such a step, from which a profile predicts its time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.fit_curves import Row, read
from tessera.models.config import ModelConfig
from tessera.models.shapes import shape_of
from tessera.plan.calibrate import Run, place_of
from tessera.plan.choice import Layout, Training
from tessera.plan.work import step_work

PER_MACHINE = 8
"""Devices of a machine in all of these runs."""
MPT: Mapping[str, tuple[int, int, int]] = {
    "125m": (768, 12, 12),
    "350m": (1024, 16, 24),
    "760m": (1536, 12, 24),
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
"""Width, heads and layers: llm-foundry scripts/train/yamls/pretrain/mpt-*.yaml."""
MPT_VOCABULARY = 50368
GPUS: Mapping[str, str] = {"H100": "h100_80gb", "A100-80": "a100_80gb", "A100-40": "a100_40gb"}
"""llm-foundry's name of a profile's device."""
LLAMA: Mapping[str, str] = {
    "Llama-2-70B": "meta-llama/Llama-2-70b-hf",
    "Llama-3-70B": "meta-llama/Llama-3.1-70B",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Llama-3.1-405B",
}
"""torchtitan's name of a model, and one of the same sizes in the package."""
RECOMPUTES = {"full": "true", "selective": "selective", "selective op": "selective"}
"""torchtitan's checkpointing, and the nearest here: its selective one keeps some products' results too."""


@dataclass(frozen=True)
class Published:
    """A run: of which model and training, in which layout, in how many seconds a step."""

    name: str
    model: ModelConfig
    layout: Layout
    training: Training
    seconds: float

    def run(self) -> Run:
        """It as calibration takes it: the work of rank 0, which is the longest."""
        parallel = self.layout.parallel(self.model, self.training)
        shape = self.layout.shape(self.training, parallel)
        work = step_work(self.model, shape, parallel, PER_MACHINE)
        return Run(work, tuple(map(float, place_of(self.model, shape, parallel)[0])), self.seconds)


def gpt(width: int, heads: int, layers: int, length: int, vocabulary: int = 51200) -> ModelConfig:
    """A GPT as Megatron has them, and llm-foundry: LayerNorm, GELU, biases, learned positions, tied embeddings."""
    return ModelConfig(
        family="gpt2",
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_size=4 * width,
        max_positions=length,
        norm="layer",
        activation="gelu",
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied=True,
    )


def llm_foundry(device: str) -> list[Published]:
    """The runs of the profile `device` in llm_foundry_throughput.csv, bfloat16 or its autocast, FSDP alone."""
    rows = [row for row in read("llm_foundry_throughput.csv") if row["gpu"] == GPUS[device]]
    return [_llm_foundry(row) for row in rows if not row["precision"].endswith("fp8")]


def mpt(row: Row) -> ModelConfig:
    """The model of a row of llm_foundry_throughput.csv: as many positions as a row of its tokens has."""
    return gpt(*MPT[row["model"]], int(row["seq_len"]), MPT_VOCABULARY)


def _llm_foundry(row: Row) -> Published:
    """`microbatch` rows on a device, `grad_accum` of these a step; SHARD_GRAD_OP keeps what it gathered."""
    ranks, length = int(row["gpus"]), int(row["seq_len"])
    layout = Layout(
        {"shard": ranks},
        int(row["microbatch"]),
        int(row["grad_accum"]),
        recompute="true" if row["act_ckpt"] == "True" else "false",
        reshard=row["sharding"] == "FULL_SHARD",
    )
    rows = layout.micro_batch * layout.micro_batches * ranks
    assert rows == int(row["global_batch_seqs"]), row
    name = f"{row['model']}, {length} tokens, {ranks} GPUs, {layout.micro_batch} rows × {layout.micro_batches}"
    return Published(name, mpt(row), layout, Training(length, rows), rows * length / float(row["tokens_per_s"]))


def torchtitan(device: str) -> list[Published]:
    """The runs in bfloat16 without stages and without shared sequences of an `A100` or `H100` in torchtitan.csv."""
    rows = [row for row in read("torchtitan.csv") if device in row["gpu"] and row["float8"] == "0"]
    return [_torchtitan(row) for row in rows if row["pp"] == row["cp"] == "1"]


def _torchtitan(row: Row) -> Published:
    shards, columns, batch, length = (int(row[key]) for key in ("fsdp", "tp", "local_batch", "seq_len"))
    sizes = {axis: size for axis, size in (("shard", shards), ("col", columns)) if size > 1}
    layout = Layout(sizes, batch, 1, recompute=RECOMPUTES[row["ac"]])
    compiled = {"0": "not compiled", "1": "compiled", "": "not said whether compiled"}[row["compile"]]
    tensor = f"async TP {columns}" if row["async_tp"] == "1" else f"TP {columns}"
    name = f"{row['model']}, {length} tokens, {row['gpus']} GPUs, FSDP {shards} × {tensor}, {compiled}"
    seconds = batch * length / (columns * float(row["tps_per_gpu"]))
    return Published(name, shape_of(LLAMA[row["model"]]), layout, Training(length, batch * shards), seconds)
