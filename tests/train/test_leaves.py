"""What a run leaves beside its numbers: loss.png, the model card, and the model in the dtype of its base."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from support.forked import tessera
from support.pool import pool
from tessera.config.schema import TrainConfig
from tessera.models.hub import dtype_of_folder
from tessera.train.card import _PASSWORD, is_ours
from tessera.train.plots import plot_loss
from tessera.train.run import prepared_run
from tessera.train.trainer import train
from train.on_rank import said_on_rank, stopped_on_rank
from train.runs import Workshop, command, exported, metrics, run

SHORT = {"max_steps": 2, "warmup_steps": 1}


def loss_and_drawn(records: list[dict[str, Any]]) -> tuple[int, int]:
    """How many points of a plot are in the colour of loss, and in that of eval_loss."""
    image = Image.open(io.BytesIO(plot_loss(records))).convert("RGB")
    assert image.size == (800, 450)
    colours = [(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)]
    counts = {colour: count for count, colour in image.getcolors(800 * 450) or []}
    return counts.get(colours[0], 0), counts.get(colours[1], 0)


# ---- loss.png


def test_the_plot_has_loss_and_eval_loss_and_grows_with_the_run():
    steps = [{"step": s, "loss": 5 - s / 10} for s in range(1, 21)]
    loss, evaluated = loss_and_drawn(steps)
    assert loss > 200 and evaluated == 0
    both = [*steps[:10], steps[10] | {"eval_loss": 4.5}, *steps[11:-1], steps[19] | {"eval_loss": 3.5}]
    assert loss_and_drawn(both)[1] > 100
    assert plot_loss(steps) != plot_loss(steps[:10])
    # a skipped step, a run of one step, and one without any
    assert loss_and_drawn([*steps[:5], {"step": 6, "loss": None}, *steps[6:]])[0] > 200
    assert loss_and_drawn(steps[:1])[0] > 5 and plot_loss([])


def test_a_command_leaves_its_plot_and_a_run_that_goes_on_draws_it_again(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", **SHORT, save_steps=2)
    assert tessera(*command(settings)[3:]).codes == [0]
    first = (tmp_path / "run/loss.png").read_bytes()
    assert first == plot_loss(metrics(settings))
    assert tessera(*command(settings | {"max_steps": 4, "resume_from_checkpoint": True})[3:]).codes == [0]
    second = (tmp_path / "run/loss.png").read_bytes()
    assert second == plot_loss(metrics(settings)) != first and len(metrics(settings)) == 4


def test_a_run_that_is_stopped_has_a_plot_and_no_card(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=5)
    pool(1).run(stopped_on_rank, settings, 2, False)
    assert (tmp_path / "run/loss.png").exists() and not (tmp_path / "run/README.md").exists()


def test_what_cannot_be_drawn_is_told_and_ends_no_run(workshop: Workshop, tmp_path, monkeypatch):
    def broken(records: object) -> bytes:
        raise ImportError("no fonts here")

    settings = workshop.settings("llama", tmp_path / "run", **SHORT)
    handed = prepared_run(TrainConfig.model_validate(settings), 1)
    said: list[str] = []
    monkeypatch.setattr("tessera.train.records.plot_loss", broken)
    monkeypatch.setattr("tessera.train.notes.Notes.write", lambda notes, *_: setattr(notes, "say", said.append))
    train(handed)
    assert said == ["loss.png was not made: no fonts here"]


# ---- The card


def card_of(settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The metadata of a model card, and its text."""
    _, head, body = (Path(settings["output_dir"]) / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_model_was_made_from_and_how(workshop: Workshop, tmp_path):
    own = {"tensor_parallel_size": 2, "val_set_size": 5, "max_steps": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    last = run(settings)[-1]
    head, body = card_of(settings)
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tessera"]}
    for text in (
        f"| base model | `{settings['base_model']}` (llama, 47,072 parameters) |",
        f"| data | `{workshop.rows}`: 21 rows of at most 16 tokens, 5 more held out |",
        f"| trained for | 2 steps, {last['tokens']:,} learnt tokens |",
        f"| loss | {last['loss']:.4g} |",
        f"| eval_loss | {last['eval_loss']:.4g} |",
        f"| eval_ppl | {last['eval_ppl']:.4g} |",
        "| weights | float32 |",
        "| layout | col 2 (2 processes) |",
        f"torch {torch.__version__.partition('+')[0]}",
        f"transformers {transformers.__version__}",
        "(loss.png)",
    ):
        assert text in body, text
    configuration = body.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(configuration) == settings
    loading = body.partition("```python\n")[2].partition("```")[0]
    assert "AutoTokenizer" not in loading, "the rows needed none"
    names: dict[str, Any] = {}
    exec(loading, names)
    assert names["model"].dtype == torch.float32


def test_a_card_has_no_password():
    config = "mlflow_tracking_uri: https://me:secret@host:5000/x\nwandb_name: a@b\n"
    assert _PASSWORD.sub(r"\1…@", config) == "mlflow_tracking_uri: https://…@host:5000/x\nwandb_name: a@b\n"


def test_a_model_of_the_hub_is_named_to_the_hub(workshop: Workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.train.run.resolve_model_folder", lambda *_, **__: workshop.model("llama"))
    settings = workshop.settings("llama", tmp_path / "run", **SHORT) | {"base_model": "owner/name"}
    train(prepared_run(TrainConfig.model_validate(settings), 1))
    assert card_of(settings)[0]["base_model"] == "owner/name"


def test_a_run_s_own_card_is_written_anew_and_no_other(workshop: Workshop, tmp_path):
    settings, card = workshop.settings("llama", tmp_path / "run", **SHORT), tmp_path / "run/README.md"
    run(settings)
    first = card.read_text()
    run(settings | {"max_steps": 3})
    assert "| trained for | 3 steps" in card.read_text() and is_ours(card)
    for theirs in ("# mine\n", first + "a line of my own\n", ""):
        card.write_text(theirs)
        said = pool(1).run(said_on_rank, settings)[0]
        assert card.read_text() == theirs and "model written to" in said


# ---- The dtype


def base_in(
    folder: Path, source: Path, dtype: torch.dtype, said: dict[str, str] | None = None, scale: float = 1
) -> str:
    """A copy of a model folder with its weights in `dtype`; config.json says so, or what `said` gives."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= scale  # a norm follows: the loss stays a number
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config | ({"dtype": name} if said is None else said)))
    return str(folder)


def dtypes(settings: dict[str, Any]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in exported(settings).values()}


@pytest.mark.parametrize("size", [1, 2])
def test_a_bfloat16_folder_gives_a_bfloat16_folder_from_float32_training(workshop: Workshop, tmp_path, size):
    base = base_in(tmp_path / "base", workshop.model("llama"), torch.bfloat16)
    settings = workshop.settings("llama", tmp_path / "run", **SHORT, tensor_parallel_size=size) | {"base_model": base}
    said = pool(size).run(said_on_rank, settings)[0]
    assert f"model written to {tmp_path}/run in bfloat16, as base_model" in said
    assert dtypes(settings) == {torch.bfloat16}
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run", dtype="auto", output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16 and not any(told.values())
    wide = settings | {"output_dir": str(tmp_path / "wide"), "save_dtype": "float32"}
    run(wide)
    assert dtypes(wide) == {torch.float32}
    whole = exported(wide)
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in exported(settings).items())


def test_checkpoints_stay_as_trained(workshop: Workshop, tmp_path):
    own = {"save_dtype": "bfloat16", "save_steps": 2}
    settings = workshop.settings("llama", tmp_path / "run", **SHORT, **own)
    run(settings)
    assert dtypes(settings) == {torch.bfloat16}
    ended = tessera("convert", str(tmp_path / "run/checkpoint-2"), str(tmp_path / "whole"))
    assert ended.codes == [0] and "in float32" in ended.out[0]
    whole = load_file(tmp_path / "whole/model.safetensors")
    narrow = exported(settings)
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert any(not torch.equal(narrow[name].float(), tensor) for name, tensor in whole.items())


def test_random_weights_are_float32_whatever_config_json_says(workshop: Workshop, tmp_path):
    base = base_in(tmp_path / "base", workshop.model("llama"), torch.bfloat16)
    settings = workshop.settings("llama", tmp_path / "run", **SHORT, random_init=True) | {"base_model": base}
    run(settings)
    assert dtypes(settings) == {torch.float32}
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(("scale", "expected"), [(1.0, torch.float16), (1e6, torch.float32)])
def test_weights_too_large_for_float16_are_handed_out_in_float32(workshop: Workshop, tmp_path, scale, expected):
    base = base_in(tmp_path / "base", workshop.model("llama"), torch.float32, {"torch_dtype": "float16"}, scale)
    settings = workshop.settings("llama", tmp_path / "run", **SHORT, tensor_parallel_size=2) | {"base_model": base}
    said = pool(2).run(said_on_rank, settings)[0]
    assert dtypes(settings) == {expected}
    assert ("too large for float16" in said) == (expected == torch.float32)
    assert json.loads((tmp_path / "run/config.json").read_text())["torch_dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("said", "stored", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.float32, "bfloat16"),
        ({"torch_dtype": "float16"}, torch.float32, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.bfloat16, "float32"),
        ({}, torch.bfloat16, "bfloat16"),
        ({}, torch.float64, "float32"),
        ({"dtype": "float64"}, torch.float16, "float16"),
        ({"dtype": ["bfloat16"]}, torch.float32, "float32"),
    ],
    ids=str,
)
def test_the_dtype_of_a_folder(workshop: Workshop, tmp_path, said, stored, expected):
    base = base_in(tmp_path / "base", workshop.model("llama"), stored, said)
    assert dtype_of_folder(Path(base)) == expected


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="save_dtype"):
        TrainConfig.model_validate({"base_model": "m", "datasets": [{"path": "a"}], "save_dtype": "float8"})
