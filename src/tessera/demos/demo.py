"""`tessera demo`: a small Llama on real text at tensor size 2, checked against one process and plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tessera.core import terminal
from tessera.core.device import stay_on_cpu_without_gpus
from tessera.core.errors import RunFailed, UserError
from tessera.data.samples import open_samples, unigram_entropy
from tessera.data.stdlib import standard_library_files
from tessera.launch.launch import launch
from tessera.train.notes import SUMMARY
from tessera.train.plots import plot_loss, read_metrics

STEPS, COMPARED, TOLERANCE = 200, 8, 2e-5
MARK = ".tessera-demo"
TEXT_BYTES = 6_000_000
PROMPT = "def "

# 9.6M parameters, as a Hugging Face config.json
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

TRAINING = {
    "random_init": True,
    "tokenizer": {"train": "bpe", "vocab_size": 4096},
    "sequence_len": 256,
    "micro_batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 20,  # longer than the comparison: its steps have the same rates whatever max_steps is
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "val_set_size": 48,
    "bf16": False,
    "save_strategy": "no",
    "tensor_parallel_size": 2,
}


def demo(output: Path, steps: int | None) -> None:
    """Run the demonstration into `output`; exits with 1 when the numbers are not those of one process."""

    console = terminal.console()
    clear(output)
    stay_on_cpu_without_gpus(2)
    config = write_inputs(output, steps or STEPS)
    console.rule("training at tensor size 2")
    _finish(output / "run", config)
    console.rule("the first steps again, in one process")
    alone = output / "one-process"
    alone.mkdir()
    shutil.copytree(output / "run" / "prepared", alone / "prepared")
    steps_compared = min(COMPARED, steps or STEPS)
    _finish(alone, config, "tensor_parallel_size=1", f"max_steps={steps_compared}", f"output_dir={alone}")
    report(console, output)


def _finish(run: Path, config: Path, *overrides: str) -> None:
    """Train to the last step into `run`. RunFailed: a signal has stopped it before, which ends the demonstration."""
    launch(config, overrides)
    if not (run / SUMMARY).exists():  # written after the last step alone
        done = read_metrics(run)[-1]["step"]
        text = f"the demonstration was stopped after step {done} of its run in {run}: there is nothing to compare"
        raise RunFailed(f"{text}; started again, it begins anew")


def clear(output: Path) -> None:
    """Remove an earlier demonstration; a folder that holds anything else is left alone."""
    if output.exists() and any(output.iterdir()) and not (output / MARK).exists():
        raise UserError("--output", output, "holds something that is no earlier demo", "name a new or empty folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARK).touch()


def write_inputs(output: Path, steps: int) -> Path:
    """The text, the model's config.json and the YAML file of the run; returns the last."""

    text = output / "text"
    text.mkdir()
    files = standard_library_files(TEXT_BYTES)
    if not files:
        raise RunFailed("this Python carries no source of its standard library to train on")
    for number, file in enumerate(files):
        shutil.copyfile(file, text / f"{number:04d}-{file.name}")
    (output / "model").mkdir()
    (output / "model" / "config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    places = {"base_model": str(output / "model"), "output_dir": str(output / "run")}
    config = {
        **places,
        "datasets": [{"path": str(text)}],
        **TRAINING,
        "max_steps": steps,
        "eval_steps": max(1, steps // 4),
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return output / "config.yaml"


def report(console: Console, output: Path) -> None:
    """What the run shows: memory, traffic, the eval_loss, a sample, the plot, and the comparison."""

    run = output / "run"
    summary = json.loads((run / "summary.json").read_text())
    records = read_metrics(run)
    console.rule("what it took")
    console.print(ranks_table(summary), axes_table(summary))
    entropy = unigram_level(run)
    held_out = records[-1]["eval_loss"]
    console.rule("what it learnt")
    console.print(f"eval_loss {held_out:.4f} nats a token; the unigram entropy of the text is {entropy:.4f}")
    loss, sample = in_transformers(run)
    console.print(f"the same held-out rows through plain transformers, from the exported folder: {loss:.4f}")
    console.print("a sample it generates there:")
    console.print(sample, style="cyan", markup=False)
    (output / "loss.png").write_bytes(plot_loss(records, ("unigram entropy", entropy)))
    console.rule("the numbers of one device")
    worst = compare(console, records, read_metrics(output / "one-process"))
    console.print(f"loss plot: {output / 'loss.png'}\nmodel for transformers: {run}", soft_wrap=True)
    if not abs(loss - held_out) <= TOLERANCE * held_out:
        raise RunFailed(f"plain transformers find an eval_loss of {loss:.6f}, the run {held_out:.6f}")
    if not worst <= TOLERANCE:
        raise RunFailed(f"tensor size 2 and one process differ by {worst:.1e}, more than {TOLERANCE:.0e}")
    if len(records) >= STEPS and not held_out < entropy:
        raise RunFailed(f"the eval_loss {held_out:.4f} is not below the unigram entropy {entropy:.4f}")


def ranks_table(summary: dict[str, Any]) -> Table:
    """Memory of each rank."""
    table = Table(title="memory by rank")
    for heading in ("rank", "parameters held", "of the model", "peak memory, MiB"):
        table.add_column(heading, justify="right")
    for rank, held in enumerate(summary["ranks"]):
        share = held["parameters"] / summary["parameters"]
        peak = f"{held['peak_memory_bytes'] / 2**20:.0f}"
        table.add_row(str(rank), f"{held['parameters']:,}", f"{share:.1%}", peak)
    return table


def axes_table(summary: dict[str, Any]) -> Table:
    """What each mesh axis carried in a step."""
    table = Table(title="communicated by mesh axis, in each step")
    for heading in ("axis", "collective", "calls", "MB"):
        table.add_column(heading, justify="right")
    for row in summary["collectives"]:
        table.add_row(row["axis"], row["kind"], str(row["calls"]), f"{row['bytes'] / 1e6:.2f}")
    return table


def unigram_level(run: Path) -> float:
    """Nats a token of a model that knows only how frequent tokens are."""

    prepared = run / "prepared"
    return unigram_entropy(
        open_samples(prepared, "train"), open_samples(prepared, "eval"), int(str(MODEL["vocab_size"]))
    )


def in_transformers(run: Path) -> tuple[float, str]:
    """The loss of the rows held out and a sample (top-k, seeded), by the model as plain transformers loads it."""
    # the demonstration trains without them
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = open_samples(run / "prepared", "eval")
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(rows)):
            ids = torch.from_numpy(rows[index][0].astype("int64")).unsqueeze(0)
            targets = ids.shape[1] - 1
            total += model(input_ids=ids, labels=ids).loss.item() * targets
            count += targets
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = model.generate(prompt, max_new_tokens=80, do_sample=True, top_k=20, pad_token_id=0)
    return total / count, str(tokenizer.decode(tokens[0]))


def compare(console: Console, parallel: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
    """Print the steps side by side; the largest relative difference of loss and gradient norm."""
    table = Table(title=f"loss and gradient norm of the first {len(alone)} steps, float32")
    for heading in ("step", "loss, size 2", "loss, size 1", "norm, size 2", "norm, size 1", "difference"):
        table.add_column(heading, justify="right")
    worst = 0.0
    for two, one in zip(parallel, alone, strict=False):
        difference = max(abs(two[key] - one[key]) / abs(one[key]) for key in ("loss", "grad_norm"))
        worst = max(worst, difference)
        numbers = [f"{r[key]:.6f}" for key in ("loss", "grad_norm") for r in (two, one)]
        table.add_row(str(two["step"]), *numbers, f"{difference:.1e}")
    console.print(table)
    console.print(f"largest relative difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    return worst
