"""`tessera convert`: what it writes is what the trainer itself hands out, and there and back nothing is lost."""

import filecmp
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from support.pool import pool
from tessera.checkpoint import folder as checkpoint_folder
from tessera.checkpoint.convert import convert
from tessera.config.schema import TrainConfig
from tessera.core.errors import RunFailed, UserError
from tessera.models import hub
from tessera.train.run import checkpoint_to_resume
from train.on_rank import said_on_rank
from train.runs import MODELS, Workshop, exported, metrics, run

CASES = ["llama", "llama tied", "gpt2", "qwen3 64"]


@pytest.fixture(scope="module")
def finished(workshop: Workshop, tmp_path_factory):
    """A run of two ranks with a checkpoint at its last step, so that both hold one model; made when asked for."""
    made: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in made:
            output = tmp_path_factory.mktemp("finished") / "run"
            made[case] = workshop.settings(case, output, max_steps=2, save_steps=2, tensor_parallel_size=2)
            run(made[case])
        return made[case]

    return of


def saved(settings: dict[str, Any]) -> Path:
    return Path(settings["output_dir"]) / "checkpoint-2"


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("case", CASES)
def test_a_converted_checkpoint_is_the_model_that_the_run_handed_out(finished, tmp_path, case):
    settings = finished(case)
    told = convert(saved(settings), tmp_path / "out")
    assert told == f"the model of step 2, in float32, written to {tmp_path}/out"
    output = Path(settings["output_dir"])
    for path in (tmp_path / "out").iterdir():
        assert filecmp.cmp(path, output / path.name, shallow=False), path.name
    assert (tmp_path / "out/config.json").exists() and (tmp_path / "out/model.safetensors").exists()
    assert torch.equal(logits(tmp_path / "out"), logits(output))
    assert not torch.equal(logits(output), logits(Path(settings["base_model"]))), "the run has changed nothing"


def test_files_and_dtype_as_asked_for(finished, tmp_path):
    settings = finished("llama")
    convert(saved(settings), tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    want = exported(settings)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in want.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(tmp_path, case, dtype):
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(MODELS[case]).to(dtype).save_pretrained(tmp_path / "model")
    told = convert(tmp_path / "model", tmp_path / "checkpoint")
    assert "without optimizer state" in told
    convert(tmp_path / "checkpoint", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype and torch.equal(tensor, after[name]), name


def test_a_run_begins_with_a_converted_model_as_with_the_model(workshop: Workshop, tmp_path):
    settings = workshop.settings("gpt2", tmp_path / "plain", tensor_parallel_size=2)
    convert(Path(settings["base_model"]), tmp_path / "checkpoint")
    own = {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": str(tmp_path / "checkpoint")}
    said = pool(2).run(said_on_rank, settings | own)
    found, want = metrics(settings | own), run(settings)
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in found] == [
        (m["step"], m["loss"], m["grad_norm"]) for m in want
    ]
    assert "checkpoint has no optimizer state, which starts from zero" in said[0]


def test_the_config_may_lie_elsewhere(finished, tmp_path):
    settings = finished("llama")
    moved = tmp_path / "moved"
    shutil.copytree(saved(settings), moved)
    state = json.loads((moved / "state.json").read_text())
    (moved / "state.json").write_text(json.dumps(state | {"source": state["source"] | {"folder": "/no/such/model"}}))
    names = [path.name for path in moved.iterdir() if path.name != "SHA256SUMS"]
    checkpoint_folder.write_sums(moved, checkpoint_folder.sums_of(moved, names))
    with pytest.raises(UserError, match="--config: /no/such/model\n  no config.json there, where the run"):
        convert(moved, tmp_path / "out")
    convert(moved, tmp_path / "out", config=Path(settings["base_model"]))
    assert torch.equal(logits(tmp_path / "out"), logits(Path(settings["output_dir"])))


def test_memory_is_that_of_a_tensor_not_of_the_model(finished, tmp_path, monkeypatch):
    """Nothing that was read is still held two tensors later."""
    import weakref

    from tessera.checkpoint import convert as module

    alive, most = [], 0
    real = torch.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal most
        tensor = real(*args, **kwargs)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(module.torch, "empty", watched)
    convert(saved(finished("llama")), tmp_path / "out")
    assert len(alive) > 20 and most <= 4  # a tensor, its parts, the one that DCP has read


# ---- What is refused


def test_a_folder_with_something_in_it_is_not_written_to(finished, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(UserError, match="TO: .*/out\n  is there already"):
        convert(saved(finished("llama")), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="FROM: .*\n  is neither a checkpoint"):
        convert(tmp_path, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(finished, tmp_path):
    shutil.copytree(saved(finished("llama")), tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2/__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="FROM: .*\n  checkpoint-2/__1_0.distcp does not match SHA256SUMS"):
        convert(tmp_path / "checkpoint-2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_than_the_config_is_refused(finished, workshop: Workshop, tmp_path):
    with pytest.raises(UserError, match="FROM: .*\n  is of another model: model/"):
        convert(saved(finished("llama")), tmp_path / "out", config=workshop.model("gpt2"))


def test_options_of_the_other_direction_are_refused(workshop: Workshop, tmp_path):
    with pytest.raises(UserError, match="--dtype: .*\n  is for checkpoints"):
        convert(workshop.model("llama"), tmp_path / "out", dtype=torch.bfloat16)


def test_a_full_disk_leaves_nothing(finished, workshop: Workshop, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "write_tensors", full)
    with pytest.raises(RunFailed, match="was not written: .*no space is left on the disk, "):
        convert(saved(finished("llama")), tmp_path / "out")
    monkeypatch.setattr("tessera.checkpoint.saver.seal", full)
    with pytest.raises(RunFailed, match="was not written: .*no space is left on the disk, "):
        convert(workshop.model("llama"), tmp_path / "checkpoint-0")
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.rglob("*.distcp")) == []


def test_auto_resume_takes_a_converted_checkpoint(workshop: Workshop, tmp_path):
    """It is a checkpoint-N like any other when it is called so."""
    convert(workshop.model("llama"), tmp_path / "run/checkpoint-0")
    settings = workshop.settings("llama", tmp_path / "run", resume_from_checkpoint=True)
    assert checkpoint_to_resume(TrainConfig.model_validate(settings)) == tmp_path / "run/checkpoint-0"


def reseal(folder: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.name != "SHA256SUMS"]
    checkpoint_folder.write_sums(folder, checkpoint_folder.sums_of(folder, names))


def test_parts_that_leave_a_hole_are_refused_by_name_before_anything_is_written(finished, tmp_path):
    folder = shutil.copytree(saved(finished("llama")), tmp_path / "checkpoint")
    whole = pickle.loads((folder / ".metadata").read_bytes())
    name, entry = next((n, e) for n, e in whole.state_dict_metadata.items() if len(e.chunks) == 2)
    entry.chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(whole, 4))
    reseal(folder)
    with pytest.raises(UserError, match=f"FROM: .*\n  is not a whole checkpoint: .metadata: {name}: "):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_no_tensor_is_refused_by_name(finished, tmp_path):
    folder = shutil.copytree(saved(finished("llama")), tmp_path / "checkpoint")
    file = folder / "__1_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    reseal(folder)
    with pytest.raises(
        UserError, match="FROM: .*\n  cannot be read: model/.*: its part at .* in __1_0.distcp cannot be"
    ):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tokenizer_that_is_gone_is_said_and_not_left_out(finished, tmp_path):
    folder = shutil.copytree(saved(finished("llama")), tmp_path / "checkpoint")
    state = json.loads((folder / "state.json").read_text())
    state["source"]["tokenizer"] = str(tmp_path / "gone")
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(UserError, match="--config: .*gone\n  no tokenizer there, where the run"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", config=Path(finished("llama")["base_model"]))


@pytest.mark.parametrize("target", ["a\0b", "x" * 300, "link"])
def test_a_target_that_cannot_be_is_refused(finished, tmp_path, target):
    (tmp_path / "link").symlink_to("/no/such/place")
    with pytest.raises(UserError, match="^TO: "):
        convert(saved(finished("llama")), tmp_path / target)
