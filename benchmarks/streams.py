"""What a slow source costs a run on a stream: `python benchmarks/streams.py --rounds 3`.

A small model trains from `pretraining_dataset`, in a process of its own each time: as fast as it can, then with the
source delayed to a share of the step time just measured, again and again in turn. The delay is a sleep after each
document in the process that reads it, in proportion to its characters; the product knows nothing of it. At 0.8 the
source is quicker than the steps, which should hide it; at 1.5 it is slower, and the steps must take 1.5 times as long:
that shows that the delay is there. The best of several rounds counts, for noise only ever adds; of a run its median
step, the first ones left out. CPU seconds are those of the process that trains, a step; `waits` is how long it stands
still for the next rows, the mean.

On a machine whose cores have other work too, steps that compute on them vary more than what is asked. With
`--device-seconds 0.5` each step also sleeps that long, as the host of an accelerator waits for it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

SHARES = (0.0, 0.8, 1.5)
LENGTH, MICRO, ACCUMULATION = 256, 2, 2
FIRST = 5
"""Steps that are not counted: those in which what was kept ready at the start is used up, and caches are filled."""
MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": LENGTH,
}


def make_data(folder: Path) -> float:
    """Texts, a tokenizer trained on them and the config of a model; the characters of a token."""
    from tessera.data.stdlib import standard_library_files
    from tessera.data.tokenizer import save_tokenizer, train_bpe

    texts = [path.read_text() for path in standard_library_files(4 * 10**6)]
    texts = [text[at : at + 1000] for text in texts for at in range(0, len(text), 1000)]
    tokenizer = train_bpe(texts, MODEL["vocab_size"])
    save_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    some = texts[::20]
    return sum(map(len, some)) / sum(len(tokenizer.backend.encode(text)) + 1 for text in some)


def worker(arguments: list[str]) -> None:
    """The process that reads and tokenizes, with a reader that sleeps so many seconds for each character."""
    from multiprocessing.connection import Connection

    from tessera.data import stream, stream_worker

    pause, read = float(arguments[0]), stream.read_documents

    def slowly(*given: Any) -> Iterator[Any]:
        for document in read(*given):
            time.sleep(pause * len(document.segments[0].text))
            yield document

    with patch.object(stream, "read_documents", slowly):
        stream_worker._work(Connection(int(arguments[1])))


def one_side(folder: Path, steps: int, pause: float, device: float) -> None:
    """Train, and print the median step's wall and CPU seconds, and the mean wait, as JSON."""
    import torch

    from tessera.config.load import make_config
    from tessera.data.stream_loader import StreamLoader
    from tessera.engine.step import Step
    from tessera.train.run import prepared_run
    from tessera.train.trainer import train

    torch.set_num_threads(1)
    popen, call, batches = subprocess.Popen, Step.__call__, StreamLoader.step_batches
    used, waited = list[float](), list[float]()

    def begin(command: list[str], **how: Any) -> Any:
        """The worker of a stream is this file, whose reader is slow."""
        if "tessera.data.stream_worker" in command:
            command = [sys.executable, __file__, "--worker", str(pause), command[-1]]
        return popen(command, **how)

    def timed(*given: Any, **how: Any) -> Any:
        used.append(time.process_time())
        time.sleep(device)
        return call(*given, **how)

    def waiting(*given: Any) -> Any:
        begun = time.perf_counter()
        found = batches(*given)
        waited.append(time.perf_counter() - begun)
        return found

    with tempfile.TemporaryDirectory(dir=folder) as out, redirect_stdout(sys.stderr):
        keys = {
            "base_model": str(folder),
            "random_init": True,
            "pretraining_dataset": str(folder / "texts.jsonl"),
            "output_dir": out,
            "sequence_len": LENGTH,
            "micro_batch_size": MICRO,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_steps": steps,
            "save_strategy": "no",
            "bf16": False,
            "logging_steps": 1000,
        }
        config = prepared_run(make_config(keys)[0], 1)
        with (
            patch.object(subprocess, "Popen", begin),
            patch.object(Step, "__call__", timed),
            patch.object(StreamLoader, "step_batches", waiting),
        ):
            train(config)
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    wall = statistics.median(line["step_seconds"] for line in lines[FIRST:])
    cpu = statistics.median(after - before for before, after in zip(used[FIRST:], used[FIRST + 1 :], strict=False))
    print(json.dumps([wall, cpu, statistics.mean(waited[FIRST:])]))


def main() -> None:
    """All sides in turn, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device-seconds", type=float, default=0.0)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.side:
        one_side(Path(arguments.side[0]), arguments.steps, float(arguments.side[1]), arguments.device_seconds)
        return
    with tempfile.TemporaryDirectory() as place:
        characters = make_data(Path(place)) * LENGTH * MICRO * ACCUMULATION  # of a step
        found: dict[float, list[list[float]]] = {share: [] for share in SHARES}
        each = [sys.executable, __file__, "--steps", str(arguments.steps)]
        each += ["--device-seconds", str(arguments.device_seconds)]
        for _ in range(arguments.rounds):
            for share, rounds in found.items():
                pause = share * (found[0.0][-1][0] if share else 0.0) / characters
                command = [*each, "--side", place, str(pause)]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                rounds.append(json.loads(result.stdout.splitlines()[-1]))
                print(f"source at {share:.0%} of a step: {rounds[-1][0]:.3f} s a step", file=sys.stderr)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()}")
    print("\n| source, of a step | s a step, best | of the undelayed | each round | waits, ms | CPU s a step, best |")
    print("|---|---|---|---|---|---|")
    base = [wall for wall, _, _ in found[0.0]]
    for share, rounds in found.items():
        walls, cpus, waits = zip(*rounds, strict=True)
        ratios = ", ".join(f"{wall / own:.3f}" for wall, own in zip(walls, base, strict=True))
        told = f"{min(walls):.3f} | {min(walls) / min(base):.3f} | {ratios} | {min(waits) * 1000:.0f} | {min(cpus):.3f}"
        print(f"| {share:.0%} | {told} |")


if __name__ == "__main__":
    main()
