"""What the monitor costs: CPU time of its own calls, timed inside, beside that of the steps in which they are made.

`python benchmarks/monitor.py` trains the model of `benchmarks/page_faults.py` on random tokens in 1 and 2 processes,
with a report after every step, and prints a table. Timed are: a mark, a phase that begins, the end of a step, and the
report with its collectives (to wait in them costs no CPU time). The step that is counted by kind of memory is in a
column of its own. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

VOCABULARY, SEQUENCE, BATCH = 8192, 256, 4
SIZES = {"hidden_size": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "ffn_size": 1408}


class Spent:
    """CPU seconds inside calls of the monitor; a call within another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._depth += 1
        begun = time.thread_time()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.thread_time() - begun

    def wrap(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **how: Any) -> Any:
            with self.counting():
                return real(*args, **how)

        setattr(owner, name, timed)


def work(rank: int, world: int, store: str, steps: int) -> None:
    """One rank; prints a JSON object with CPU milliseconds of steps and of the monitor's calls in them."""
    import torch
    import torch.distributed as dist

    from tessera.core import device
    from tessera.core.mesh import Mesh
    from tessera.core.recorder import Span
    from tessera.data.batch import MicroBatch
    from tessera.engine.optimizer import build_optimizer
    from tessera.engine.step import Step
    from tessera.layout.parallel import Parallel
    from tessera.layout.streams import residual_layout
    from tessera.models.config import ModelConfig
    from tessera.models.decoder import Decoder
    from tessera.monitor.counted import COUNTED_STEP
    from tessera.monitor.monitor import Monitor
    from tessera.nn.rope import RopeConfig

    torch.set_num_threads(1)
    device.prepare(torch.device("cpu"), tf32=False)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    config = ModelConfig("llama", VOCABULARY, max_positions=SEQUENCE, norm_eps=1e-5, rope=RopeConfig(), **SIZES)
    model = Decoder(config, Parallel(Mesh({"col": world}), residual_layout(True)))
    model.initialize(seed=1)
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.999), 1e-8, 0.01)
    step, spent = Step(model, optimizer, max_grad_norm=1.0), Spent()
    monitor = Monitor(step)
    for owner, name in ((Span, "mark"), (monitor, "enter"), (monitor, "end"), (monitor, "report")):
        spent.wrap(owner, name)
    step.entered = monitor.enter
    found: dict[str, list[float]] = {"step": [], "monitor": [], "counted": []}
    for index in range(steps):
        ids = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(index))
        before, cpu = spent.seconds, time.process_time()
        monitor.enter("data")
        with monitor.step():
            step([MicroBatch(ids, ids.roll(-1, 1), ids.numel())], index, 1e-4)
        monitor.end(index + 1)
        monitor.report(index + 1)
        cpu = 1e3 * (time.process_time() - cpu)
        if index + 1 == COUNTED_STEP:
            found["counted"].append(cpu)
        elif index > COUNTED_STEP:
            found["step"].append(cpu)
            found["monitor"].append(1e3 * (spent.seconds - before))
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(int(given.work[0]), int(given.work[1]), given.work[2], given.steps)
    print(f"{date.today()} · {platform.platform()} · {os.cpu_count()} cores · {' '.join(sys.argv)}\n")
    print("| ranks | CPU ms of a step | of the monitor | share | CPU ms of the step counted by kind |")
    print("|---|---|---|---|---|")
    for world in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--steps", str(given.steps), "--work"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            ranks = [
                subprocess.Popen([*command, str(rank), str(world), f"{folder}/store"], env=environment, stdout=-1)
                for rank in range(world)
            ]
            answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in ranks]
        worst = max(answers, key=lambda answer: sum(answer["monitor"]))
        step, own = sum(worst["step"]) / len(worst["step"]), sum(worst["monitor"]) / len(worst["monitor"])
        counted = max(worst["counted"], default=0.0)
        print(f"| {world} | {step:.0f} | {own:.2f} | {own / step:.2%} | {counted:.0f} |", flush=True)


if __name__ == "__main__":
    main()
