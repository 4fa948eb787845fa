"""What a rank holds against the length of its row, by formula: `python benchmarks/sequence_memory.py`.

Beside it stands an often-quoted table, of 8 tensor ranks: without sequence parallelism 32K tokens in about 60 GB at 45%
MFU, with Megatron's 128K in about 15 GB at 58%, with a ring 1M in about 8 GB at 55%. It names no model, no batch, no
degree of the ring and nothing of recompute. Assumed here: Llama 3 8B's shape; one row of one document; float32
parameters, gradients and AdamW moments, products in bfloat16; attention without a matrix of scores; FSDP2 over the
ring; with and without gradient checkpointing. The peak is the estimate of plan/peak.py: not counted are the CUDA
context, NCCL's buffers and the keys and values of other ranks. Of MFU no such formula says anything. GB are 10^9 bytes.
`--counted none "ring 16"` runs the steps of these ways on tensors without data, which takes from one to twenty minutes
each, and prints the peak of live tensors.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.count import counted_step
from tessera.plan.peak import Peak, peak_bytes
from tessera.sizes.context import ContextParallel
from tessera.sizes.rules import TensorParallel

TENSOR = 8
LLAMA_3_8B = ModelConfig(
    "llama",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    max_positions=2**20,
    rope=RopeConfig(theta=500000.0),
)


@dataclass(frozen=True)
class Way:
    """A way to cut a row beside 8 tensor ranks, and what the quoted table says of it."""

    name: str
    ring: int = 1
    sequence_parallel: bool = True
    tokens: int = 0
    claim: str = "—"

    @property
    def parallel(self) -> Parallel:
        """The layouts of rank 0."""
        mesh = Mesh({"ring": self.ring, "col": TENSOR}, rank=0)
        tensor = TensorParallel("1d", TENSOR, sequence_parallel=self.sequence_parallel)
        context = ContextParallel(self.ring, "ring", 1)
        return parallel_of(tensor, mesh, 1, LLAMA_3_8B.dimensions, compute=torch.bfloat16, context=context)

    def peak(self, tokens: int, recompute: bool) -> Peak:
        """Of a rank, with a row of so many tokens."""
        return peak_bytes(LLAMA_3_8B, StepShape(1, tokens, recompute=recompute), self.parallel)

    def counted(self, recompute: bool) -> int:
        """Bytes of live tensors at the peak of the quoted length's step."""
        return counted_step(LLAMA_3_8B, StepShape(1, self.tokens, recompute=recompute), self.parallel).memory.peak


WAYS = (
    Way("none", sequence_parallel=False, tokens=2**15, claim="~60 GB, 45%"),
    Way("Megatron SP", tokens=2**17, claim="~15 GB, 58%"),
    *(Way(f"ring {n}", n, tokens=2**20, claim="~8 GB, 55%") for n in (8, 16, 32, 64)),
)


def lines() -> Iterator[str]:
    """The table, at the lengths that are quoted."""
    yield "| way | devices | tokens | quoted | recompute | states GB | saved GB | gathered GB | working GB | peak GB |"
    yield f"{'|---' * 10}|"
    for way in WAYS:
        for recompute in (False, True):
            peak = way.peak(way.tokens, recompute)
            held = (peak.states, peak.activations, peak.gathered, peak.working, peak.total)
            told = " | ".join(f"{part / 1e9:.1f}" for part in held)
            again = "yes" if recompute else "no"
            yield f"| {way.name} | {TENSOR * way.ring} | {way.tokens:,} | {way.claim} | {again} | {told} |"


def draw(path: str) -> None:
    """Peak against tokens, a line for each way: with recompute dashed; circles are what the table claims."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    quoted = {"none": 60, "Megatron SP": 15, "ring 16": 8}
    with pyplot.rc_context({"svg.hashsalt": "tessera", "font.size": 9}):
        figure, pane = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for number, way in enumerate(WAYS):
            tokens = [2**n for n in range(13, 21)]
            for recompute, style in ((False, "-"), (True, "--")):
                peaks = [way.peak(length, recompute).total / 1e9 for length in tokens]
                pane.plot(tokens, peaks, style, color=f"C{number}", label=None if recompute else way.name)
            if way.name in quoted:
                pane.plot(way.tokens, quoted[way.name], "o", color=f"C{number}", mfc="none")
        pane.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="peak GB of a rank, by formula")
        pane.set_xticks([2**n for n in range(13, 21)], [f"{2 ** (n - 10)}K" for n in range(13, 21)])
        pane.set_title("Llama 3 8B's shape, TP 8; dashed: recompute; circles: quoted elsewhere", fontsize=9)
        pane.minorticks_off()
        pane.grid(alpha=0.3)
        pane.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, and draw it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", default="")
    parser.add_argument("--counted", nargs="+", default=[], choices=[way.name for way in WAYS], help="names of ways")
    arguments = parser.parse_args()
    for line in lines():
        print(line)
    if arguments.plot:
        draw(arguments.plot)
    for way in WAYS:
        for recompute in (False, True) if way.name in arguments.counted else ():
            told = f"{way.name}, {'with' if recompute else 'without'} recompute"
            print(f"{told}: {way.counted(recompute) / 1e9:.1f} GB counted")


if __name__ == "__main__":
    main()
