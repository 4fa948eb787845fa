"""Real text that every machine has: the source of the Python standard library that runs this."""

import sysconfig
from pathlib import Path

EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"})
"""What others installed, tests (some hold broken files on purpose), and tables of characters rather than code."""


def standard_library_files(limit_bytes: int) -> list[Path]:
    """Paths of the .py files of the standard library, sorted, as many as fit into `limit_bytes` together.

    Empty files and files that are not UTF-8 are left out. Empty where the interpreter carries no source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files, total = [], 0
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED.intersection(path.relative_to(root).parts):
            continue
        content = path.read_bytes()
        if not content or not _is_utf8(content):
            continue
        total += len(content)
        if total > limit_bytes:
            break
        files.append(path)
    return files


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
