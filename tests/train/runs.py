"""Runs of the trainer on tiny models and rows, and the plain loop of others that they must equal."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor

from support.pool import pool
from tessera.config.schema import TrainConfig
from train.on_rank import refusal_on_rank as refusal_on_rank
from train.on_rank import train_on_rank

VOCABULARY = 509
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA_64 = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
LLAMA_96 = LLAMA | {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2_64 = GPT2 | {"n_embd": 64, "n_head": 8}
GPT2_96 = GPT2 | {"n_embd": 96, "n_head": 6, "n_inner": 192}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt2 dropout": transformers.GPT2Config(**GPT2),
    "llama 64": transformers.LlamaConfig(**LLAMA_64),
    "llama 64 tied": transformers.LlamaConfig(**LLAMA_64, tie_word_embeddings=True),
    "llama 64 biases": transformers.LlamaConfig(**LLAMA_64, attention_bias=True, mlp_bias=True),
    "llama 96": transformers.LlamaConfig(**LLAMA_96),
    "llama 96 tied": transformers.LlamaConfig(**LLAMA_96, tie_word_embeddings=True),
    "qwen3 64": transformers.Qwen3Config(**LLAMA_64, head_dim=8),
    "qwen2 64": transformers.Qwen2Config(**LLAMA_64),
    "qwen2 64 tied": transformers.Qwen2Config(**LLAMA_64, tie_word_embeddings=True),
    "mistral 64": transformers.MistralConfig(**LLAMA_64, sliding_window=16),  # as long as a row
    "gpt2 64": transformers.GPT2Config(**GPT2_64, **NO_DROPOUT),
    "gpt2 96": transformers.GPT2Config(**GPT2_96, **NO_DROPOUT),
    "gpt2 64 dropout": transformers.GPT2Config(**GPT2_64),
    "gpt2 64 dropout one layer": transformers.GPT2Config(**GPT2_64 | {"n_layer": 1}),
}
SETTINGS: dict[str, Any] = {
    "sequence_len": 16,
    "micro_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "shuffle": False,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "bf16": False,
}
THREE_STEPS = {"max_steps": 3, "warmup_steps": 1}
"""Enough where a step is a step: a rate of zero, the highest, and one that has begun to fall."""
Metrics = list[dict[str, Any]]


def save_model(case: str, folder: Path) -> Path:
    """A random model of `case` as transformers saves it; every parameter random, gains and biases too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[case])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_gain), std=0.1)
    model.save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int = 26) -> Path:
    """Tokenized rows of 3 to 13 tokens, so that every micro-batch is padded; some labels ignored, in one row most."""
    generator = torch.Generator().manual_seed(4)
    with path.open("w") as file:
        for index in range(count):
            length = 13 if index % 3 == 0 else int(torch.randint(3, 13, (), generator=generator))
            ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
            ignored = torch.rand(length, generator=generator) < (0.2 if index else 1.0)
            if index:
                ignored[-1] = False
            else:
                ignored[1:3] = False
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": torch.where(ignored, -100, ids).tolist()}))
            file.write("\n")
    return path


@dataclass(frozen=True)
class Workshop:
    """A model folder of each kind and a file of rows, made once; `settings` are those of a run on them."""

    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def targets(self, indices: Iterable[int] | None = None) -> int:
        """How many labels of the rows with these indices (None: all; they wrap around) are learnt."""
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        chosen = rows if indices is None else [rows[index % len(rows)] for index in indices]
        return sum(label != -100 for row in chosen for label in row["labels"][1:])

    def model(self, case: str) -> Path:
        path = self.folder / case.replace(" ", "-")
        return path if path.exists() else save_model(case, path)

    def settings(self, case: str, output: Path, **changes: Any) -> dict[str, Any]:
        own = {
            "base_model": str(self.model(case)),
            "datasets": [{"path": str(self.rows)}],
            "output_dir": str(output),
        }
        if changes.keys().isdisjoint(("save_steps", "saves_per_epoch", "save_strategy")):
            own["save_strategy"] = "no"  # the last checkpoint costs what a step does
        return SETTINGS | own | changes


def run(settings: dict[str, Any]) -> Metrics:
    """Train on the worker pool of the size that the settings ask for; what metrics.jsonl then holds."""
    pool(TrainConfig.model_validate(settings).world_size).run(train_on_rank, settings)
    return metrics(settings)


def metrics(settings: dict[str, Any]) -> Metrics:
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def command(settings: dict[str, Any], *options: str) -> list[str]:
    """`tessera train` with these settings in a file beside the output folder."""
    path = Path(settings["output_dir"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "tessera", "train", str(path), *options]


def environment(gpus: str = "") -> dict[str, str]:
    """That of a shell that sees these GPUs: nothing of a launcher in it."""
    without = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "COLUMNS")
    return {key: value for key, value in os.environ.items() if key not in without} | {
        "NO_COLOR": "1",
        "CUDA_VISIBLE_DEVICES": gpus,
    }


def forget_last(settings: dict[str, Any]) -> None:
    """As if the run had been killed before its last checkpoint, of a step that `save_steps` does not ask for."""
    output, last = Path(settings["output_dir"]), settings["max_steps"]
    shutil.rmtree(output / f"checkpoint-{last}")
    (output / "LATEST").write_text(f"checkpoint-{last - last % settings['save_steps']}\n")


def run_command(settings: dict[str, Any], *options: str, gpus: str = "") -> "subprocess.CompletedProcess[str]":
    words = command(settings, *options)
    return subprocess.run(words, env=environment(gpus), capture_output=True, text=True, timeout=300)


def exported(settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the model that a run has handed out."""
    return load_file(Path(settings["output_dir"]) / "model.safetensors")


# ---- The loop of somebody else


@dataclass(frozen=True)
class Plain:
    """What the plain loop gives: a loss, gradient norm and learning rate a step, and the model after the last."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    model: transformers.PreTrainedModel


Optimizers = list[torch.optim.Optimizer]


def adamw(model: transformers.PreTrainedModel, settings: dict[str, Any]) -> Optimizers:
    return [
        torch.optim.AdamW(
            model.parameters(),
            lr=settings["learning_rate"],
            betas=(settings.get("adam_beta1", 0.9), settings["adam_beta2"]),
            eps=settings["adam_epsilon"],
            weight_decay=settings["weight_decay"],
        )
    ]


def plain_loop(
    settings: dict[str, Any],
    make: Callable[[Any, dict[str, Any]], Optimizers] = adamw,
    *,
    steps: list[list[int]] | None = None,
) -> Plain:
    """transformers and torch.optim, a row at a time and so without any padding, in the order of the file.

    `make` gives the optimizers, whose rates are the same; `steps` are the rows of each step, where they are others.
    """
    rows = [json.loads(line) for line in Path(settings["datasets"][0]["path"]).read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"], dtype=torch.float32).train()
    samples = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    if steps is not None:
        chunks = [[rows[index] for index in step] for step in steps]
    elif settings["max_steps"] is None:  # one epoch: the last step has fewer rows
        chunks = [rows[first : first + samples] for first in range(0, len(rows), samples)]
    else:
        chunks = [[rows[(s * samples + i) % len(rows)] for i in range(samples)] for s in range(settings["max_steps"])]
    optimizers = make(model, settings)
    timer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["learning_rate"])
    schedule = transformers.get_scheduler("cosine", timer, settings["warmup_steps"], len(chunks))
    plain = Plain([], [], [], model)
    for own in chunks:
        count = sum(label != -100 for row in own for label in row["labels"][1:])
        losses = [_row_loss(model, row, settings.get("label_smoothing_factor", 0.0)) / count for row in own]
        model.zero_grad()
        for loss in losses:
            loss.backward()
        plain.losses.append(sum(loss.item() for loss in losses))
        plain.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        plain.rates.append(schedule.get_last_lr()[0])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                rate = group["lr"]
                group["lr"] = rate.fill_(plain.rates[-1]) if isinstance(rate, Tensor) else plain.rates[-1]
            optimizer.step()
        timer.step()
        schedule.step()
    return plain


def _row_loss(model: transformers.PreTrainedModel, row: dict[str, list[int]], smoothing: float) -> Tensor:
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    targets = torch.tensor(row["labels"][1:])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
