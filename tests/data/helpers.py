"""What the tests of data share."""

from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.sections.data import DatasetConfig
from tessera.data.documents import Document, Segment
from tessera.data.encode import Encoder
from tessera.data.samples import Origin, Sample, SampleWriter, Split, open_samples

TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"


def entry(path: Path, type: Any = None, field: str = "text", **keys: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), type=type, field=field, **keys)


def all_rows(folder: Path, split: Split = "train") -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every row, as lists."""
    rows = open_samples(folder, split)
    return [(rows[i][0].tolist(), rows[i][1].tolist()) for i in range(len(rows))]


PLACE = Origin(Path("nowhere"))


def encoded(tokenizer, texts, special=True):
    """The ids (int32) that a run gives each text, without an end; `special`: opened as the tokenizer's model has it."""
    documents = [Document(PLACE, (Segment(text),), opened=special) for text in texts]
    found = {id(document): [] for document in documents}
    for part in Encoder(tokenizer, 1).encode((document, None) for document in documents):
        found[id(part.document)].append(part.ids)
    return [np.concatenate(parts) for parts in found.values()]


def row(tokens, labels=None):
    return Sample(np.array(tokens, np.int32), PLACE, None if labels is None else np.array(labels, np.int32))


def saved(folder, name, *rows):
    folder.mkdir(exist_ok=True)
    with SampleWriter(folder / name) as writer:
        for sample in rows:
            writer.append(sample)
    return open_samples(folder, name)
