"""Runs all tests in two processes side by side: many wait, for ranks, processes or timeouts, and leave cores idle.

    python tests/side_by_side.py [options of pytest]

The folders of BESIDE, those that start processes of their own and some more for balance, run beside all others. Their
output follows when both have ended.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = (
    *("benchmarks", "checkpoint", "cli", "config", "data", "demos", "docs", "doctor", "launch", "monitor", "report"),
    "verify",
)
NOTHING_TO_RUN = 5


def parts() -> tuple[list[str], list[str]]:
    """The folders with tests in two parts; each folder is in one of them."""
    folders = sorted({file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")})
    return [name for name in folders if name not in BESIDE], [name for name in folders if name in BESIDE]


def main(options: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *options]
    ours, beside = ([f"tests/{name}" for name in part] for part in parts())
    with tempfile.TemporaryFile("w+") as output:
        own_cache = ["-o", "cache_dir=.pytest_cache/beside"]
        other = subprocess.Popen([*pytest, *own_cache, *beside], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            codes = [subprocess.run([*pytest, *ours], cwd=ROOT).returncode, other.wait()]
        finally:
            other.terminate()
            other.wait()
            output.seek(0)
            print("\n== beside", *beside, flush=True)
            print(output.read(), flush=True)
    failed = [code for code in codes if code not in (0, NOTHING_TO_RUN)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
