"""The kernel of attention that a run names is the one that runs."""

from dataclasses import replace

import pytest
import torch

from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.config import LayerKind, ModelConfig, RopeConfig
from tessera.models.decoder import Decoder
from tessera.nn.kernels import named
from tessera.train.kernel import attention_line
from tessera.train.run import model_of

CASES = {
    "flash attention": ({}, "fused"),
    "step-by-step kernel, with scores of sequence_len² for each head (attn_implementation: eager)": (
        {"eager_attention": True},
        "explicit",
    ),
    "(attention_dropout 0.25)": ({"attention_dropout": 0.25}, "explicit"),
    "flash attention within a window of 3 tokens": ({"layer_kinds": (LayerKind(3),)}, "tiled"),
}


@pytest.mark.parametrize("said", CASES)
def test_the_kernel_that_is_named_runs(monkeypatch, said):
    changes, kernel = CASES[said]
    model = ModelConfig("llama", 31, 16, 1, 4, 2, 4, 24, 32, rope=RopeConfig(1e4), **changes)
    parallel = Parallel(Mesh(rank=0), residual_layout(True))
    assert said in attention_line(model, parallel, 12)
    ran = []
    for name in ("fused", "explicit", "tiled"):
        real = getattr(__import__("tessera.nn.attend", fromlist=[name]), name)

        def spy(*args, name=name, real=real, **kwargs):
            ran.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"tessera.nn.attend.{name}", spy)
    decoder = Decoder(model, parallel)
    decoder.initialize(1)
    ids = torch.arange(24).view(2, 12) % 31
    decoder(MicroBatch(ids, ids, 24), 24.0, dropout_key=5)
    assert ran == [kernel]


def test_packed_rows_are_told():
    model = ModelConfig("llama", 31, 16, 1, 4, 2, 4, 24, 32, rope=RopeConfig(1e4))
    parallel = Parallel(Mesh(rank=0), residual_layout(True))
    assert attention_line(model, parallel, 12, packed=True) == "attention: flash attention, each document by itself"
    model = replace(model, layer_kinds=(LayerKind(5), LayerKind(3), LayerKind()))
    said = "attention: flash attention within a window of 3 tokens, each document by itself"
    assert attention_line(model, parallel, 12, packed=True) == said


def test_why_it_is_not_flash_on_a_gpu():
    cuda = torch.device("cuda")
    assert named._why(torch.float32, cuda, 64) == "it takes bfloat16, and the run computes in float32"
    assert named._why(torch.bfloat16, cuda, 512) == "it takes heads of at most 256 features, not 512"


@pytest.mark.parametrize(
    ("keys", "eager"),
    [
        ({}, False),
        ({"eager_attention": True}, True),
        ({"attn_implementation": "eager"}, True),
        ({"flash_attention": True}, False),
        ({"sdp_attention": True, "eager_attention": False}, False),
        ({"attn_implementation": "flash_attention_2", "flash_attention": True}, False),
    ],
    ids=str,
)
def test_keys_of_attention(keys, eager):
    config, _ = make_config({"base_model": "m", "datasets": [{"path": "a"}], **keys})
    assert config.eager is eager


def test_keys_of_attention_that_contradict_one_another():
    with pytest.raises(UserError, match="attn_implementation: eager\n  flash_attention is true"):
        make_config(
            {
                "base_model": "m",
                "datasets": [{"path": "a"}],
                "attn_implementation": "eager",
                "flash_attention": True,
            }
        )


def test_the_key_reaches_the_model_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    settings = {"base_model": str(tmp_path), "datasets": [{"path": "a"}], "sequence_len": 8}
    for keys in ({}, {"attn_implementation": "eager"}):
        assert model_of(TrainConfig.model_validate(settings | keys)).eager_attention is bool(keys)
