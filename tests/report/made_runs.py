"""Folders of runs that never were: metrics.jsonl, monitor.jsonl and the rest in the form that a run leaves them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tessera.cli.report import report

LLAMA = {
    "model_type": "llama",
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
MACHINES = ["node-a", "node-a", "node-b", "node-b"]


def step(number: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, each step with numbers of its own."""
    return {
        "step": number,
        "loss": 5 - 1 / (number + 1),
        "grad_norm": 1 + 0.001 * number,
        "skipped_steps": 0,
        "learning_rate": 1e-3 / number,
        "epoch": number / 100,
        "tokens": 100 * number,
        "tokens_per_second": 1000.0 + number,
        "step_seconds": 0.1 + 0.0001 * number,
        "mfu": 0.25,
        "memory_gib": 2.0,
        "communicated_bytes": {"col": 1_000_000, "shard": 2_000_000},
        **more,
    }


def monitored(number: int, **more: Any) -> dict[str, Any]:
    """The same of a run that was monitored: of each step 0.1 s, of which compute has 0.05."""
    seconds = {"compute": 0.05, "data": 0.01, "optimizer": 0.01, "idle": 0.005, "other": 0.005, "save": 0.0}
    seconds |= {"evaluation": 0.0, "communication": {"col": 0.015, "shard": 0.005}}
    memory = {"now_gib": 1.5, "peak_gib": 2.5}
    slowest = {"rank": 3, "machine": "node-b", "excess_seconds": 0.02}
    return step(number, **({"seconds": seconds, "memory": memory, "slowest": slowest} | more))


def of_ranks(number: int, compute: list[float]) -> dict[str, Any]:
    """A line of monitor.jsonl."""
    count = len(compute)
    seconds = {term: [0.01] * count for term in ("data", "optimizer", "other", "save", "evaluation")}
    idle = [max(compute) - own for own in compute]
    by_axis = {"col": [0.015] * count, "shard": [0.005] * count}
    whole = {**seconds, "compute": compute, "idle": idle, "communication": by_axis}
    return {"step": number, "seconds": whole, "memory_now_gib": [1.5] * count, "memory_peak_gib": [2.5] * count}


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def make_run(folder: Path, records: list[dict[str, Any]], *, drawn: bool = False, **config: Any) -> Path:
    """A folder with metrics.jsonl and resolved_config.yaml, and, where the layout is to be drawn, which takes its
    time, the config.json that it names."""
    model = folder / "base"
    model.mkdir(parents=True, exist_ok=True)
    if drawn:
        (model / "config.json").write_text(json.dumps(LLAMA))
    write_lines(folder / "metrics.jsonl", records)
    keys = {
        "base_model": str(model),
        "datasets": [{"path": "text", "type": None}],
        "sequence_len": 32,
        "micro_batch_size": 4,
    }
    (folder / "resolved_config.yaml").write_text(json.dumps(keys | {"max_steps": 100} | config))
    return folder


class Elements(HTMLParser):
    """What a page is made of: elements with attributes, the text outside scripts, the JSON for its script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: list[Any] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        self._inside = name
        self._json = dict(attributes).get("type") == "application/json"

    def handle_endtag(self, name: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside == "script" and self._json:
            self.data.append(json.loads(text))
        elif self._inside not in ("script", "style"):
            self.texts.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def chart(self, title: str) -> dict[str, Any]:
        """The embedded numbers of the chart under this title."""
        charts = [data for data in self.data if "lines" in data]
        titles = [a["aria-label"] for name, a in self.elements if name == "svg" and "aria-label" in a]
        return charts[[t for t in titles if t != "Ranks by steps"].index(title)]


def reported(*folders: Path, output: Path | None = None) -> Elements:
    """The page of these runs."""
    report(folders, output, watching=False)
    file = output or folders[0] / ("report.html" if len(folders) == 1 else "compared.html")
    return Elements(file.read_text())
