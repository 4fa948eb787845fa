"""The trackers, each with its real library writing on this machine; and that none of them can end a run."""

import importlib.util
import json
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.pool import pool
from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train.run import resolve
from tessera.train.trackers import all as trackers
from tessera.train.trackers.all import Trackers
from train.on_rank import said_on_rank
from train.runs import Workshop, metrics, run

MINIMAL: dict[str, Any] = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}
STEPS = [
    {
        "step": 1,
        "loss": 5.0,
        "learning_rate": 0.0,
        "seconds": {"idle": 0.5, "communication": {"row·col": 3}},
        "mfu": None,
    },
    {"step": 2, "loss": 4.0, "learning_rate": 1e-3, "eval_loss": 4.5, "eval_ppl": 90.0},
]


def config_of(**keys: Any) -> TrainConfig:
    return make_config(MINIMAL | keys)[0]


def tracked(tmp_path: Path, first_step: int = 0, steps: list[dict[str, Any]] = STEPS, **keys: Any) -> list[str]:
    """What a run with these keys says of its trackers, which have been told of `steps`."""
    said: list[str] = []
    opened = Trackers(config_of(**keys), tmp_path, first_step, said.append)
    for record in steps:
        opened.step(record, shown=True)
    opened.close()
    return said


# ---- Who is asked for


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({}, {}),
        ({"report_to": "none", "use_wandb": False, "wandb_project": None}, {}),
        ({"report_to": False, "wandb_project": "", "wandb_mode": "", "trackio_project_name": False}, {}),
        ({"report_to": "tensorboard"}, {"tensorboard": "report_to"}),
        ({"report_to": ["wandb", "mlflow"]}, {"wandb": "report_to", "mlflow": "report_to"}),
        ({"use_tensorboard": True, "use_mlflow": True}, {"tensorboard": "use_tensorboard", "mlflow": "use_mlflow"}),
        ({"wandb_project": "mine"}, {"wandb": "wandb_project"}),
        ({"wandb_project": "mine", "use_wandb": False}, {}),
        ({"use_wandb": True, "wandb_mode": "disabled"}, {}),
        ({"wandb_name": "a name alone"}, {}),
        ({"trackio_project_name": "mine", "trackio_space_id": None}, {"trackio": "trackio_project_name"}),
        ({"use_trackio": True}, {"trackio": "use_trackio"}),
    ],
    ids=str,
)
def test_the_trackers_of_a_config(keys, asked):
    assert config_of(**keys).trackers == asked


def test_another_tracker_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match="report_to: comet_ml\n.*'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        config_of(report_to="comet_ml")
    with pytest.raises(UserError, match="wandb_log_model"):
        config_of(wandb_log_model="end")


def test_a_key_whose_tracker_is_not_asked_for_is_told():
    keys = {"logging_dir": "b", "wandb_name": "a", "mlflow_run_name": "c", "trackio_run_name": "d"}
    notes = make_config(MINIMAL | keys)[1]
    assert [note.partition(":")[0] for note in notes] == [f"{key} has no effect" for key in keys]
    assert not make_config(MINIMAL | keys | {"report_to": ["wandb", "tensorboard", "mlflow", "trackio"]})[1]
    assert not make_config(MINIMAL | {"wandb_project": "a", "wandb_name": "b", "wandb_mode": "disabled"})[1]


def test_a_package_that_is_not_installed_is_named_before_anything_starts(workshop: Workshop, tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else known(name))
    settings = workshop.settings("llama", tmp_path / "run", wandb_project="mine", report_to="tensorboard")
    with pytest.raises(UserError, match="wandb_project: mine\n.*package wandb, which is not installed\n.*pip install"):
        resolve(TrainConfig.model_validate(settings))
    assert not (tmp_path / "run").exists()


# ---- Each library


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of its event files in `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_and_goes_on_with_a_run(tmp_path):
    (said,) = tracked(tmp_path, use_tensorboard=True)
    assert said == f"tensorboard: tensorboard --logdir {tmp_path / 'runs'}"
    found = scalars(tmp_path / "runs")
    assert found["train/loss"] == [(1, 5.0), (2, 4.0)]
    assert (found["eval/loss"], found["eval/ppl"]) == ([(2, 4.5)], [(2, 90.0)])
    within = {"train/seconds/idle", "train/seconds/communication/row_col"}
    assert found.keys() == {"train/loss", "train/learning_rate", "eval/loss", "eval/ppl"} | within
    tracked(tmp_path, 1, [{"step": 2, "loss": 3.0}], use_tensorboard=True)
    assert scalars(tmp_path / "runs")["train/loss"] == [(1, 5.0), (2, 3.0)], "the step is done again"
    tracked(tmp_path, use_tensorboard=True, logging_dir=str(tmp_path / "elsewhere"))
    assert scalars(tmp_path / "elsewhere")["train/loss"] == [(1, 5.0), (2, 4.0)]


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """A home without keys, and none in the environment."""
    for key in [key for key in os.environ if key.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("keys", [{"wandb_mode": "offline"}, {}], ids=["offline", "no key"])
def test_wandb_offline_keeps_every_number(tmp_path, no_wandb_account, keys):
    named = {"wandb_project": "mine", "wandb_name": "a name", "wandb_run_id": "id0", "wandb_entity": "us"}
    (said,) = tracked(tmp_path, **named, **keys)
    assert said.startswith("wandb: ") and f"kept in {tmp_path / 'wandb'}" in said
    assert ("no API key is on this machine" in said) == (not keys)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-id0.wandb")
    run_record, history = wandb_records(file)
    assert (run_record.project, run_record.display_name, run_record.entity) == ("mine", "a name", "us")
    found = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in history]
    assert [(f["train/loss"], f["_step"]) for f in found] == [(5.0, 1), (4.0, 2)]
    assert found[1]["eval/loss"] == 4.5 and "eval/loss" not in found[0]


def test_wandb_is_online_where_a_key_is_and_nothing_else_is_said(tmp_path, no_wandb_account, monkeypatch):
    import wandb

    modes: list[str] = []

    def init(**how: Any) -> Any:
        modes.append(how["mode"])
        return SimpleNamespace(url="https://where", finish=lambda: None)

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text("machine elsewhere login user password secret\n")
    assert "no API key" in tracked(tmp_path, steps=[], use_wandb=True)[0]
    (tmp_path / "home/.netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert tracked(tmp_path, steps=[], use_wandb=True) == ["wandb: https://where"]
    (tmp_path / "home/.netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert tracked(tmp_path, steps=[], use_wandb=True) == ["wandb: https://where"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracked(tmp_path, steps=[], use_wandb=True) != ["wandb: https://where"]
    tracked(tmp_path, steps=[], use_wandb=True, wandb_mode="online")
    assert modes == ["offline", "online", "online", "offline", "online"]


def wandb_records(file: Path) -> tuple[Any, list[Any]]:
    """The record of the run, and those of its steps, in a file that wandb's own process writes, once it is whole."""
    end = time.monotonic() + 30
    while True:
        with suppress(ValueError, struct.error):
            records = list(records_in(file.read_bytes()))
            if any(record.HasField("exit") for record in records):
                (run_record,) = (record.run for record in records if record.HasField("run"))
                return run_record, [record.history for record in records if record.HasField("history")]
        assert time.monotonic() < end, "its file has no end"
        time.sleep(0.05)


def records_in(data: bytes) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format.

    That is parts (checksum 4, length 2, kind 1, content) in blocks of 32 KiB, of which no part crosses the end. Kinds
    are 1 whole, 2 first, 3 middle, 4 last.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    at, content = 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            try:
                yield Record.FromString(content)
            except DecodeError as error:  # half written
                raise ValueError from error
            content = b""


def test_mlflow_has_every_number_in_a_local_store(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    keys = {"use_mlflow": True, "mlflow_experiment_name": "mine", "mlflow_run_name": "a name", "learning_rate": 3e-4}
    monkeypatch.setattr("tessera.train.trackers.mlflow.find_spec", lambda name: None)
    for place, uri in ((tmp_path / "mlruns", {}), (tmp_path / "b", {"mlflow_tracking_uri": str(tmp_path / "b")})):
        (said,) = tracked(tmp_path, **keys, **uri)
        assert said.startswith("mlflow: experiment mine, run ")
        client = MlflowClient(tracking_uri=str(place))
        experiment = client.get_experiment_by_name("mine")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_name, found.info.status) == ("a name", "FINISHED")
        assert found.data.params["learning_rate"] == "0.0003"
        history = client.get_metric_history(found.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(1, 5.0), (2, 4.0)]
        assert found.data.metrics["eval/ppl"] == 90.0


def test_trackio_gets_project_name_and_space(tmp_path, monkeypatch):
    told: list[Any] = []
    one = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers["train/loss"])))
    fake = SimpleNamespace(init=lambda **how: told.append(how) or one, finish=lambda: told.append("finish"))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    keys = {"trackio_project_name": "mine", "trackio_run_name": "a name", "trackio_space_id": "me/space"}
    assert tracked(tmp_path, **keys) == ["trackio: https://huggingface.co/spaces/me/space"]
    asked = {key: told[0][key] for key in ("project", "name", "space_id")}
    assert asked == {"project": "mine", "name": "a name", "space_id": "me/space"}
    assert told[0]["config"]["base_model"] == "./my-llama" and told[1:] == [(1, 5.0), (2, 4.0), "finish"]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio cannot be installed beside pillow 13")
def test_trackio_has_every_number_in_its_local_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    said = tracked(tmp_path, trackio_project_name="mine", trackio_run_name="a name")
    assert said == ["trackio: trackio show --project mine"]
    with closing(sqlite3.connect(tmp_path / "store/mine.db")) as store:
        found = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in found] == [("a name", 1), ("a name", 2)]
    assert json.loads(found[1][2]) == {
        "train/loss": 4.0,
        "train/learning_rate": 1e-3,
        "eval/loss": 4.5,
        "eval/ppl": 90.0,
    }


# ---- In a run


def test_a_run_tells_its_trackers_of_logging_steps_and_evaluations(workshop: Workshop, tmp_path):
    own = {"report_to": "tensorboard", "logging_steps": 2, "val_set_size": 5, "eval_steps": 3}
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, **own)
    losses = {m["step"]: m["loss"] for m in run(settings)}
    found = scalars(tmp_path / "run/runs")
    assert [step for step, _ in found["train/loss"]] == [2, 3, 4, 5]
    assert [value for _, value in found["train/loss"]] == pytest.approx([losses[s] for s in (2, 3, 4, 5)], rel=1e-6)
    assert [step for step, _ in found["eval/loss"]] == [3, 5]
    assert len(list((tmp_path / "run/runs").iterdir())) == 1, "one rank writes"


def test_a_run_without_these_keys_uses_no_tracker(workshop: Workshop, tmp_path):
    run(workshop.settings("llama", tmp_path / "run", max_steps=1))
    assert not {"runs", "wandb", "mlruns"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("moment", ["open", "step", "close"])
def test_a_tracker_that_fails_is_told_once_and_ends_no_run(tmp_path, monkeypatch, moment):
    class Failing:
        where = "here"

        def __init__(self, *_: Any) -> None:
            self.at("open")

        def at(self, now: str) -> None:
            if now == moment:
                raise OSError(28, "No space left on device")

        def step(self, *_: Any) -> None:
            self.at("step")

        def close(self) -> None:
            self.at("close")

    monkeypatch.setitem(trackers.TABLE, "mlflow", Failing)
    said = tracked(tmp_path, report_to=["mlflow", "tensorboard"])
    failed = [line for line in said if line.startswith("mlflow failed, the run goes on without it:")]
    assert len(failed) == 1 and "No space left" in failed[0]
    assert scalars(tmp_path / "runs")["train/loss"] == [(1, 5.0), (2, 4.0)], "the other one goes on"


def test_a_run_goes_on_without_a_tracker_that_cannot_be_opened(workshop: Workshop, tmp_path):
    (tmp_path / "file").touch()
    own = {"use_tensorboard": True, "logging_dir": str(tmp_path / "file"), "max_steps": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    said = pool(1).run(said_on_rank, settings)[0]
    assert said.count("tensorboard failed") == 1 and "model written" in said and len(metrics(settings)) == 2
