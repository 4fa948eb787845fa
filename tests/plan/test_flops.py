"""The arithmetic of a step by formula against what torch counts while transformers does it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distributed.model_cases import GPT2, LLAMA
from models.hub_models import MODELS, random_model
from plan.count_cases import SHAPE, Case, counted_in_fake_world
from tessera.core.mesh import Mesh
from tessera.layout.shape import Savers
from tessera.models.families.table import model_config
from tessera.plan.flops import document_flops, step_flops
from tessera.plan.work import step_work
from tessera.sizes.schedule import Schedule


@pytest.mark.parametrize("case", ["llama", "llama tied", "qwen2", "gpt2", "gpt2 untied n_inner gelu"])
def test_the_formula_is_what_torch_counts(case, tmp_path):
    model, ids = random_model(case), torch.zeros(3, 20, dtype=torch.int64)
    model.set_attn_implementation("eager")  # its products are seen, masked or not
    try:
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False).logits.sum().backward()
    finally:
        model.set_attn_implementation("sdpa")
        model.zero_grad()
    own = model_config(MODELS[case].to_dict(), tmp_path)
    assert step_flops(own, [20] * 3) == 3 * document_flops(own, 20) == counter.get_total_flops()


def test_attention_grows_with_the_square_of_a_document_up_to_its_window(tmp_path):
    whole, windowed = (
        model_config(MODELS[name].to_dict(), tmp_path) for name in ("mistral", "mistral head_dim window")
    )
    assert document_flops(whole, 64) > 2 * document_flops(whole, 32)
    assert document_flops(windowed, 64) == 2 * document_flops(windowed, 32)  # its window is 16


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
IN_PLACE = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
"""Which torch's counter does not know; a function of shapes."""
TILES, ONCE = Savers(mlp_tiles=3), Savers(attention_once=True, mlp_tiles=5)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["no dropout", "dropout after the MLP"])
@pytest.mark.parametrize("sizes", [{}, {"row": 2, "col": 2}], ids=str)
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("summa")], ids=str)
def test_a_rank_multiplies_what_its_work_says(model, sizes, schedule):
    """Layers run again, and tiles of an MLP: those of a layer that runs again only if dropout follows them."""
    model = replace(model, vocab_size=512)
    for again, savers in ((False, Savers()), (False, TILES), (True, Savers()), (True, TILES), (True, ONCE)):
        case = Case(sizes, schedule, shape=replace(SHAPE, recompute=again, savers=savers))
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            counted_in_fake_world(model, case, rank=0)
        counted = counter.get_flop_counts()["Global"]
        work = step_work(model, case.shape, case.parallel(Mesh(sizes, rank=0)), per_machine=8)
        assert sum(each.flops for each in work.products) == sum(counted.get(each, 0) for each in PRODUCTS), case.shape
