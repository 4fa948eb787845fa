"""Files as people bring them: their losses are those of transformers on the same samples.

The first two files are trained in `make test`: chats that are prepared and packed, texts that stream.
"""

import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from tests.data.chats import chat_tokenizer
from tests.data.helpers import all_rows

from config.brought import FILES
from support.pool import pool
from tessera.config.load import load_config, written_values
from tessera.data.epochs import Packed
from tessera.data.samples import open_samples
from train.brought_on_rank import train_recorded_on_rank
from train.runs import SETTINGS, Workshop, metrics, plain_loop, run
from train.test_parity import SAME

SMALL: dict[str, Any] = {"sequence_len": 400, "max_steps": 3, "learning_rate": 1e-3, "bf16": False, "shuffle": False}
PER_STEP = 2
"""Packed rows of a step: one for each of the ranks that share the data."""


@pytest.mark.slow
def test_a_brought_file_trains_as_transformers_does(workshop: Workshop, tmp_path):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(workshop.model("llama 64"), base)
    chat_tokenizer(base)
    given = [
        {"instruction": f"Add {n}.", "input": "to 7" * (n % 2), "output": f"It is {n * n}." * (n % 3 + 1)}
        for n in range(12)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    path = tmp_path / "config.yml"
    text = FILES["replicas, shards and tensor parallelism"].text
    path.write_text(text.format(folder=base, rows=rows, out=tmp_path))
    config, _ = load_config(path)
    layout = {"dp_replicate_size": 1, "dp_shard_size": 2, "tensor_parallel_size": 2}
    ours = [m["loss"] for m in run(written_values(config) | SMALL | layout)]

    (prepared,) = (tmp_path / "last_run_prepared").glob("*/manifest.json")
    tokenized = tmp_path / "tokenized.jsonl"
    made = [{"input_ids": tokens, "labels": labels} for tokens, labels in all_rows(prepared.parent)]
    tokenized.write_text("".join(json.dumps(row) + "\n" for row in made))
    samples = open_samples(prepared.parent, "train")
    packed = Packed(samples, SMALL["sequence_len"], config.seed, shuffle=False)
    assert 2 * packed.rows_in(0) <= len(made)
    steps = [[s for row in range(PER_STEP) for s in packed.samples(step * PER_STEP + row)] for step in range(3)]
    theirs = SETTINGS | SMALL | {"base_model": str(base), "datasets": [{"path": str(tokenized)}]}
    # the third loss follows the one update that has a rate: after it the two schedules part
    plain = plain_loop(theirs | {"warmup_steps": 1, "adam_beta2": 0.999, "weight_decay": 0.0}, steps=steps)
    assert ours == pytest.approx(plain.losses, rel=SAME)
    assert plain.losses[2] != pytest.approx(plain.losses[0], rel=100 * SAME)


# ---- Each kind of file, with tensor parallelism over two ranks, beside context parallelism where it asks for it

FEW: dict[str, Any] = {"sequence_len": 400, "max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "bf16": False}
FEW |= {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "random_init": False, "wandb_project": None}
FEW |= {"dp_shard_size": 1, "dp_replicate_size": 1, "tensor_parallel_size": 2, "val_set_size": 0}
FEW |= {"evals_per_epoch": None, "save_steps": None, "saves_per_epoch": None, "save_strategy": "no"}
TRAINED = {
    "chats under FSDP1 with Liger": "llama 64",
    "texts that stream": "llama 64 tied",
    "replicas, shards and tensor parallelism": "llama 64",
    "an old file with many blanks": "llama 64",
    "tokenized rows for a hub": "llama 64 tied",
    "FSDP2 in words of FSDP1": "qwen2 64",
    "rows that ranks share": "llama 64",
    "from random weights with Muon": "qwen2 64 tied",
    "rows that stream": "llama 64 tied",
}
"""The files, and the models that they are trained on."""
PACKAGES = {"adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"}
WORDS = ["he", "ll", "hello", "in", "on", "re", "the", "user"]


def rows_of(kind: str | None, number: int) -> dict[str, Any]:
    """A row of a data set of this type."""
    text = " ".join(WORDS[(number * place) % len(WORDS)] for place in range(1, 4 + number % 9))
    names = {"chat_template": "conversations"}
    return {
        None: {"input_ids": [7 + number, *range(20, 30 + number % 7)], "labels": [-100, *range(20, 30 + number % 7)]},
        "alpaca": {"instruction": text, "input": "", "output": f"{number} {text}"},
        "chat_template": {
            names["chat_template"]: [{"from": "human", "value": text}, {"from": "gpt", "value": f"{number} {text}"}]
        },
        "pretrain": {"text": text * 5},
    }[kind]


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The summed loss of a micro-batch, each document by itself."""
    total = torch.zeros(())
    for row in range(len(batch["input_ids"])):
        ids, targets = batch["input_ids"][row], batch["targets"][row]
        documents = torch.zeros_like(ids) if batch["documents"] is None else batch["documents"][row]
        for document in documents.unique():
            own = documents == document
            if (targets[own] != -100).any():
                logits = model(input_ids=ids[own][None]).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, targets[own], reduction="sum")
    return total


def plain_losses(base: Any, config: Any, folder: Any, rates: list[float]) -> list[float]:
    """The losses of transformers and torch.optim.AdamW on the micro-batches that were recorded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    betas, decay = (config.adam_beta1, config.adam_beta2), config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    losses = []
    for step, rate in enumerate(rates):
        batches = torch.load(folder / str(step))
        count = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        model.zero_grad()
        parts = [loss_of(model, batch) / count for batch in batches]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (place > 1)) for place, name in enumerate(TRAINED)]
)
def test_every_kind_of_file_trains_as_transformers_does(name, workshop: Workshop, tmp_path):
    base, rows, seen = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "seen"
    shutil.copytree(workshop.model(TRAINED[name]), base)
    chat_tokenizer(base)
    seen.mkdir()
    path = tmp_path / "config.yml"
    path.write_text(FILES[name].text.format(folder=base, rows=rows, out=tmp_path))
    config, _ = load_config(path)
    if package := PACKAGES.get(config.optimizer):
        pytest.importorskip(package)
    (source,) = config.datasets
    rows.write_text("".join(json.dumps(rows_of(source.type, number)) + "\n" for number in range(40)))
    few = {key: value for key, value in written_values(config).items() if key != "warmup_ratio"} | FEW
    few["datasets"] = [written | {"split": None, "name": None} for written in few["datasets"]]
    pool(2 * config.context_parallel_size).run(train_recorded_on_rank, few, str(seen))
    found = metrics(few)
    ours, rates = [step["loss"] for step in found], [step["learning_rate"] for step in found]
    theirs = plain_losses(base, config, seen, rates)
    assert len(ours) == 2 and rates[0] > 0 and ours[0] == pytest.approx(theirs[0], abs=SAME)
    if config.optimizer.startswith("adamw_torch"):  # what the others do with a gradient: test_optimizers.py
        assert ours[1] == pytest.approx(theirs[1], abs=SAME)
    assert abs(ours[1] - ours[0]) > 100 * SAME
