"""The standard library's source: real text, on every machine."""

import json
from pathlib import Path

from tessera.data.stdlib import standard_library_files


def test_sorted_source_files_up_to_the_limit():
    files = standard_library_files(10**9)
    assert files == sorted(files) and all(file.suffix == ".py" for file in files)
    assert Path(json.__file__).resolve() in {file.resolve() for file in files}
    outside = {"site-packages", "dist-packages", "test", "idlelib"}
    root = Path(json.__file__).parent.parent
    assert not any(outside & set(file.relative_to(root).parts) for file in files)
    assert all(file.read_text("utf-8") for file in files)

    few = standard_library_files(300_000)
    total = sum(file.stat().st_size for file in few)
    assert few == files[: len(few)] and total <= 300_000 < total + files[len(few)].stat().st_size
