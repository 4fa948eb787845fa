"""What is wrong with a model folder is a message before any process starts: which file, which tensor, why."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from models.hub_models import rewritten, save
from tessera.core.errors import UserError
from tessera.models.hub import check_weights, read_model_config, resolve_model_folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        check_weights(folder, read_model_config(folder))
    assert raised.value.key == "base_model"
    return str(raised.value)


def says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def change_header(file: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the header of a safetensors file, its data left as it is."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = save("llama", tmp_path)
    check_weights(folder, read_model_config(folder))  # whole before a test spoils it
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = save("gpt2", tmp_path, max_shard_size="20KB")
    check_weights(folder, read_model_config(folder))
    return folder


# ------------------------------------------------------------------------------------------- files


def test_no_weights(llama):
    (llama / SINGLE).unlink()
    says(complaint(llama), str(llama), SINGLE, INDEX, "random_init: true")


def test_pickled_weights_only(llama):
    (llama / SINGLE).rename(llama / "pytorch_model.bin")
    says(complaint(llama), "pytorch_model.bin", "pickled", "safetensors are needed")


def test_a_shard_is_missing(shards):
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.unlink()
    says(complaint(shards), str(shard), "missing", INDEX)


def test_a_shard_lacks_a_tensor_of_the_index(shards):
    names = json.loads((shards / INDEX).read_text())["weight_map"]
    tensor = "transformer.h.1.ln_2.bias"
    with rewritten(shards / names[tensor]) as tensors:
        del tensors[tensor]
    says(complaint(shards), names[tensor], tensor, INDEX)


def test_an_index_that_is_none(shards):
    (shards / INDEX).write_text('{"weight_map": [')
    says(complaint(shards), INDEX, "cannot be read")
    (shards / INDEX).write_text('{"files": {}}')
    says(complaint(shards), INDEX, "weight_map")


def test_an_index_that_leads_out_of_its_folder(shards):
    change_json(shards / INDEX, lambda index: index["weight_map"].update({"x": "../x.safetensors"}))
    says(complaint(shards), INDEX, "outside")


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_cut_off_in_its_header(llama, kept):
    (llama / SINGLE).write_bytes((llama / SINGLE).read_bytes()[:kept])
    says(complaint(llama), str(llama / SINGLE), "not a safetensors file", f"{kept} bytes")


def test_the_tensor_at_which_a_file_is_cut_off(llama):
    content = (llama / SINGLE).read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    name = "model.layers.1.mlp.up_proj.weight"
    begin, end = json.loads(content[8:data])[name]["data_offsets"]
    middle = (begin + end) // 2
    (llama / SINGLE).write_bytes(content[: data + middle])
    says(complaint(llama), f"truncated: tensor {name} ends at byte {end}", f"the file at byte {middle}")


def test_a_header_that_is_no_json(llama):
    content = bytearray((llama / SINGLE).read_bytes())
    content[20] = 0
    (llama / SINGLE).write_bytes(content)
    says(complaint(llama), str(llama / SINGLE), "header cannot be parsed")


@pytest.mark.parametrize("entry", [None, [], {"dtype": "F32", "shape": [32]}, {"dtype": 1}])
def test_a_header_whose_entry_is_none(llama, entry):
    change_header(llama / SINGLE, lambda header: header.update({"model.norm.weight": entry}))
    says(complaint(llama), str(llama / SINGLE), "header cannot be parsed", "model.norm.weight")


def test_a_header_that_disagrees_with_itself(llama):
    change_header(llama / SINGLE, lambda header: header["model.norm.weight"].update(shape=[31]))
    says(complaint(llama), "corrupt: tensor model.norm.weight", "[31]")


def test_two_tensors_in_one_place(llama):
    def overlap(header: dict) -> None:
        one, other = (header[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
        one["data_offsets"] = other["data_offsets"]

    change_header(llama / SINGLE, overlap)
    says(complaint(llama), str(llama / SINGLE), "corrupt: tensor model.layers.", "between its neighbours")


def test_bytes_that_belong_to_no_tensor(llama):
    with (llama / SINGLE).open("ab") as file:
        file.write(b"more")
    says(complaint(llama), str(llama / SINGLE), "corrupt", "follow the header")


def test_a_pointer_in_place_of_the_file(llama):
    (llama / SINGLE).write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 5\n")
    says(complaint(llama), str(llama / SINGLE), "not a safetensors file", "git lfs pull")


# ------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("case", "stored", "ours"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", "layers.1.attention.k.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.bias", "layers.1.mlp.up.bias"),
        ("gpt2", "transformer.wte.weight", "embedding.weight"),
    ],
)
def test_a_tensor_is_missing(case, stored, ours, tmp_path):
    save(case, tmp_path)
    with rewritten(tmp_path / SINGLE) as tensors:
        del tensors[stored]
    says(complaint(tmp_path), str(tmp_path), f"lack the tensor {stored}", ours)


def test_an_untied_head_is_missing(llama):
    with rewritten(llama / SINGLE) as tensors:
        del tensors["lm_head.weight"]
    says(complaint(llama), "lm_head.weight", "head.weight", "tie_word_embeddings: true")


@pytest.mark.parametrize(
    ("case", "key", "value", "stored", "ours", "found", "expected"),
    [
        (
            "llama",
            "vocab_size",
            510,
            "model.embed_tokens.weight",
            "embedding.weight",
            "[509, 32]",
            "[510, 32]",
        ),
        ("llama", "num_key_value_heads", 4, "self_attn.k_proj", "attention.k.weight", "[16, 32]", "[32, 32]"),
        ("gpt2", "n_inner", 56, "h.0.mlp.c_fc.weight", "layers.0.mlp.up.weight", "[32, 128]", "[32, 56]"),
    ],
)
def test_a_wrong_shape(case, key, value, stored, ours, found, expected, tmp_path):
    save(case, tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update({key: value}))
    says(complaint(tmp_path), SINGLE, stored, ours, f"has shape {found}", f"makes it {expected}")


def test_a_fused_tensor_of_a_wrong_shape(tmp_path):
    save("gpt2", tmp_path)
    with rewritten(tmp_path / SINGLE) as tensors:
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)
    q_k_v = ", ".join(f"layers.0.attention.{x}.weight" for x in "qkv")
    says(complaint(tmp_path), "h.0.attn.c_attn.weight", q_k_v, "[96, 32]", "[32, 96]")


def test_a_dtype_that_is_not_read(llama):
    with rewritten(llama / SINGLE) as tensors:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    says(complaint(llama), "model.norm.weight", "I8", "BF16")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_pair_stored_twice_must_be_equal(same, tmp_path):
    save("llama tied", tmp_path)
    with rewritten(tmp_path / SINGLE) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][508, 31] += 0 if same else 1
    if same:
        check_weights(tmp_path, read_model_config(tmp_path))
    else:
        message = complaint(tmp_path)
        says(message, "lm_head.weight and model.embed_tokens.weight differ", "tie_word_embeddings: false")


def test_tensors_without_use_are_warned_of_but_known_buffers_are_not(tmp_path, recwarn):
    save("gpt2", tmp_path)
    with rewritten(tmp_path / SINGLE) as tensors:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    check_weights(tmp_path, read_model_config(tmp_path))
    assert not recwarn.list
    change_json(tmp_path / "config.json", lambda config: config.update(n_layer=1))
    with pytest.warns(UserWarning, match=r"not used .* transformer\.h\.1\.attn\.c_attn\.bias.* and 9 more"):
        check_weights(tmp_path, read_model_config(tmp_path))


def test_only_headers_are_read(llama):
    """The data may be anything: checking a model costs no time that grows with it."""
    header_end = 8 + int.from_bytes((llama / SINGLE).read_bytes()[:8], "little")
    with (llama / SINGLE).open("r+b") as file:
        file.seek(header_end)
        file.write(b"\xff" * 1000)
    assert not load_file(llama / SINGLE)["lm_head.weight"].isfinite().all()
    check_weights(llama, read_model_config(llama))


# ------------------------------------------------------------------------------------------- the folder


def test_config_json_is_missing_or_no_json(tmp_path):
    with pytest.raises(UserError, match="no config.json") as raised:
        read_model_config(tmp_path)
    says(str(raised.value), str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_model_config(tmp_path)


def test_a_local_folder_is_itself(tmp_path, monkeypatch):
    assert resolve_model_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["{}/nothing", "./nothing", "a/b/c", "../x", "two words"])
def test_a_path_that_is_not_there_asks_no_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no such folder"):
        resolve_model_folder(name.format(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="a file, not a folder"):
        resolve_model_folder(str(tmp_path / "model.gguf"))


def test_a_hub_name_fetches_neither_pickles_nor_code(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_folder("owner/model-1.5") == tmp_path
    there = ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt"]
    never = ["pytorch_model.bin", "modeling.py", "model.gguf", "flax_model.msgpack"]
    patterns = asked["owner/model-1.5"]
    assert list(huggingface_hub.utils.filter_repo_objects(there + never, allow_patterns=patterns)) == there


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as raised:
        resolve_model_folder("nobody/no-such-model")
    assert (raised.value.key, raised.value.value) == ("base_model", "nobody/no-such-model")
    says(str(raised.value), "the hub", "local folder")
    assert "\n" not in raised.value.reason
