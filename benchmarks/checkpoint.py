"""How long a checkpoint stops the training, and what memory `tessera convert` takes: `python benchmarks/checkpoint.py`.

One process trains a Llama of 134M float32 parameters with AdamW. In turn: a save that training waits for, and one in
the background, during which training goes on. Both sync every file and hash it. The last checkpoint is then converted
in a child process, whose peak resident memory is read. Nothing of it is kept.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from benchmarks.report import describe_machine
from tessera.checkpoint.saver import Saver
from tessera.core import device as devices
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.models.hub import read_model_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
}


@dataclass
class Seconds:
    """Of each round: how long the training was kept (by `save`, and by the optimizer's wait for the copy), the step
    during which the copy was taken, until the checkpoint was in place, and the other steps until then."""

    stall: list[float] = field(default_factory=list)
    first_steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class Bench:
    """A model that trains, and its saves; `folder` gets everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps(CONFIG))
        device = devices.local_device()
        devices.prepare(device, tf32=False)
        config = read_model_config(folder / "model")
        self.model = Decoder(config, Parallel(Mesh({}, device), residual_layout(True)))
        self.model.initialize(0)
        self.optimizer = build_optimizer(self.model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.1)
        self.step = Step(self.model, self.optimizer, max_grad_norm=1.0)
        ids = torch.randint(0, config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
        self.batch = MicroBatch(ids[:, :-1], ids[:, 1:], 64)
        self.done = 0

    def train(self) -> float:
        begun = time.perf_counter()
        self.held = 0.0
        self.step([self.batch], self.done, 1e-4)
        self.done += 1
        return time.perf_counter() - begun

    def saver(self, asynchronous: bool) -> Saver:
        saver = Saver(self.folder / "run", 1, asynchronous=asynchronous, timeout=timedelta(minutes=10), say=print)
        wait = saver._copies.wait

        def timed() -> None:
            begun = time.perf_counter()
            wait()
            self.held += time.perf_counter() - begun

        saver._copies.wait = timed  # type: ignore[method-assign]
        return saver

    def save(self, saver: Saver, seconds: Seconds) -> None:
        """One save, and steps until it is in place (if it is in the background), timed."""
        beside = {"folder": str(self.folder / "model"), "tokenizer": None, "config_changes": {}}
        begun = time.perf_counter()
        saver.save(self.model, self.optimizer, {"step": self.done, "source": beside})
        seconds.stall.append(time.perf_counter() - begun)
        if saver.asynchronous:
            seconds.first_steps.append(self.train())
            seconds.stall[-1] += self.held
        while saver.asynchronous and not saver.settled:
            seconds.steps.append(self.train())
        saver.finish()
        seconds.whole.append(time.perf_counter() - begun)


def measure(folder: Path, rounds: int) -> str:
    """The tables, in Markdown."""
    bench = Bench(folder)
    quiet = [bench.train() for _ in range(3 + 2 * rounds)][3:]
    blocking, background = Seconds(), Seconds()
    savers = (bench.saver(False), blocking), (bench.saver(True), background)
    for _ in range(rounds + 1):  # the first also allocates
        for saver, seconds in savers:
            bench.save(saver, seconds)
            quiet.append(bench.train())
    first = background.stall.pop(0)
    del background.first_steps[0]
    for seconds in (blocking, background):
        del seconds.whole[0]
    del blocking.stall[0]
    for saver, _ in savers:
        saver.close()
    checkpoint = next((folder / "run").glob("checkpoint-*"))
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    _, bare = child("import torch")
    words = ["tessera", "convert", str(checkpoint), str(folder / "out")]
    taken, peak = child(f"import sys; sys.argv = {words!r}; from tessera.cli.main import main; main()")
    share = statistics.median(background.stall) / statistics.median(blocking.whole)
    rows = [
        ("stall of a save in the background, s", background.stall, "in `save`, and before the optimizer's step"),
        ("the same, first save of a run, s", [first], "allocates the buffers"),
        ("until it was in place, s", background.whole, "beside training"),
        ("a save that training waits for, s", blocking.whole, "write, sync, hash, rename"),
        ("a training step without a save, s", quiet, ""),
        ("the step during which it was copied, s", background.first_steps, "the two share cores and memory"),
        ("a step during its writing, s", background.steps, "the two share the cores"),
    ]
    table = ["| | median | least | most | |", "|---|---|---|---|---|"]
    for name, values, note in rows:
        figures = " | ".join(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))
        table.append(f"| {name} | {figures} | {note} |")
    return "\n".join(
        [
            f"{parameters / 1e6:.0f}M parameters ({parameters * 4 / 1e6:.0f} MB) with both moments of AdamW: "
            f"{written / 1e6:.0f} MB a checkpoint, one process; {rounds} rounds.",
            "",
            *table,
            "",
            f"Stall over a blocking save: {share:.1%} (medians).",
            f"`tessera convert` of the last checkpoint: {taken:.1f} s, peak resident memory {peak / 1e6:.0f} MB, "
            f"of which Python and torch {bare / 1e6:.0f} MB.",
        ]
    )


def child(code: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a program in a process of its own."""
    # started by a small process: a child's ru_maxrss begins with the size of the one that forked it
    program = "import resource, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True); "
    program += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    context = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), "PATH": os.environ["PATH"]}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, code], check=True, capture_output=True, text=True, env=context
    )
    return time.perf_counter() - begun, int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (7 GB); without it the system's temporary folder")
    given = parser.parse_args()
    print(describe_machine("checkpoint.py", "torch"))
    folder = Path(tempfile.mkdtemp(prefix="tessera-", dir=given.folder))
    try:
        print("\n" + measure(folder, given.rounds))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
