"""Sizes of a config.json that no model has, files of a folder that are no files, and a hub that is not there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest

from tessera.core import network
from tessera.core.errors import UserError
from tessera.models import download
from tessera.models.families.table import model_config
from tessera.models.hub import check_weights, read_model_config, resolve_model_folder
from tessera.models.tensor_files import find_tensors
from tessera.sizes.bounds import MODEL_NUMBERS, MODEL_SIZES

FILE = Path("config.json")
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 512, "head_dim": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 8}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OF_GPT2 = ("layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop")


@pytest.mark.parametrize("key", [*MODEL_SIZES, *MODEL_NUMBERS])
def test_every_number_of_a_config_json_has_its_bounds(key):
    for value in (10**18, 10**400, -1, float("inf"), float("nan"), True, "1", [1], 0 if key in MODEL_SIZES else 1e19):
        base: dict[str, object] = {**GPT2} if key.startswith("n_") or key in OF_GPT2 else {**LLAMA}
        in_rope = key in ROPE or key == "original_max_position_embeddings"
        base |= {"model_type": "mistral"} if key == "sliding_window" else {}
        changed = {"rope_scaling": {**ROPE, key: value}} if in_rope else {key: value}
        with pytest.raises(UserError) as caught:
            model_config({**base, **changed}, FILE)
        assert caught.value.key == ("rope_scaling." if in_rope else "") + key
        assert len(str(caught.value)) < 1500
    if key in MODEL_SIZES:
        assert f"at most {MODEL_SIZES[key]}" in str(caught.value)


def test_heads_that_are_wide_together():
    with pytest.raises(UserError, match="at most 1048576 are possible") as caught:
        model_config({**LLAMA, "num_attention_heads": 2**15, "head_dim": 2**15}, FILE)
    assert caught.value.key == "num_attention_heads"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "brackets"])
def test_what_is_no_file_or_no_json_is_said_at_once(name, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        text = b"[" * 200_000
        length = len(text).to_bytes(8, "little") if name == "model.safetensors" else b""
        (tmp_path / name).write_bytes(length + text)
    with pytest.raises(UserError) as caught:
        check_weights(tmp_path, read_model_config(tmp_path))
    said = {"pipe": "is no regular file", "folder": "is a folder", "brackets": "nested deeper than 100 levels"}
    assert said[kind] in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "..", "", "a/b", 3, None])
def test_names_in_an_index_that_no_file_beside_it_has(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="outside its own folder, or none"):
        find_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "\\ud800"}}')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["./x", "/x", "~x", "~/x", "a\0b", "a" * 300 + "/" + "b" * 300, "/" + "x/" * 3000])
def test_no_path_asks_a_hub(name, monkeypatch):
    monkeypatch.setattr(download, "reachable", None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError) as caught:
        resolve_model_folder(name)
    assert caught.value.key == "base_model" and len(str(caught.value)) < 1500


def test_a_hub_that_answers_nothing_is_given_up_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "PATIENCE", 0.2)
    monkeypatch.setattr(network.socket, "create_connection", lambda *_: time.sleep(5) or network.socket.socket())
    begun = time.monotonic()
    with pytest.raises(UserError, match="huggingface.co cannot be reached, its cache has no copy"):
        resolve_model_folder("nobody/no-such-model")
    assert time.monotonic() - begun < 4
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_process_that_has_loaded_nothing_of_the_hub_says_the_same(tmp_path):
    """The package of the hub loads its parts when asked, which a test that has loaded transformers does not see."""
    code = "from tessera.models.download import download; download('nobody/no-such-model', False)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "UserError: base_model: nobody/no-such-model" in done.stderr
    assert "HF_HUB_OFFLINE is set, its cache has no copy" in done.stderr
