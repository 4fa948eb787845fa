"""`tessera train` with sizes that do not fit: one message with those that do, code 2, nothing started or written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.forked import tessera
from tessera.cli.main import main
from tessera.launch import launch
from train.runs import LLAMA, SETTINGS, command, save_rows

PANELS = [("schedule", "summa"), ("schedule", "cannon"), ("slices", 2)]
OFF = {f"tensor_parallel_{switch}": False for switch in ("prefetch", "defer", "overlap")}
GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "micro_batch_size": 2}


class Started(Exception):
    """The launcher was about to start its ranks."""


@pytest.fixture
def settings(tmp_path) -> dict[str, Any]:
    """Those of a run of a model with hidden 32, ffn 48, 8 heads, 2 kv heads (8 features), vocabulary 509, batch 3."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama"}))
    return SETTINGS | {
        "base_model": str(tmp_path / "model"),
        "random_init": True,
        "datasets": [{"path": str(save_rows(tmp_path / "rows.jsonl"))}],
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture(autouse=True)
def launcher(monkeypatch) -> None:
    """Without ranks: it raises where it would start them."""

    def start(arguments, world, *_):
        raise Started(world)

    monkeypatch.setattr(launch, "run_workers", start)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch, settings) -> Callable[..., int]:
    """How many ranks `tessera train` with these changes would start."""

    def call(*options: str, **changes: Any) -> int:
        monkeypatch.setattr("sys.argv", ["tessera", *command(settings | changes, *options)[3:]])
        with pytest.raises(Started) as started:
            main()
        return started.value.args[0]

    return call


@pytest.fixture
def refused(monkeypatch, capsys, settings, tmp_path) -> Callable[..., str]:
    """The complaint of `tessera train` in this process about `settings` with these changes."""

    def call(*options: str, **changes: Any) -> str:
        words = command(settings | changes, *options)
        before = files(tmp_path)
        monkeypatch.setattr("sys.argv", ["tessera", *words[3:]])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out.count("\n") <= 1, said.out  # the defaults taken
        assert files(tmp_path) == before
        assert "Traceback" not in said.err and len(re.findall(r"^\S", said.err, re.M)) == 1, said.err
        return said.err

    return call


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


MISFITS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "heads": ({"size": 5}, "tensor_parallel_size: 5", ["= 8 of the model 5 ways", "4 or 8 fits"]),
    "hidden": (
        {"mode": "2d", "mesh": {"row": 3, "col": 2}},
        "tensor_parallel_mesh: {row: 3, col: 2}",
        ["cuts hidden_size = 32 of the model 3 ways", "{row: 2, col: 2} or {row: 4, col: 2}", "hidden_size 30 or 33"],
    ),
    "not a cube": (
        {"mode": "3d", "size": 6},
        "tensor_parallel_size: 6",
        ["is not a cube", "tensor_parallel_size: 8 fits", "or tensor_parallel_mesh: {inner: 1, row: 2, col: 2}"],
    ),
    "no depth": (
        {"mode": "2.5d", "size": 3},
        "tensor_parallel_size: 3",
        ["the depth of 2", "tensor_parallel_depth: 3"],
    ),
    "not a square": (
        {"mode": "2d", "size": 2, "schedule": "summa"},
        "tensor_parallel_schedule: summa",
        ["row 1 × col 2", "tensor_parallel_schedule: gather"],
    ),
    "slices": ({"size": 2, "slices": 5}, "tensor_parallel_slices: 5", ["tensor_parallel_slices: 4 or 8"]),
    "a wrong axis": (
        {"mode": "2d", "mesh": {"inner": 2, "col": 2}},
        "tensor_parallel_mesh: {inner: 2, row: 1, col: 2}",
        ["tensor_parallel_mode: 3d"],
    ),
    "keys that disagree": ({"mode": "2d", "size": 4, "mesh": {"col": 2}}, "tensor_parallel_size: 4", ["makes 2"]),
    "several at once": (
        {"mode": "2d", "size": 4, "schedule": "summa", "slices": 2, "keep_gathered": True},
        "tensor_parallel_keep_gathered: true",
        ["\n  tensor_parallel_schedule: gather\n"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_told_before_anything_happens(refused, case):
    changes, opening, told = MISFITS[case]
    message = refused(**{f"tensor_parallel_{key}": value for key, value in changes.items()})
    assert message.startswith(f"{opening}\n  "), message
    for text in told:
        assert text in message, message


def test_what_a_message_proposes_starts(refused, started):
    """The same command with the size that the message gives reaches the point where ranks are started."""
    message = refused(tensor_parallel_size=5)
    proposed = re.findall(r"\d+", message.partition("tensor_parallel_size: ")[2].partition("tensor_parallel_size: ")[2])
    assert proposed
    for size in map(int, proposed[:2]):
        assert started(tensor_parallel_size=size) == size


def test_ranks_share_rows_that_are_too_few_for_them(started):
    assert started(tensor_parallel_mode="2d", tensor_parallel_size=4, micro_batch_size=3) == 4


@pytest.mark.parametrize(("field", "value"), PANELS)
@pytest.mark.parametrize("switch", OFF)
def test_a_switch_of_the_gathered_product_is_refused_with_panels(refused, started, switch, field, value):
    panels = {f"tensor_parallel_{field}": value}
    message = refused(**GRID, **panels, **{switch: False})
    assert message.startswith(f"{switch}: false\n  "), message
    plain = "schedule: gather" if field == "schedule" else "slices: 1"
    assert f"\n  {switch}: true\n  or tensor_parallel_{plain}\n" in message, message
    assert started(**GRID, **panels, **{switch: True}) == started(**GRID, **{switch: False}) == 4


def test_auto_takes_every_switch(started):
    assert started(**GRID, **OFF, tensor_parallel_schedule="auto") == 4


@pytest.mark.parametrize("schedule", ["gather", "auto"])
@pytest.mark.parametrize("data", [{"dp_shard_size": 2}, {"dp_replicate_size": 2}, {}], ids=str)
def test_switches_of_weights_are_refused_where_fsdp_moves_them(refused, started, data, schedule):
    """Also where the processes give the size of the data axis, which the last of these leaves out."""
    changes = data | {"tensor_parallel_size": 2, "tensor_parallel_schedule": schedule}
    axis = "replicate 2" if "dp_replicate_size" in data else "shard 2"
    early, late = "tensor_parallel_prefetch", "tensor_parallel_defer"
    for off, told in {
        (early,): [f"(here {axis}) FSDP2 gathers", "fsdp_config.forward_prefetch", f"\n  {early}: true, or no data"],
        (late,): [f"(here {axis}) FSDP2 sums", f"\n  {late}: true, or no data axes"],
        (early, late): ["fsdp_config.forward_prefetch", f"\n  {early}: true, {late}: true, or no data axes"],
    }.items():
        message = refused("--num-processes", "4", **changes, **dict.fromkeys(off, False))
        assert message.startswith(f"{off[0]}: false\n  "), message
        for text in told:
            assert text in message, message
    assert started("--num-processes", "4", **changes, **{early: True, late: True}) == 4
    assert started("--num-processes", "4", **changes, tensor_parallel_overlap=False) == 4, "this one is not FSDP2's"
    alone = {"tensor_parallel_size": 2, "tensor_parallel_schedule": schedule}
    assert started("--num-processes", "2", **alone, **{early: False, late: False}) == 2, "there are no data axes"


@pytest.mark.parametrize("data", [{"dp_shard_size": 2}, {"dp_replicate_size": 2}], ids=str)
def test_loops_over_a_cube_are_refused_beside_data_axes(refused, started, data):
    cube = {"tensor_parallel_mode": "3d", "tensor_parallel_size": 8, "micro_batch_size": 4}
    message = refused(**cube, **data, tensor_parallel_schedule="summa")
    assert message.startswith("tensor_parallel_schedule: summa\n  beside data axes"), message
    assert started(**cube, **data) == 16 and started(**cube, tensor_parallel_schedule="summa") == 8
    assert started(**GRID, **data, tensor_parallel_schedule="summa") == 8


@pytest.mark.parametrize(("field", "value"), PANELS)
def test_beside_data_axes_no_schedule_makes_a_switch_fit(refused, started, field, value):
    changes = GRID | {"dp_shard_size": 2, f"tensor_parallel_{field}": value}
    message = refused(**changes, tensor_parallel_prefetch=False)
    assert message.endswith("\n  tensor_parallel_prefetch: true\n"), message
    assert started(**changes, tensor_parallel_prefetch=True) == 8


@pytest.mark.parametrize(("field", "value"), [("slices", 2), ("keep_gathered", True)])
def test_two_mistakes_beside_data_axes_are_told_one_by_one(refused, field, value):
    changes = GRID | {"dp_shard_size": 2, "tensor_parallel_schedule": "summa", f"tensor_parallel_{field}": value}
    assert refused(**changes, tensor_parallel_prefetch=False).startswith("tensor_parallel_prefetch: false\n  summa")
    assert refused(**changes).startswith(f"tensor_parallel_{field}: ")


def test_a_misfit_is_told_before_the_number_of_processes(refused):
    message = refused("--num-processes", "6", tensor_parallel_mode="3d", tensor_parallel_size=6)
    assert message.startswith("tensor_parallel_size: 6\n  is not a cube")


def test_a_misfit_in_a_shell(settings, tmp_path):
    before = files(tmp_path)
    done = tessera(*command(settings | {"tensor_parallel_mode": "3d", "tensor_parallel_size": 6})[3:])
    assert done.codes == [2], done.err
    assert "tensor_parallel_mesh: {" in done.err[0] and "Traceback" not in done.err[0]
    assert files(tmp_path).keys() - before.keys() == {tmp_path / "run.yaml"}
