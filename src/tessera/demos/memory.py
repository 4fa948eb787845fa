"""`tessera demo-memory`: what tensor parallelism saves in memory, and that the loss does not depend on it.

The sequence-memory experiment: 100 fixed random sequences of 32 tokens, each position's target its own token, attention
not causal, a GPT-2-like model of 18.4M parameters, Adam, 500 steps; run afresh on 1, 2 and 4 ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record

from tessera.core import device as devices
from tessera.core import terminal
from tessera.core.errors import RunFailed, UserError
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.launch.rank import die_with_parent
from tessera.launch.scratch import scratch
from tessera.launch.workers import run_workers
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import parameter_elements

VOCABULARY, SEQUENCES, LENGTH, BATCH, STEPS, RATE = 1024, 100, 32, 16, 500, 3e-4
LOSS_TO_REACH = 0.0013
FIRST_TOLERANCE, TOLERANCE = 1e-5, 1e-3  # relative differences of losses between rank counts: first step, every step

# Infrasys-AI/AIInfra, "Megatron tensor parallelism reproduction", on 1, 2 and 4 GPUs: peak MB, parameters a rank (M),
# first and final loss (the initialisation there depended on the number of ranks).
PUBLISHED = {
    1: (407, 18.4, 7.26, "0.0012-0.0013"),
    2: (256, 9.47, 7.45, "0.0012-0.0013"),
    4: (180, 5.01, 7.62, "0.0012-0.0013"),
}


def experiment_model(causal: bool) -> ModelConfig:
    """LayerNorm, GELU, biases, 1024 learned positions, untied head with bias: 18,397,184 parameters."""

    return ModelConfig(
        family="gpt2",
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        ffn_size=1024,
        max_positions=1024,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        head_bias=True,
        causal=causal,
    )


def experiment_batches(causal: bool, steps: int) -> list[MicroBatch]:
    """The batches of every step, drawn from one seed: the same whatever the ranks."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    batches = []
    for _ in range(steps):
        ids = sequences[torch.randint(0, SEQUENCES, (BATCH,), generator=generator)]
        targets = ids
        if causal:
            targets = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1)
        batches.append(MicroBatch(ids, targets, int((targets >= 0).sum())))
    return batches


def run_rank(causal: bool, steps: int, folder: Path) -> None:
    """The experiment on this rank; leaves rank-R.json in `folder`."""
    die_with_parent()
    device = devices.local_device()
    dist.init_process_group(devices.backend(device))
    mesh = Mesh({"col": dist.get_world_size()}, device)
    batches = experiment_batches(causal, steps)
    with PeakMemory() as memory:
        model = Decoder(experiment_model(causal), Parallel(mesh, residual_layout(True)))
        model.initialize(seed=42)
        step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.999), 1e-8, 0.0), max_grad_norm=1.0)
        shown = track(batches, f"{mesh.world} rank(s)", console=terminal.console(), disable=mesh.rank != 0)
        losses = [step([batch], index, RATE).loss for index, batch in enumerate(shown)]
    result = {"parameters": parameter_elements(model), "peak": memory.peak, "losses": losses}
    (folder / f"rank-{mesh.rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run_world(ranks: int, causal: bool, steps: int = STEPS) -> dict[str, Any]:
    """The experiment on `ranks` processes of this machine: the largest rank's parameters and peak, and the losses."""

    with scratch() as folder:
        run_workers(["-P", "-m", "tessera.demos.memory", str(int(causal)), str(steps), folder], ranks)
        results = [json.loads(file.read_text()) for file in Path(folder).glob("rank-*.json")]
    largest = {key: max(r[key] for r in results) for key in ("parameters", "peak")}
    return {**largest, "losses": results[0]["losses"]}


def differences(results: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Relative differences of the losses from the first rank count's: at the first step, and the worst of all steps."""
    reference, *others = [r["losses"] for r in results.values()]
    relative = [[abs(a - b) / b for a, b in zip(losses, reference, strict=True)] for losses in others]
    return max((r[0] for r in relative), default=0.0), max((max(r) for r in relative), default=0.0)


def demo_memory(ranks: str, causal: bool) -> None:
    """Run the experiment on each of `ranks`, print the table; exits with 1 when the curves or the loss are off."""
    try:
        counts = [int(word) for word in ranks.split(",")]
    except ValueError:
        counts = []
    if not counts or any(count < 1 or 8 % count for count in counts):
        raise UserError("--ranks", ranks, "are the rank counts of the experiment", "any of 1, 2, 4, 8: the heads are 8")
    devices.stay_on_cpu_without_gpus(max(counts))
    console = terminal.console()
    results = {count: run_world(count, causal) for count in counts}
    console.print(table(results, causal))
    first, every = differences(results)
    final = max(r["losses"][-1] for r in results.values())
    console.print(f"losses across rank counts differ by at most {first:.1e} at step 1 and {every:.1e} at any step")
    if first > FIRST_TOLERANCE or every > TOLERANCE:
        raise RunFailed(f"that is more than {FIRST_TOLERANCE:.0e} and {TOLERANCE:.0e}")
    if not causal and final > LOSS_TO_REACH:
        raise RunFailed(f"the final loss {final:.5f} is above {LOSS_TO_REACH}")
    for count in PUBLISHED.keys() & results.keys() if counts[0] == 1 else ():
        saved, parameters = 1 - results[count]["peak"] / results[1]["peak"], results[count]["parameters"]
        if saved < 1 - PUBLISHED[count][0] / PUBLISHED[1][0] or round(parameters / 1e6, 2) > PUBLISHED[count][1]:
            raise RunFailed(f"{count} ranks save {saved:.0%} with {parameters:,} parameters each: less than published")


def table(results: dict[int, dict[str, Any]], causal: bool) -> Table:
    """Ours, and below each line the published figures of the same experiment."""

    title = f"Sequence memory, {'causal, ' if causal else ''}{STEPS} steps of {BATCH} × {LENGTH} tokens, Adam {RATE}"
    shown = Table(title=title, caption="published: Infrasys-AI/AIInfra, Megatron tensor parallelism reproduction, GPUs")
    for heading in ("ranks", "", "parameters", "peak MB", "saved", "1st loss", "final loss"):
        shown.add_column(heading, justify="right")
    base = next(iter(results.values()))["peak"]
    for count, result in results.items():
        peak, losses = result["peak"], result["losses"]
        ours = [f"{result['parameters']:,}", f"{peak / 1e6:.0f}", f"{1 - peak / base:.0%}"]
        shown.add_row(str(count), "here", *ours, f"{losses[0]:.4f}", f"{losses[-1]:.5f}")
        if count in PUBLISHED and not causal:
            published_peak, millions, first, final = PUBLISHED[count]
            saved = f"{1 - published_peak / PUBLISHED[1][0]:.0%}"
            shown.add_row("", "published", f"{millions}M", str(published_peak), saved, str(first), final, style="dim")
    return shown


if __name__ == "__main__":
    record(run_rank)(sys.argv[1] == "1", int(sys.argv[2]), Path(sys.argv[3]))
