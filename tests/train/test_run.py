"""A run is resolved once: what the ranks are handed says all, whatever happens to the files it came from."""

import json
import shutil
from datetime import timedelta

import pytest

from support.pool import pool
from tessera.checkpoint.folder import read_state
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train import trainer
from tessera.train.run import Run, model_of, prepared_run
from train.on_rank import run_on_rank, said_on_rank
from train.runs import Workshop, metrics, run

CHANGES = {
    "plain": {},
    "2d and sections": {
        "tensor_parallel_mode": "2d",
        "tensor_parallel_mesh": {"row": 2, "col": 2},
        "fsdp_config": {"forward_prefetch": True},
        "micro_batch_size": 4,
    },
    "numbers": {"learning_rate": 1, "val_set_size": 0.25, "bf16": "auto", "save_total_limit": 2, "num_epochs": 1.5},
    "no warm-up": {"lr_scheduler": "constant", "warmup_steps": None},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_is_the_same_behind_json(workshop: Workshop, tmp_path, changes):
    settings = workshop.settings("llama", tmp_path / "run", **changes)
    made = prepared_run(TrainConfig.model_validate(settings), 1)
    handed = Run.from_json(made.to_json())
    assert handed == made
    assert handed.config.model_fields_set == made.config.model_fields_set, "what was given is not what was taken"


def test_ranks_read_neither_the_data_nor_the_weights_again(workshop: Workshop, tmp_path):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copyfile(workshop.rows, rows)
    shutil.copytree(workshop.model("llama"), model)
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=3, random_init=True)
    expected = run(settings | {"output_dir": str(tmp_path / "beside")})
    settings |= {"datasets": [{"path": str(rows)}], "base_model": str(model)}
    handed = prepared_run(TrainConfig.model_validate(settings), 2).to_json()
    rows.unlink()
    (model / "model.safetensors").unlink()
    pool(2).run(run_on_rank, handed)
    assert [m["loss"] for m in metrics(settings)] == [m["loss"] for m in expected]


def test_a_window_shorter_than_the_row_is_refused_and_one_as_long_hides_nothing(workshop: Workshop, tmp_path):
    settings = workshop.settings("mistral 64", tmp_path / "run")
    fits = TrainConfig.model_validate(settings | {"sequence_len": 16})
    assert model_of(fits).kind_of(0).window is None
    with pytest.raises(UserError, match="sequence_len: 17\n.*16 tokens.*sliding_window.*\n.*at most 16"):
        model_of(TrainConfig.model_validate(settings | {"sequence_len": 17}))


def test_rows_longer_than_the_model_was_made_for_are_told_of_and_its_positions_raised(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", sequence_len=40, max_steps=1, save_strategy="steps")
    said = pool(1).run(said_on_rank, settings)[0]
    told = "sequence_len 40 is more than the 32 positions that base_model was made for"
    assert told in said
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 40
    assert read_state(folder / "checkpoint-1").source.config_changes["max_position_embeddings"] == 40

    fits = settings | {"output_dir": str(tmp_path / "fits"), "sequence_len": 32}
    assert told not in pool(1).run(said_on_rank, fits)[0]
    assert json.loads((tmp_path / "fits" / "config.json").read_text())["max_position_embeddings"] == 32


def test_a_rank_that_does_not_see_the_prepared_data_ends_the_run(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run")
    handed = prepared_run(TrainConfig.model_validate(settings), 1)
    shutil.rmtree(handed.prepared)
    with pytest.raises(UserError, match="a disk that every machine sees"):
        run_on_rank(handed.to_json())


def test_collectives_wait_as_long_as_group_timeout_minutes_says(workshop: Workshop, tmp_path, monkeypatch):
    config = TrainConfig.model_validate(workshop.settings("llama", tmp_path / "run", group_timeout_minutes=3))
    given = {}

    def begin(backend: str, **how: object) -> None:
        given.update(how)
        raise InterruptedError

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(trainer.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(trainer.dist, "init_process_group", begin)
    with pytest.raises(InterruptedError):
        trainer.train(prepared_run(config, 1))
    assert given["timeout"] == timedelta(minutes=3)
