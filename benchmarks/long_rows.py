"""Long rows on one GPU: errors of its attention kernels, tokens a second, and the longest row that fits.

`python benchmarks/long_rows.py` takes at most ten minutes (`--parts longest` is best run by itself); `--tiny` goes
through the same on any device, in half a minute of one core. Three parts:

- `kernels`: attention in bfloat16, result, log-sum-exp and gradients, against the formula in float64 on the CPU: the
  norm of the difference over the norm. Grouped heads, packed documents, windows, soft caps, tiles of several blocks.
- `rates`: steps of 16 layers of Llama 3 8B's shape on one row of each length, with the first saver of `SAVERS` that
  fits; MFU counts causal attention at half (benchmarks/stack.py).
- `longest`: for each saver the row whose step fills 90% of the memory, as it is counted without running
  (tessera.plan.count); a step of that row proves it, where there is time left.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from benchmarks.stack import flops_per_token
from tessera.core import device as devices
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Savers, StepShape
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.attend import attend
from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.tiles import tiles
from tessera.nn.documents import Documents
from tessera.nn.kernels.explicit import explicit
from tessera.nn.mask import Mask
from tessera.nn.rope import RopeConfig
from tessera.plan.count import counted_step

Saver = tuple[bool, Savers]  # whether layers run again in the backward, and what else saves memory

SAVERS: dict[str, Saver] = {
    "none": (False, Savers()),
    "gradient_checkpointing: selective": (True, Savers(attention_once=True)),
    "gradient_checkpointing: true": (True, Savers()),
    "and tiled_mlp": (True, Savers(mlp_tiles=None)),
    "gradient_checkpointing: offload, tiled_mlp": (True, Savers(offload=True, mlp_tiles=None)),
}
HEADS = [(8, 8), (8, 2), (8, 1), (6, 3)]
BF16 = torch.bfloat16


# --- kernels


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of each pair the norm of the difference over that of the second, in float64."""
    pairs = zip((x.detach().cpu().double() for x in found), wanted, strict=True)
    return [float((x - y).norm() / y.norm()) for x, y in pairs]


def by_attend(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, mask: Mask, softcap: float | None) -> list[Tensor]:
    """Result, log-sum-exp and gradients of q, k and v, by what `attend` chooses."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, mask, softcap=softcap, with_lse=True)
    out.backward(d_out)
    return [out, lse, *(leaf.grad for leaf in leaves)]


def by_blocks(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, mask: Mask, softcap: float | None) -> list[Tensor]:
    """The same tile by tile, with keys in three blocks, as a transport between ranks delivers them."""
    B, H, S, _ = q.shape
    bounds = mask.documents.bounds if mask.documents else tuple(range(0, B * S + 1, S))
    q, k, v, d_out = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, d_out))
    edges = [0, B * S // 3, B * S * 3 // 4, B * S]
    blocks = [
        (k[first:end], v[first:end], tiles([(0, B * S)], [(first, end)], bounds, mask.window))
        for first, end in zip(edges, edges[1:], strict=False)
    ]
    out, lse = forward_tiles(q, blocks, softcap=softcap)
    dq = torch.zeros_like(q, dtype=lse.dtype)
    parts = [backward_tiles(d_out, q, out, lse, dq, block, softcap=softcap) for block in blocks]
    dk, dv = (torch.cat(each) for each in zip(*parts, strict=True))
    return [x.unflatten(0, (B, S)).transpose(1, 2) for x in (out, lse.T, dq, dk, dv)]


def kernels(device: torch.device, given: argparse.Namespace) -> Iterator[str]:
    """A line for each case: the error of the result, the log-sum-exp, and the largest of the gradients."""
    S, D = given.positions, given.features
    yield "| heads | rows | window | soft cap | by | result | log-sum-exp | gradients |"
    yield f"{'|---' * 8}|"
    for heads in HEADS:
        for packed, window, softcap in (
            (False, None, None),
            (True, None, None),
            (False, S // 8, None),
            (True, S // 8, None),
            (True, None, 1.0),
        ):
            draw = torch.Generator().manual_seed(1)
            shapes = [(2, S, n, D) for n in (heads[0], heads[1], heads[1], heads[0])]
            inputs = [torch.randn(shape, generator=draw).to(BF16).transpose(1, 2) for shape in shapes]
            cuts = torch.tensor([1, S // 3, S // 3 + 1, S - 2]) if packed else torch.tensor([S])
            ids = torch.bucketize(torch.arange(S), cuts, right=True).repeat(2, 1)
            exact = [x.double().requires_grad_() for x in inputs[:3]]
            documents = Documents.of(ids) if packed else None
            out, lse = explicit(*exact, Mask(True, window, documents), None, softcap, None, 0.0, True)
            out.backward(inputs[3].double())
            wanted = [out.detach(), lse, *(leaf.grad for leaf in exact)]
            mask = Mask(True, window, Documents.of(ids.to(device)) if packed else None)
            for name, way in (("attend", by_attend), ("three blocks", by_blocks)):
                found = way(*(x.to(device) for x in inputs), mask, softcap)
                result, sums, *gradients = errors(found, wanted)
                shown = " | ".join(f"{error:.1e}" for error in (result, sums, max(gradients)))
                flag = "" if max(result, sums, *gradients) <= 1e-2 else " ABOVE 1e-2"
                case = f"{heads} | {'documents' if packed else 'whole'} | {window} | {softcap}"
                yield f"| {case} | {name} | {shown}{flag} |"


# --- steps


def step_of(model: ModelConfig, saver: Saver, device: torch.device) -> Callable[[int], float]:
    """What takes a step on a row of so many random tokens, and gives its seconds."""
    again, savers = saver
    parallel = Parallel(Mesh({}, device), residual_layout(True), compute=BF16)
    decoder = Decoder(model, parallel, gradient_checkpointing=again, savers=savers)
    decoder.initialize(seed=0)
    step = Step(decoder, build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.1), max_grad_norm=1.0)

    def run(length: int) -> float:
        ids = torch.randint(0, model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
        begun = time.perf_counter()
        step([MicroBatch(ids[:, :-1], ids[:, 1:], length)], 0, 1e-4)  # reads the loss, so it waits for the device
        return time.perf_counter() - begun

    return run


def peak_of(run: Callable[[int], float], length: int, device: torch.device) -> tuple[float, int]:
    """Seconds of a step, and the most bytes at once: allocated on a GPU, of live tensors made in the step elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return run(length), torch.cuda.max_memory_allocated(device)
    with PeakMemory() as memory:
        seconds = run(length)
    return seconds, memory.peak


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rates(model: ModelConfig, device: torch.device, given: argparse.Namespace, until: float) -> Iterator[str]:
    """A line for each length: the second of two steps, with the first saver that fits."""
    yield "| tokens | saver | s | tokens/s | MFU | peak GiB |\n|---|---|---|---|---|---|"
    names, peak = list(SAVERS), devices.peak_flops(device)
    for length in given.lengths:
        while names:
            try:
                run = step_of(model, SAVERS[names[0]], device)
                run(length)
                seconds, memory = peak_of(run, length, device)
            except torch.OutOfMemoryError:
                names.pop(0)  # longer rows do not fit either
                continue
            finally:
                run = None
                freed()
            rate = length / seconds
            mfu = f"{rate * flops_per_token(model, length) / peak:.1%}" if peak else "—"
            yield f"| {length:,} | {names[0]} | {seconds:.2f} | {rate:,.0f} | {mfu} | {memory / 2**30:.4g} |"
            break
        if time.monotonic() > until or not names:
            return


def longest_row(model: ModelConfig, saver: Saver, room: float, given: argparse.Namespace) -> int:
    """The tokens of a row whose counted peak fills `room` bytes: peaks of long rows lie on a line, nearly."""
    again, savers = saver
    parallel = Parallel(Mesh({}), residual_layout(True), compute=BF16)

    def peak(length: int) -> int:
        return counted_step(model, StepShape(1, length, recompute=again, savers=savers), parallel).memory.peak

    short, length = given.two
    for _ in range(2):
        low, high = peak(short), peak(length)
        short, length = length, int(length + (room - high) * (length - short) / (high - low)) // 1024 * 1024
        if length in (short, 0) or length < 0:
            break
    return max(length, 0)


def longest(model: ModelConfig, device: torch.device, given: argparse.Namespace, until: float) -> Iterator[str]:
    """A line for each saver: the row that fills 90% of the memory by count, and its step."""
    yield "| saver | longest row by count | its step | peak GiB |\n|---|---|---|---|"
    room = (devices.memory_bytes(device) or given.memory) * 0.9
    speed = None  # operations a second, of the step before
    for name, saver in SAVERS.items():
        if time.monotonic() > until:
            return
        length = longest_row(model, saver, room, given)
        operations = length * flops_per_token(model, length)
        took = operations / (speed or devices.peak_flops(device) or 1e10) * 2
        told, memory = f"not run: about {took:.0f} s", "—"
        if length and time.monotonic() + took < until:
            try:
                run = step_of(model, saver, device)
                seconds, peak = peak_of(run, length, device)
                told, memory, speed = f"{seconds:.1f} s", f"{peak / 2**30:.4g}", operations / seconds
            except torch.OutOfMemoryError:
                told = "does not fit"
            finally:
                run = None
                freed()
        yield f"| {name} | {length:,} | {told} | {memory} |"


def main() -> None:
    """Print the tables of the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["kernels", "rates", "longest"], default=[])
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768, 131_072])
    parser.add_argument("--seconds", type=float, default=480, help="begin no step that would end later")
    given = parser.parse_args()
    # a vocabulary of 32,000: with 128,256 AdamW's states of 16 layers alone are 73 GB
    sizes = (32_000, 4096, 16, 32, 8, 128, 14_336)
    given.positions, given.features, given.two, given.memory = 1024, 128, (2**16, 2**17), 0
    if given.tiny:
        sizes = (256, 64, 2, 4, 2, 16, 128)
        given.positions, given.features, given.lengths = 96, 32, [64, 128]
        given.two, given.memory = (2048, 4096), 16 * 2**20
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
    options = dict(zip(names, sizes, strict=True))
    model = ModelConfig(family="llama", max_positions=2**21, rope=RopeConfig(theta=500_000.0), **options)
    device, until = devices.local_device(), time.monotonic() + given.seconds
    devices.prepare(device, tf32=False)
    shown = ", ".join(f"{name} {size}" for name, size in options.items())
    print(f"{date.today()} · {devices.describe(device)} · torch {torch.__version__} · {' '.join(sys.argv)}\n{shown}")
    parts = {
        "kernels": lambda: kernels(device, given),
        "rates": lambda: rates(model, device, given, until),
        "longest": lambda: longest(model, device, given, until),
    }
    for name in given.parts or parts:
        print(f"\n{name}\n")
        for line in parts[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
