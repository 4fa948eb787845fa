"""Hugging Face folders in and out, against transformers: logits, slices of every rank, files written."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.hub_models import MODELS, empty, ids, loaded, random_model, rewritten, save
from tessera.core.errors import RunFailed
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models import hub
from tessera.models.decoder import Decoder
from tessera.models.families.table import FAMILIES
from tessera.models.hub import check_weights, export, load_weights, read_model_config
from tessera.nn.parameter import named_specs, to_local


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(case, tmp_path_factory.mktemp("source"))


def logits_error(folder: Path, case: str) -> float:
    """The largest difference of our logits from those of transformers."""
    with torch.no_grad():
        return (loaded(folder).logits(ids()) - random_model(case)(ids()).logits).abs().max().item()


# ------------------------------------------------------------------------------------------- in


def test_logits_are_those_of_transformers(case, source):
    check_weights(source, read_model_config(source))
    assert logits_error(source, case) < 1e-5
    assert random_model(case)(ids()).logits.std() > 0.3


def test_shards_load_like_one_file(case, tmp_path):
    save(case, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    check_weights(tmp_path, read_model_config(tmp_path))
    assert logits_error(tmp_path, case) < 1e-5


@pytest.mark.parametrize("wrong", ["q and k swapped", "square weight not transposed", "norms swapped"])
def test_a_wrong_table_shows_in_the_logits(wrong, tmp_path, monkeypatch):
    gpt2 = FAMILIES["gpt2"]
    modules = list(gpt2.modules)
    for n, module in enumerate(modules):
        if wrong == "q and k swapped" and "c_attn" in module.name:
            modules[n] = replace(module, ours=(module.ours[1], module.ours[0], module.ours[2]))
        if wrong == "square weight not transposed" and "attn.c_proj" in module.name:
            modules[n] = replace(module, transposed=False)
        if wrong == "norms swapped" and "ln_" in module.name:
            swapped = {"1": "2", "2": "1", "f": "f"}[module.name[-1]]
            modules[n] = replace(module, name=module.name[:-1] + swapped)
    save("gpt2", tmp_path)
    assert logits_error(tmp_path, "gpt2") < 1e-5
    monkeypatch.setitem(FAMILIES, "gpt2", replace(gpt2, modules=tuple(modules)))
    assert logits_error(tmp_path, "gpt2") > 1e-2


@pytest.mark.parametrize("case", ["llama tied", "gpt2"])
def test_a_base_model_without_prefix_loads(case, tmp_path):
    save(case, tmp_path)
    random_model(case).base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(("model.", "transformer.")) for name in tensors_in(tmp_path))
    check_weights(tmp_path, read_model_config(tmp_path))
    assert logits_error(tmp_path, case) < 1e-5


def test_a_tied_weight_kept_under_the_name_of_the_head_loads(tmp_path):
    save("llama tied", tmp_path)
    with rewritten(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    check_weights(tmp_path, read_model_config(tmp_path))
    assert logits_error(tmp_path, "llama tied") < 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_cast(stored, dtype, tmp_path):
    save("gpt2", tmp_path)
    with rewritten(tmp_path / "model.safetensors") as tensors:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})
    check_weights(tmp_path, read_model_config(tmp_path))
    model = empty(tmp_path, dtype=dtype)
    read = load_weights(model, tmp_path)
    assert read == sum(tensor.nbytes for tensor in tensors_in(tmp_path).values())
    wte = to_local(model.embedding.weight)
    assert wte.dtype == dtype
    torch.testing.assert_close(wte, tensors_in(tmp_path)["transformer.wte.weight"].to(dtype), rtol=0, atol=0)


@contextmanager
def one_rank_of(world: int, rank: int) -> Iterator[Mesh]:
    """A mesh on which this process is `rank` of `world` along `col`; nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield Mesh({"col": world})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_reads_only_its_slices(world, source):
    whole = {name: to_local(parameter) for name, parameter, _ in named_specs(loaded(source))}
    stored = sum(tensor.nbytes for tensor in tensors_in(source).values())
    read = repeated = 0
    for rank in range(world):
        with one_rank_of(world, rank) as mesh:
            model = empty(source, mesh)
            read += load_weights(model, source)
            for name, parameter, spec in named_specs(model):
                assert torch.equal(to_local(parameter), whole[name][spec.local_slices(mesh)]), name
                if rank and not mesh.present(spec.cut_axes):
                    repeated += to_local(parameter).nbytes
    assert read == stored + repeated
    assert 0 < repeated < stored * (world - 1) / 10  # reading everything everywhere would show


# ------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("limit", [hub.SHARD_BYTES, 20_000])
def test_export_gives_back_the_tensors_and_transformers_loads_them(case, source, limit, tmp_path):
    model = loaded(source)
    export(model, tmp_path, source, max_shard_bytes=limit)
    before, after = tensors_in(source), tensors_in(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "model.safetensors").exists() == (limit > 20_000)
    assert not list(tmp_path.glob(".*"))
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs) is type(random_model(case)) and theirs.dtype == torch.float32
    with torch.no_grad():
        difference = (theirs.eval()(ids()).logits - model.logits(ids())).abs().max()
    assert difference < 1e-5
    check_weights(tmp_path, read_model_config(tmp_path))
    assert read_model_config(tmp_path) == read_model_config(source)


def test_shards_hold_what_the_index_says(tmp_path):
    source = save("llama", tmp_path / "source")
    export(loaded(source), tmp_path / "out", source, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    contents = {file.name: load_file(file) for file in files}
    held = {tensor: name for name, content in contents.items() for tensor in content}
    assert index["weight_map"] == held
    assert list(contents) == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    sizes = [sum(t.nbytes for t in content.values()) for content in contents.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 20_000 or len(content) == 1 for size, content in zip(sizes, contents.values(), strict=True))


def test_export_in_another_dtype_says_so(tmp_path):
    source = save("gpt2", tmp_path / "source")
    export(loaded(source), tmp_path / "out", source, torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_config_of_an_older_transformers_is_corrected(tmp_path):
    source = save("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    config |= {"torch_dtype": "float16", "architectures": ["LlamaModel"], "kept": 1}
    (source / "config.json").write_text(json.dumps(config))
    export(loaded(source), tmp_path / "out", source)
    expected = config | {"torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    assert json.loads((tmp_path / "out/config.json").read_text()) == expected


def test_a_vocabulary_of_another_size_is_corrected(tmp_path):
    source = save("gpt2", tmp_path / "source")
    config = replace(read_model_config(source), vocab_size=300)
    model = Decoder(config, Parallel(Mesh(), residual_layout(True)))
    model.initialize(seed=1)
    export(model, tmp_path / "out", source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        difference = (theirs(ids() % 300).logits - model.logits(ids() % 300)).abs().max()
    assert difference < 1e-5


def test_tokenizer_and_generation_files_come_along_and_nothing_else(tmp_path):
    source = save("llama", tmp_path / "source")
    beside = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"]
    for name in [*beside, "README.md", "training_args.bin"]:
        (source / name).write_text(f"this is {name}")
    export(loaded(source), tmp_path / "out", source)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", *beside}
    assert all((tmp_path / "out" / name).read_text() == f"this is {name}" for name in beside)


def test_additional_chat_templates_come_along_byte_for_byte_and_are_replaced(tmp_path):
    source = save("llama", tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_bytes(b"{{ tools }}\r\n\xc3\xa9")
    for _ in range(2):
        export(loaded(source), tmp_path / "out", source)
    copied = tmp_path / "out/additional_chat_templates"
    assert names_in(copied) == {"tool_use.jinja"}
    assert (copied / "tool_use.jinja").read_bytes() == b"{{ tools }}\r\n\xc3\xa9"


@pytest.mark.parametrize(("first", "then"), [(20_000, hub.SHARD_BYTES), (hub.SHARD_BYTES, 20_000)])
def test_an_older_export_goes(first, then, tmp_path):
    source = save("llama", tmp_path / "source")
    model = loaded(source)
    export(model, tmp_path / "out", source, max_shard_bytes=first)
    with torch.no_grad():
        to_local(model.norm.weight).add_(1)
    (tmp_path / "out/.export").mkdir()
    (tmp_path / "out/.export/model.safetensors").write_text("half written")
    export(model, tmp_path / "out", source, max_shard_bytes=then)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.model.norm.weight, to_local(model.norm.weight))
    export(model, tmp_path / "fresh", source, max_shard_bytes=then)
    assert names_in(tmp_path / "out") == names_in(tmp_path / "fresh")


def test_a_failed_export_leaves_the_older_one(tmp_path, monkeypatch):
    source = save("llama", tmp_path / "source")
    model = loaded(source)
    export(model, tmp_path / "out", source)
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "write_tensors", full_disk)
    with torch.no_grad():
        to_local(model.norm.weight).add_(1)
    with pytest.raises(RunFailed, match="no space is left on the disk"):
        export(model, tmp_path / "out", source)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_export_into_its_own_source(tmp_path):
    source = save("llama", tmp_path)
    before = tensors_in(source)
    export(loaded(source), source, source)
    after = tensors_in(source)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


# ------------------------------------------------------------------------------------------- helpers


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
