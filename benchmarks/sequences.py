"""Steps of long rows, cut in every way: `python benchmarks/sequences.py --lengths 4096 16384`.

A small Llama trains on one row of each length, whole on one rank, and shared by ranks in every way that there is. All
ranks of all ways start first; then each way takes a step in turn, round after round, and the best wall counts, for
noise only ever adds. CPU seconds are of the slowest rank, waiting not among them; bytes are what a rank is handed by
collectives in a step; the peak is of live tensors, counted in a step of its own. `--documents 2048` packs documents of
that mean length (exponential) into the row; `--contiguous` adds exchange with as many tokens a rank, each rank's one
behind another, whatever their work, and prints the CPU seconds of a layer's attention of each rank, without
communication. `--alone` says what one rank would hold at its peak, counted without running.
"""

import argparse
import contextlib
import math
import multiprocessing
import random
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODES = {"ulysses": "ulysses", "ring": "ring", "exchange": "exchange"}


@dataclass(frozen=True)
class Way:
    """A way to cut a row over `ranks`: the sizes of its axes, and what brings keys and values along ring.

    `contiguous`: a rank's tokens follow one another; else they are dealt so that ranks have equal work.
    """

    name: str
    sizes: dict[str, int] = field(default_factory=dict)
    mode: str = "exchange"
    contiguous: bool = False

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes.values())


def ways(ranks: int, contiguous: bool) -> list[Way]:
    """One rank alone, and everything that so many ranks can do; `contiguous`: what they should not do too."""
    found = [Way("one rank"), Way("Megatron SP", {"col": ranks}), Way("Ulysses", {"ulysses": ranks}, "ulysses")]
    found += [Way("ring", {"ring": ranks}, "ring"), Way("exchange", {"ring": ranks})]
    if ranks > 2:
        half = ranks // 2
        found += [Way(f"Ulysses {half} × exchange 2", {"ring": 2, "ulysses": half})]
    return [*found, *[Way("exchange, contiguous", {"ring": ranks}, contiguous=True)] * contiguous]


def model_of(arguments: argparse.Namespace) -> Any:
    """A Llama of the sizes that are asked for."""
    from tessera.models.config import ModelConfig
    from tessera.nn.rope import RopeConfig

    return ModelConfig(
        "llama",
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        ffn_size=arguments.ffn,
        max_positions=2**20,
        rope=RopeConfig(),
    )


def row(length: int, mean: int, vocabulary: int) -> Any:
    """A row of `length` tokens, of one document or of many of `mean` tokens."""
    import torch

    from tessera.data.batch import MicroBatch

    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    if not mean:
        return MicroBatch(ids, ids.roll(-1, 1), length)
    dice, positions, documents, number = random.Random(1), [], [], 0
    while len(positions) < length:
        own = min(length - len(positions), max(1, int(dice.expovariate(1 / mean))))
        positions += range(own)
        documents += [number] * own
        number += 1
    return MicroBatch(ids, ids.roll(-1, 1), length, 0, torch.tensor([positions]), torch.tensor([documents]))


def contiguous_owners(length: int, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each rank the tokens that it owns, one behind another."""
    each = length // ranks
    return tuple(((rank * each, (rank + 1) * each),) for rank in range(ranks))


def busiest(arguments: argparse.Namespace, length: int) -> str:
    """The work of attention on the rank that has most, beside the mean, contiguous and balanced."""
    from tessera.nn.context.assign import assign, work

    bounds = (*row(length, arguments.documents, arguments.vocabulary).document_starts, length)
    both = contiguous_owners(length, arguments.ranks), assign(bounds, arguments.ranks)
    alone, balanced = (max(found) / (sum(found) / len(found)) for found in (work(owned, bounds) for owned in both))
    return (
        f"{length:,} tokens, the busiest rank's attention of the mean: contiguous {alone:.2f}, balanced {balanced:.2f}"
    )


def attention_seconds(arguments: argparse.Namespace, length: int) -> str:
    """CPU seconds of one layer's tiles, forward and backward, of each rank: contiguous and balanced, in turn."""
    import torch

    from tessera.nn.context.assign import assign
    from tessera.nn.context.consume import backward_tiles, forward_tiles
    from tessera.nn.context.tiles import tiles

    torch.set_num_threads(1)
    bounds = (*row(length, arguments.documents, arguments.vocabulary).document_starts, length)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    q, k, v = (torch.randn(length, n, arguments.hidden // arguments.heads) for n in heads)
    ways = {
        "contiguous": contiguous_owners(length, arguments.ranks),
        "balanced": assign(bounds, arguments.ranks),
    }
    best = {name: [math.inf] * arguments.ranks for name in ways}
    for _ in range(arguments.rounds):
        for rank in range(arguments.ranks):
            for name, owned in ways.items():
                own = torch.cat([q[first:end] for first, end in owned[rank]])
                block = k, v, tiles(owned[rank], [(0, length)], bounds)
                begun = time.process_time()
                out, lse = forward_tiles(own, [block])
                backward_tiles(out, own, out, lse, torch.zeros_like(own), block)
                best[name][rank] = min(best[name][rank], time.process_time() - begun)
    shown = "; ".join(f"{name} {', '.join(f'{each:.3f}' for each in found)}" for name, found in best.items())
    return f"{length:,} tokens, CPU s of one layer's attention on each rank: {shown}"


def contiguous_part(batch: Any, rank: int, ranks: int) -> Any:
    """What `rank` has of a row of which each rank owns tokens that follow one another; the step cuts it no further."""
    import torch

    from tessera.data.batch import Stream

    length = batch.input_ids.numel()
    each = length // ranks
    own = slice(rank * each, (rank + 1) * each)
    stream = Stream((*batch.document_starts, length), contiguous_owners(length, ranks))
    positions = torch.arange(length)[None] if batch.positions is None else batch.positions
    documents = torch.zeros_like(positions) if batch.documents is None else batch.documents
    vectors = (batch.input_ids, batch.targets, positions, documents)
    ids, targets, positions, documents = (vector[:, own] for vector in vectors)
    return replace(
        batch, input_ids=ids, targets=targets, valid=each, positions=positions, documents=documents, streams=(stream,)
    )


class Rank:
    """One rank of a way, inside its process."""

    def __init__(self, way: Way, arguments: argparse.Namespace, rank: int, folder: Path) -> None:
        import torch
        import torch.distributed as dist

        from tessera.core.device import prepare
        from tessera.core.mesh import Mesh
        from tessera.engine.fsdp import build_decoder
        from tessera.engine.optimizer import build_optimizer
        from tessera.engine.step import Step
        from tessera.layout.resolve import parallel_of
        from tessera.sizes.context import ContextParallel
        from tessera.sizes.rules import TensorParallel

        prepare(torch.device("cpu"), tf32=False)
        torch.set_num_threads(1)
        if way.ranks > 1:
            store = dist.FileStore(str(folder / way.name.replace(" ", "-")), way.ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=way.ranks)
        mesh, col = Mesh(way.sizes), way.sizes.get("col", 1)
        ulysses = way.sizes.get("ulysses", 1)
        context = ContextParallel(way.sizes.get("ring", 1) * ulysses, way.mode, ulysses)
        config = model_of(arguments)
        parallel = parallel_of(TensorParallel(size=col), mesh, 1, config.dimensions, context=context)
        model = build_decoder(config, parallel, gradient_checkpointing=arguments.recompute)
        model.initialize(1)
        self.step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0))
        self.arguments, self.number, self.way, self.rank = arguments, 0, way, rank

    def run(self, length: int) -> tuple[float, float]:
        """Wall and CPU seconds of a step."""
        batch = row(length, self.arguments.documents, self.arguments.vocabulary)
        if self.way.contiguous:
            batch = contiguous_part(batch, self.rank, self.way.ranks)
        wall, cpu = time.perf_counter(), time.process_time()
        self.step([batch], self.number, 1e-4)
        self.number += 1
        return time.perf_counter() - wall, time.process_time() - cpu

    def count(self, length: int) -> tuple[int, int, int]:
        """Bytes received and the peak of live tensors beside those of before, in a step; the process's most memory."""
        from tessera.core.collectives import Recorder
        from tessera.core.live_memory import PeakMemory

        with Recorder() as recorder, PeakMemory() as memory:
            self.run(length)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return sum(record.received for record in recorder.records), memory.peak, resident


def serve(way: Way, arguments: argparse.Namespace, rank: int, folder: Path, pipe: Connection) -> None:
    """A rank: does what it is told until the pipe closes."""
    try:
        own = Rank(way, arguments, rank, folder)
        while True:
            name, length = pipe.recv()
            pipe.send(getattr(own, name)(length))
    except EOFError:
        return
    except Exception:
        pipe.send(traceback.format_exc())


class Group:
    """The ranks of a way."""

    def __init__(self, way: Way, arguments: argparse.Namespace, folder: Path) -> None:
        self.pipes = []
        context = multiprocessing.get_context("spawn")
        for rank in range(way.ranks):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(way, arguments, rank, folder, theirs), daemon=True).start()
            self.pipes.append(ours)

    def ask(self, name: str, length: int) -> list[Any]:
        """What each rank answers."""
        for pipe in self.pipes:
            pipe.send((name, length))
        answers = [pipe.recv() for pipe in self.pipes]
        if failed := [answer for answer in answers if isinstance(answer, str)]:
            raise SystemExit(failed[0])
        return answers


Measured = tuple[int, Way, float, float, int, int, int]


def counted_alone(arguments: argparse.Namespace, length: int) -> int:
    """Bytes of live tensors that one rank has at the peak of a step on whole rows: counted, with no data."""
    from tessera.core.mesh import Mesh
    from tessera.layout.resolve import parallel_of
    from tessera.layout.shape import StepShape
    from tessera.plan.count import counted_step
    from tessera.sizes.rules import TensorParallel

    model, shape = model_of(arguments), StepShape(1, length, recompute=arguments.recompute)
    return counted_step(model, shape, parallel_of(TensorParallel(), Mesh({}), 1, model.dimensions)).memory.peak


def table(arguments: argparse.Namespace, folder: Path) -> list[Measured]:
    """Length, way, best wall and CPU of the slowest rank; bytes received, peak and memory of the rank that has most."""
    chosen = [
        way for way in ways(arguments.ranks, arguments.contiguous) if not arguments.only or way.name in arguments.only
    ]
    groups = {way.name: Group(way, arguments, folder) for way in chosen}
    found = []
    for length in arguments.lengths:
        times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in chosen}
        for number in range(arguments.rounds + 1):
            for way in chosen:
                each = groups[way.name].ask("run", length)
                if number:  # the first one makes the memory warm
                    times[way.name].append((max(wall for wall, _ in each), max(cpu for _, cpu in each)))
        for way in chosen:
            counted = groups[way.name].ask("count", length)
            received, peak, resident = (max(each) for each in zip(*counted, strict=True))
            wall, cpu = (min(each) for each in zip(*times[way.name], strict=True))
            found.append((length, way, wall, cpu, received, peak, resident))
    return found


def draw(found: list[Measured], path: str) -> None:
    """Tokens a CPU second of the slowest rank, peak and bytes against the length of a row, a line for each way."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[Measured], float]], ...] = (
        ("tokens a CPU second of the slowest rank", lambda f: f[0] / f[3]),
        ("peak MiB of a rank", lambda f: f[5] / 2**20),
        ("MiB that a rank receives in a step", lambda f: f[4] / 2**20),
    )
    lengths, names = sorted({f[0] for f in found}), list(dict.fromkeys(f[1].name for f in found))
    with pyplot.rc_context({"svg.hashsalt": "tessera", "font.size": 9}):
        figure, panes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
        for pane, (title, value) in zip(panes.flat, panels, strict=True):
            for number, name in enumerate(names):
                points = [
                    (f[0], value(f)) for f in found if f[1].name == name and value(f)
                ]  # one rank receives nothing
                marker = "osD^v<>"[number % 7]  # ways that move or hold alike lie on one another
                if points:
                    pane.plot(*zip(*points, strict=True), marker=marker, mfc="none", color=f"C{number}", label=name)
            pane.set(title=title, xlabel="tokens of a row", xscale="log")
            pane.set_yscale("log", base=2)
            pane.yaxis.set_major_formatter("{x:,.0f}")
            pane.set_xticks(lengths, [f"{length:,}" for length in lengths])
            pane.minorticks_off()
            pane.grid(alpha=0.3)
        panes.flat[0].legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, and draw it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--documents", type=int, default=0, help="mean tokens of a document; 0: one a row")
    parser.add_argument("--only", nargs="+", default=[], help="names of ways")
    parser.add_argument("--contiguous", action="store_true", help="exchange without balance too")
    parser.add_argument("--alone", action="store_true", help="count the peak of one rank too")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--plot", default="")
    for name, value in (
        ("layers", 2),
        ("hidden", 256),
        ("heads", 8),
        ("kv-heads", 2),
        ("ffn", 704),
        ("vocabulary", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        found = table(arguments, Path(folder))
    sizes = f"{arguments.layers} layers, hidden {arguments.hidden}, {arguments.heads} heads ({arguments.kv_heads} kv)"
    print(f"{sizes}, ffn {arguments.ffn}, vocabulary {arguments.vocabulary}; best of {arguments.rounds} rounds\n")
    headings = ("tokens", "way", "ranks", "wall s", "of one rank", "tokens/s", "CPU s, slowest rank", "peak MiB")
    headings += ("resident MiB", "MiB received")
    print(f"| {' | '.join(headings)} |", f"{'|---' * len(headings)}|", sep="\n")
    alone = {length: wall for length, way, wall, *_ in found if way.ranks == 1}
    for length, way, wall, cpu, received, peak, resident in found:
        share = f"{wall / alone[length]:.3f}" if length in alone else ""
        print(
            f"| {length:,} | {way.name} | {way.ranks} | {wall:.3f} | {share} | {length / wall:,.0f} | {cpu:.3f} "
            f"| {peak / 2**20:,.1f} | {resident / 2**20:,.0f} | {received / 2**20:,.2f} |"
        )
    for length in arguments.lengths if arguments.contiguous else ():
        print(f"\n{busiest(arguments, length)}\n{attention_seconds(arguments, length)}")
    for length in arguments.lengths if arguments.alone else ():
        print(
            f"\none rank, {length:,} tokens, counted: {counted_alone(arguments, length) / 2**20:,.1f} MiB at the peak"
        )
    if arguments.plot:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
