"""Speed and memory of preparing text, beside `tokenizers` alone: `python benchmarks/preparation.py --mb 1000`.

Text is the source of Python's standard library, again and again with other names in it, so that no cache of words
knows all of it. Each side runs in a process of its own: Tessera reads the files, tokenizes, cuts windows, writes and
sums them; `tokenizers` gets the same texts, read already, by encode_batch, 1,000 at a time, and nothing is done with
what it returns. Several rounds in turn; the best of each counts, for noise only ever adds. CPU seconds are of all
threads.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tessera.core.text import human
from tessera.data.stdlib import standard_library_files


def write_text(folder: Path, size: int, files_each: int) -> None:
    """Files of `files_each` bytes or so, `size` bytes together."""
    sources = [path.read_text() for path in standard_library_files(2**40)]
    draw, written, number = random.Random(0), 0, 0
    while written < size:
        parts, length = [], 0
        while length < min(files_each, size - written):
            text = draw.choice(sources)
            names = set(re.findall(r"\b[a-z_]{6,}\b", text))
            other = {name: f"{name}_{draw.randrange(10**4)}" for name in draw.sample(sorted(names), len(names) // 8)}
            parts.append(re.sub(r"\b[a-z_]{6,}\b", lambda found, other=other: other.get(found[0], found[0]), text))
            length += len(parts[-1].encode())
        (folder / f"{number:05}.txt").write_text("\n".join(parts))
        written, number = written + length, number + 1


def tessera_alone(data: Path, tokenizer: str, threads: int, out: Path) -> int:
    """Prepare the folder; the number of tokens."""
    from tessera.config.load import make_config
    from tessera.data.prepare import prepare

    config, _ = make_config(
        {
            "base_model": tokenizer,
            "tokenizer": tokenizer,
            "datasets": [{"path": str(data)}],
            "sequence_len": 2048,
            "max_steps": 1,
            "output_dir": str(out),
            "dataset_processes": threads,
        }
    )
    return prepare(config, None).manifest.train_tokens


def tokenizers_alone(data: Path, tokenizer: str) -> tuple[int, float]:
    """Tokenize the texts of the folder by encode_batch; the number of tokens, and the seconds without reading."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    tokens, seconds = 0, 0.0
    for path in sorted(data.iterdir()):
        text = path.read_text()
        texts = [text[start : start + 2**14] for start in range(0, len(text), 2**14)]
        for start in range(0, len(texts), 1000):
            begun = time.perf_counter()
            found = backend.encode_batch(texts[start : start + 1000])
            seconds += time.perf_counter() - begun
            tokens += sum(map(len, found))
            del found
    return tokens, seconds


def one_side(arguments: argparse.Namespace) -> None:
    """In a process of its own: print tokens, seconds, CPU seconds and peak memory as JSON."""
    data, begun = Path(arguments.data), time.perf_counter()
    if arguments.side == "tessera":
        import transformers  # noqa: F401 - what loads a tokenizer takes seconds to import

        begun, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory(dir=data.parent) as out:
            tokens = tessera_alone(data, arguments.tokenizer, arguments.threads, Path(out))
            seconds = time.perf_counter() - begun
    else:
        cpu = time.process_time()
        tokens, seconds = tokenizers_alone(data, arguments.tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([tokens, seconds, time.process_time() - cpu, peak]))


def main() -> None:
    """Both sides in turn, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--file-mb", type=int, default=100, help="size of a file")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        one_side(arguments)
        return
    from tessera.data.tokenizer import save_tokenizer, train_bpe

    with tempfile.TemporaryDirectory() as place:
        data, tokenizer = Path(place, "data"), Path(place, "tokenizer")
        data.mkdir(), tokenizer.mkdir()
        write_text(data, arguments.mb * 10**6, arguments.file_mb * 10**6)
        size = sum(path.stat().st_size for path in data.iterdir())
        texts = (path.read_text() for path in standard_library_files(10**7))
        save_tokenizer(train_bpe(texts, arguments.vocabulary), tokenizer)
        found: dict[str, list[list[float]]] = {"tessera": [], "tokenizers": []}
        for _ in range(arguments.rounds):
            for side, rounds in found.items():
                command = [sys.executable, __file__, "--side", side, "--data", str(data), "--tokenizer", str(tokenizer)]
                command += ["--threads", str(arguments.threads)]
                environment = os.environ | {"RAYON_NUM_THREADS": str(arguments.threads)}
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                rounds.append(json.loads(result.stdout.splitlines()[-1]))
    print(
        f"{size / 1e6:,.0f} MB of text in {-(-arguments.mb // arguments.file_mb)} files, {arguments.threads} threads\n"
    )
    print("| | seconds | MB/s | CPU s | CPU s per GB | peak memory | tokens |\n|---|---|---|---|---|---|---|")
    for side, rounds in found.items():
        seconds, cpu = min(one[1] for one in rounds), min(one[2] for one in rounds)
        peak, tokens = max(one[3] for one in rounds), rounds[0][0]
        speed = f"{seconds:.1f} | {size / seconds / 1e6:.2f} | {cpu:.1f} | {cpu / size * 1e9:.0f}"
        print(f"| {side} | {speed} | {human(peak)} | {tokens:,.0f} |")


if __name__ == "__main__":
    main()
