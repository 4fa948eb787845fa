"""Small data sets, and a config with the keys that the data room reads."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.data.helpers import TEXT, entry

from tessera.config.sections.model import SpecialTokensConfig
from tessera.data.tokenizer import TextTokenizer, save_tokenizer, train_bpe


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes text, bytes, or a list of JSON rows to a file of that name under `tmp_path`/in."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path, tokenizer: TextTokenizer) -> Callable[..., SimpleNamespace]:
    """A config over paths or entries, with the small tokenizer unless told otherwise."""

    def settings(*datasets: Any, **changes: Any) -> SimpleNamespace:
        given = {
            "base_model": str(tmp_path / "no-model"),
            "datasets": [entry(d) if isinstance(d, Path) else d for d in datasets],
            "tokenizer": str(tokenizer.folder),
            "special_tokens": SpecialTokensConfig(),
            "tokens": [],
            "sequence_len": 16,
            "excess_length_strategy": "drop",
            "min_sample_len": None,
            "train_on_inputs": False,
            "val_set_size": 0,
            "seed": 42,
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": None,
            "dataset_processes": 2,
            "test_datasets": None,
        }
        return SimpleNamespace(**given | changes)

    return settings


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A byte-level BPE trained on TEXT, in a folder of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_bpe([TEXT], 280)
    save_tokenizer(trained, folder)
    return TextTokenizer(trained.backend, trained.eos_id, folder)
