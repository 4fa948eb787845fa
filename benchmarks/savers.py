"""What each memory saver saves: `python benchmarks/savers.py`.

A small Llama takes a step on one row, on one rank, with each saver in turn. Counted are bytes of live tensors beside
parameters and gradients: what lies on the device when the forward has ended, what has left for host memory, and the
most at once in forward and backward; CPU seconds are the best of `--rounds`. `ulysses_chunks` is attention alone on two
ranks, whose heads are traded in groups. On a CPU host memory is the device's own: what lies there does not count.
"""

import argparse
import multiprocessing
import tempfile
import time
from typing import Any

SAVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_checkpointing: true": {"recompute": True},
    "gradient_checkpointing: selective": {"recompute": True, "attention_once": True},
    "gradient_checkpointing: offload": {"recompute": True, "offload": True},
    "activation_offloading: true": {"offload": True},
    "tiled_mlp: true": {"mlp_tiles": None},
    "tiled_mlp, gradient_checkpointing: true": {"recompute": True, "mlp_tiles": None},
    "tiled_mlp, gradient_checkpointing: offload": {"recompute": True, "offload": True, "mlp_tiles": None},
}


def measured(arguments: argparse.Namespace, saver: dict[str, Any]) -> tuple[int, int, int, float]:
    """Bytes kept on the device and on the host, the peak, and CPU seconds of a forward and backward."""
    import torch

    from tessera.core.host_memory import HostMemory
    from tessera.core.live_memory import PeakMemory
    from tessera.core.mesh import Mesh
    from tessera.data.batch import MicroBatch
    from tessera.layout.parallel import Parallel
    from tessera.layout.shape import Savers
    from tessera.layout.streams import residual_layout
    from tessera.models.config import ModelConfig
    from tessera.models.decoder import Decoder
    from tessera.nn.rope import RopeConfig

    hidden, heads = arguments.hidden, arguments.hidden // 64
    shape = {"vocab_size": 1024, "hidden_size": hidden, "num_layers": arguments.layers, "num_heads": heads}
    shape |= {"num_kv_heads": max(1, heads // 4), "head_dim": 64, "ffn_size": hidden * 7 // 2, "max_positions": 2**20}
    config = ModelConfig("llama", rope=RopeConfig(), **shape)
    options, again = dict(saver), saver.get("recompute", False)
    options.pop("recompute", None)
    parallel = Parallel(Mesh(rank=0), residual_layout(True))
    model = Decoder(config, parallel, gradient_checkpointing=again, savers=Savers(**options))
    model.initialize(1)
    ids = torch.randint(0, 1024, (1, arguments.length), generator=torch.Generator().manual_seed(1))
    batch, memories, seconds = MicroBatch(ids, ids.roll(-1, 1), ids.numel()), [], []

    class Told(HostMemory):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            memories.append(self)

    import tessera.models.decoder as decoder

    decoder.HostMemory = Told  # type: ignore[misc]
    for _ in range(arguments.rounds):
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        model(batch, 1.0).backward()
        seconds.append(time.process_time() - start)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but the first
    with PeakMemory() as memory:
        for parameter in model.parameters():  # which counts them
            parameter.data.view(-1), parameter.grad.view(-1)
        before = memory.current
        loss = model(batch, 1.0)
        kept = memory.current - before
        loss.backward()
    return kept, memories[-1].bytes if memories else 0, memory.peak - before, min(seconds)


def in_groups(rank: int, length: int, folder: str, answers: Any) -> None:
    """On one of two ranks: for each number of groups what attention keeps, and its peak."""
    import torch
    import torch.distributed as dist

    from tessera.core.live_memory import PeakMemory
    from tessera.core.mesh import Mesh
    from tessera.data.batch import Stream
    from tessera.layout.context import Context
    from tessera.layout.parallel import Parallel
    from tessera.layout.streams import residual_layout
    from tessera.nn.context.attention import shared_attention
    from tessera.nn.context.route import route_of

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh, found = Mesh({"ulysses": 2}), {}
    for chunks in (1, 2, 4, 8):
        parallel = Parallel(mesh, residual_layout(True), context=Context(chunks=chunks))
        q, k, v, d_out = (torch.randn(length // 2, 16, 64) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        route = route_of(Stream((0, length), (((0, length),),)), parallel, None)
        with PeakMemory() as memory:
            for x in (q, k, v, d_out):
                x.view(-1)
            before = memory.current
            out = shared_attention(q, k, v, route, parallel)
            kept = memory.current - before
            out.backward(d_out)
        found[chunks] = kept, memory.peak - before
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def groups(length: int) -> dict[int, tuple[int, int]]:
    """What `in_groups` finds on the first rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=in_groups, args=(rank, length, folder, answers)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        found = answers.get()
        for rank in ranks:
            rank.join()
    return found


def main() -> None:
    """Print the tables, as Markdown."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("length", 2048), ("hidden", 256), ("layers", 8), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| saver | MiB kept on the device | MiB in host memory | peak MiB | CPU s |")
    print("|---|---|---|---|---|")
    for name, saver in SAVERS.items():
        kept, host, peak, seconds = measured(arguments, saver)
        mib = " | ".join(f"{size / 2**20:.0f}" for size in (kept, host, peak))
        print(f"| {name} | {mib} | {seconds:.2f} |", flush=True)
    print("\n| ulysses_chunks | MiB kept | peak MiB |\n|---|---|---|")
    for chunks, sizes in groups(arguments.length).items():
        print(f"| {chunks} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
