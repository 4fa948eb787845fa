"""What a run says of its mesh: sizes, links, bytes by formula, the effective batch."""

from dataclasses import replace

from distributed.model_cases import LLAMA
from tessera.config.load import make_config
from tessera.core.mesh import Mesh
from tessera.layout.shape import StepShape
from tessera.plan.traffic import received_bytes, step_transfers
from tessera.train.announce import mesh_lines
from tessera.train.settings import context_line, fitting_layout, parallel_for, step_shape


def lines_of(monkeypatch, here, **keys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    settings = {"base_model": "x", "datasets": [{"path": "y"}], "sequence_len": 12, "micro_batch_size": 4}
    config, _ = make_config(settings | keys)
    parallel = parallel_for(config, LLAMA, Mesh(config.mesh_sizes, rank=0))
    return config, parallel, mesh_lines(config, LLAMA, parallel)


def test_sixteen_ranks_on_two_machines(monkeypatch):
    keys = {"dp_shard_size": 4, "dp_replicate_size": 2, "tensor_parallel_size": 2, "gradient_accumulation_steps": 3}
    _, parallel, lines = lines_of(monkeypatch, 8, **keys)
    axes = [line.split() for line in lines[2:5]]
    assert [words[:5] for words in axes] == [
        ["replicate", "2", "between", "machines", "rows"],
        ["shard", "4", "in", "a", "machine"],
        ["col", "2", "in", "a", "machine"],
    ]
    moved = {line.split()[0]: line.split() for line in lines[6:-2]}
    assert moved["replicate"][1] == moved["replicate·shard·col"][1] == "between" and moved["shard"][1] == "in"
    total = received_bytes(step_transfers(LLAMA, StepShape(4, 12, 3), parallel)) / 2**20
    assert abs(sum(float(words[-1]) for words in moved.values()) - total) < 0.05 * len(moved) + 0.01
    assert lines[-2].startswith("  a machine sends ")
    assert lines[-1] == "effective batch: 4 (micro) × 3 (accumulation) × 16 (ranks) / 2 (tensor) = 96 rows"


def test_a_busy_axis_between_machines_is_told(monkeypatch):
    _, _, apart = lines_of(monkeypatch, 2, tensor_parallel_size=4, dp_shard_size=2)
    _, _, together = lines_of(monkeypatch, 4, tensor_parallel_size=4, dp_shard_size=2)
    assert any("col" in line and "between machines" in line for line in apart)
    assert all("between machines" not in line for line in together if line.split()[0] == "col")


def test_shared_sequences_are_said_with_their_reason(monkeypatch):
    keys = {"context_parallel_size": 8, "ulysses_size": 4, "micro_batch_size": 1}
    _, _, lines = lines_of(monkeypatch, 8, **keys)
    assert "context: 8 ranks = ulysses 4 × exchange 2, as ulysses_size says" in lines
    grid = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "micro_batch_size": 1}
    _, _, lines = lines_of(monkeypatch, 4, **grid)
    why = "micro_batch_size 1 does not divide by them"
    assert f"context: the ranks along row 2 share sequences too, by exchange: {why}" in lines
    cube = {"tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 8, "row": 2}, "micro_batch_size": 1}
    _, _, lines = lines_of(monkeypatch, 16, **cube)
    assert f"context: the ranks along row 2 share sequences too, by exchange: {why}" in lines
    _, _, lines = lines_of(monkeypatch, 6, **cube | {"tensor_parallel_mesh": {"inner": 3, "row": 2}})
    why += ", nor do heads by col × inner"
    assert f"context: the ranks along row 2 · inner 3 share sequences too, by exchange: {why}" in lines
    assert not any("context" in line for line in lines_of(monkeypatch, 2, tensor_parallel_size=2)[2])


def test_auto_compares_the_heads_that_tensor_ranks_leave_on_the_machines_of_the_run():
    """Of a tensor pair each rank has 4 query heads and the 4 kv heads that they read; a machine of 4 has two pairs."""
    settings = {"base_model": "x", "datasets": [{"path": "y"}], "sequence_len": 64, "context_parallel_size": 8}
    config, _ = make_config(settings | {"tensor_parallel_size": 2, "micro_batch_size": 1})
    model = replace(LLAMA, num_kv_heads=8)
    fitting = fitting_layout(config, model, 4)
    assert fitting.ulysses_size == 2 and fitting_layout(config, model).ulysses_size == 4
    assert context_line(fitting, model, 4) == (
        "context: 8 ranks = ulysses 2 × exchange 4: the 4 query heads of a rank and its machine allow ulysses 1 or 2, "
        "with 160 + 960 or 128 + 480 elements to receive a token and layer, inside + between machines, where fewest "
        "count first (rows of one document)"
    )
    rows = config.model_copy(update={"micro_batch_size": 8})
    assert fitting_layout(rows, model).ulysses_size == 1, "each rank owns a row, and nothing moves"


def test_one_process_says_its_batch_alone(monkeypatch):
    _, _, lines = lines_of(monkeypatch, 1)
    assert len(lines) == 2 and lines[1].endswith("= 4 rows")


def test_what_moves_along_sequence_axes_is_told(monkeypatch):
    keys = {"context_parallel_size": 4, "context_parallel_mode": "ring", "ulysses_size": 2, "tensor_parallel_size": 2}
    long = {"micro_batch_size": 1, "sequence_len": 4096}
    config, parallel, lines = lines_of(monkeypatch, 4, **keys, **long)
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith("  ")}
    assert told["ring"].startswith("between machines ") and told["ulysses"].startswith("in a machine ")
    cuts = [line for line in lines if "tokens of each sequence" in line]
    assert [line.split()[:2] for line in cuts] == [["ring", "2"], ["ulysses", "2"]]
    moved = step_transfers(LLAMA, step_shape(config, parallel), parallel)
    for axis in ("ring", "ulysses"):
        of_axis = received_bytes(each for each in moved if each.axis == axis) / 2**20
        assert of_axis > 0.1 and abs(float(told[axis].split()[-1]) - of_axis) < 0.051
    batch = "effective batch: 1 (micro) × 1 (accumulation) × 8 (ranks) / (2 (tensor) × 4 (context)) = 1 row"
    assert batch in lines
