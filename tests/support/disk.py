"""File systems that are small, in a mount of their own; tests that need one are skipped where mounting is refused."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory with these `options`, mounted at `folder`."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 30 MB."""
    with mounted(tmp_path / "disk", "size=30m") as folder:
        yield folder


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """One that takes 20 files and folders."""
    with mounted(tmp_path / "disk", "nr_inodes=20") as folder:
        yield folder


def leave_free(folder: Path, left: int) -> None:
    """Fill the file system of `folder` with one file, `ballast`, up to so many bytes."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        content = b"\0" * 4096
        try:
            while True:
                file.write(content)
        except OSError:
            file.truncate(max(0, file.tell() - left))
