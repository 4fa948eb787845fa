"""The one table of products, norms and attention against the model that is built: neither has what the other lacks."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.model_cases import GPT2, LLAMA, MODELS
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init
from tessera.layout.streams import HIDDEN_BY_HEADS, residual_layout
from tessera.models.anatomy import anatomy_of
from tessera.models.config import LayerKind
from tessera.models.decoder import Decoder
from tessera.nn.linear import ParallelLinear
from tessera.nn.norm import HeadNorm, Norm
from tessera.nn.parameter import named_specs
from tessera.sizes.schedule import Schedule

PARALLELS = {
    "sequence parallel": Parallel(Mesh(rank=0), residual_layout(True)),
    "residual whole": Parallel(Mesh(rank=0), residual_layout(False)),
    "summa": Parallel(Mesh(rank=0), residual_layout(True, "summa"), schedule=Schedule("summa")),
    "by heads": Parallel(Mesh(rank=0), residual_layout(True), attention=HIDDEN_BY_HEADS),
    "weights over depth": Parallel(Mesh(rank=0), residual_layout(True), weights_over=("depth", "row")),
    "fsdp": Parallel(Mesh(rank=0), residual_layout(True), weights_over=(), fsdp=("shard", "row")),
}
SWITCHES = ("qkv_bias", "attention_out_bias", "mlp_bias", "head_bias", "tied", "qk_norm")
ALL = MODELS | {"windows": replace(LLAMA, num_layers=3, layer_kinds=(LayerKind(), LayerKind(8)))}
ALL |= {
    f"{family} with {switch} turned": replace(model, **{switch: not getattr(model, switch)})
    for family, model in (("llama", LLAMA), ("gpt2", GPT2))
    for switch in SWITCHES
}


@pytest.mark.parametrize("layout", PARALLELS)
@pytest.mark.parametrize("model", ALL)
def test_every_parameter_is_what_the_anatomy_says(model, layout):
    config, parallel = ALL[model], PARALLELS[layout]
    built = [(name, replace(spec, init=Init())) for name, _, spec in named_specs(Decoder(config, parallel))]
    said = list(anatomy_of(config).parameters(parallel))
    assert [(name, spec) for name, _, spec in said] == built
    assert all(len(dims) == len(spec.shape) for _, dims, spec in said)


@pytest.mark.parametrize("model", ALL)
def test_units_hold_every_parameter_once(model):
    config, parallel = ALL[model], PARALLELS["by heads"]
    whole = [spec for _, _, spec in anatomy_of(config).parameters(parallel)]
    *layers, (outside, once) = anatomy_of(config).units(parallel)
    assert once == 1 and sum(count for _, count in layers) == config.num_layers
    counted = [p.spec for parameters, count in layers for p in parameters * count] + [p.spec for p in outside]
    assert sorted(map(str, counted)) == sorted(map(str, whole))


@pytest.mark.parametrize("model", ALL)
def test_products_norms_and_attention_are_the_modules_of_each_layer(model):
    """Each linear layer is in one product of its direction, widths and streams; norms are where the model has them."""
    config, parallel = ALL[model], PARALLELS["by heads"]
    decoder = Decoder(config, parallel)
    for layer, module in zip(anatomy_of(config).layers, decoder.layers, strict=True):
        linears = {name: m for name, m in module.named_modules() if isinstance(m, ParallelLinear)}
        norms = {name: m for name, m in module.named_modules() if isinstance(m, Norm)}
        head_norms = [name for name, m in module.named_modules() if isinstance(m, HeadNorm)]
        assert [(block.norm.name, block.norm.width) for block in layer] == [(n, m.features) for n, m in norms.items()]
        (attention,) = (block.attention for block in layer if block.attention)
        c = module.attention.config
        said = (attention.heads, attention.kv_heads, attention.head_dim, attention.window)
        assert said == (c.num_heads, c.num_kv_heads, c.head_dim, c.window)
        assert attention.rotary == (decoder.positions is None) and list(attention.norms) == head_norms
        products = [product for block in layer for product in block.products]
        assert sorted(linear.name for product in products for linear in product.linears) == sorted(linears)
        for product in products:
            for linear in product.linears:
                hidden, residual = product.hidden(parallel), parallel.residual
                ours = (linear.features, hidden), (product.width, residual)
                m = linears[linear.name]
                inside, outside = ours[::-1] if product.column else ours
                assert ((m.in_features, m.input), (m.out_features, m.output)) == (inside, outside)


def test_sites_of_weights():
    anatomy = anatomy_of(replace(LLAMA, tied=True, qk_norm=True))
    said = {
        "embedding.weight": ("embedding", "head"),
        "layers.1.attention.k.weight": ("q·k·v",),
        "layers.1.attention.out.weight": ("attention out",),
        "layers.0.mlp.gate.weight": ("gate·up",),
        "layers.0.mlp.down.weight": ("down",),
        "layers.0.attention.q_norm.weight": (),
        "norm.weight": (),
    }
    assert {name: anatomy.sites_of(name) for name in said} == said
    untied = anatomy_of(GPT2)
    assert untied.sites_of("embedding.weight") == ("embedding",) and untied.sites_of("head.weight") == ("head",)
    assert untied.sites_of("layers.0.mlp.up.weight") == ("up",) and not untied.sites_of("layers.0.mlp.up.bias")
    assert not untied.sites_of("positions.weight")


def test_layers_of_a_kind_are_counted_together():
    assert [count for _, count in anatomy_of(replace(LLAMA, num_layers=7)).kinds] == [7]
    mixed = anatomy_of(replace(LLAMA, num_layers=7, layer_kinds=(LayerKind(), LayerKind(8), LayerKind())))
    assert mixed.kinds == [(mixed.layers[0], 5), (mixed.layers[1], 2)]


def test_no_site_of_a_layer_is_named_anywhere_else():
    """Who lists a layer's products asks the anatomy; the modules themselves may say their names."""
    source = Path(__file__).parents[2] / "src" / "tessera"
    sites = {site for model in ALL.values() for layer, _ in anatomy_of(model).kinds for b in layer for site in b.sites}
    own = {site for site in sites | {"final norm"} if not site.isalpha()}  # of one word are other things too
    assert own == {"q·k·v", "gate·up", "attention out", "layer norms", "final norm"}
    for path in source.rglob("*.py"):
        if path.parent.name != "nn" and path.name != "anatomy.py":
            constants = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
            assert not own & {value for value in constants if isinstance(value, str)}, path
