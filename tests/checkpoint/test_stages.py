"""No rank needs to have every parameter: export and checkpoints of ranks that hold different ones are whole."""

import torch
from safetensors.torch import load_file

from checkpoint.stage_cases import exported_in_parts, saved_and_read_in_parts
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.models.hub import export, read_model_config
from train.runs import Workshop


def test_an_export_has_what_other_stages_hold(workshop: Workshop, tmp_path):
    folder = workshop.model("llama")
    alone = Decoder(read_model_config(folder), Parallel(Mesh(), residual_layout(True)))
    alone.initialize(seed=3)
    export(alone, tmp_path / "alone", folder)
    pool(4).run(exported_in_parts, folder, tmp_path / "parts", {"pp": 2, "col": 2})
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "parts"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_has_what_other_stages_hold(workshop: Workshop, tmp_path):
    folder = workshop.model("llama")
    sizes = {"pp": 2, "col": 2}
    assert all(pool(4).run(saved_and_read_in_parts, folder, tmp_path / "checkpoint-0", sizes))
