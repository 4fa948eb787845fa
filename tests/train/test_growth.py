"""Tokens that a config adds: embedding and head grow alike in every layout, and what is left loads and goes on.

The reference is transformers throughout: its tokenizer with the tokens added, its model resized, a plain loop.
"""

import filecmp
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.data.tokenizers_made import MADE

from tessera.checkpoint.convert import convert
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train.run import model_of, prepared_run
from train.runs import THREE_STEPS, Plain, Workshop, exported, plain_loop, run
from train.test_parity import SAME, check, logits

NEW = [f"<new{number}>" for number in range(180)]  # the tokenizer has 330 tokens, the model 509
MARKS = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
TOKENS = {"special_tokens": {**MARKS, "additional_special_tokens": ["<|turn|>"]}, "tokens": NEW}
LENGTH = 24
TEXTS = [
    f"the sea {NEW[-1 - place]} north <|turn|>{NEW[place]} wind {NEW[7 * place]}"[: 40 + place] for place in range(26)
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "1d 2": {"tensor_parallel_size": 2},
    "2d 2×2": {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "micro_batch_size": 8},
    "2.5d 2×1×2": {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 4, "micro_batch_size": 8},
    "3d 2×1×2": {
        "tensor_parallel_mode": "3d",
        "tensor_parallel_mesh": {"inner": 2, "row": 1, "col": 2},
        "micro_batch_size": 8,
    },
    "FSDP 2": {"dp_shard_size": 2, "gradient_accumulation_steps": 1},
}


@dataclass(frozen=True)
class Grown:
    """Settings of runs on a model whose tokenizer lacks tokens, and the same model and rows made by transformers."""

    settings: dict[str, Any]
    reference: dict[str, Any]
    tokenizer: Any

    def plain(self, **changes: Any) -> Plain:
        return plain_loop(self.settings | self.reference | changes)


@pytest.fixture(scope="module")
def grown(workshop: Workshop, tmp_path_factory):
    """Makes one of a kind of model."""
    made: dict[Any, Grown] = {}

    def of(case: str, multiple: int | None = None) -> Grown:
        if (case, multiple) not in made:
            made[case, multiple] = make(workshop, case, multiple, tmp_path_factory.mktemp("grown"))
        return made[case, multiple]

    return of


def make(workshop: Workshop, case: str, multiple: int | None, folder: Path) -> Grown:
    base = folder / "base"
    shutil.copytree(workshop.model(case), base)
    MADE["plain"](base)
    auto = transformers.AutoTokenizer.from_pretrained(base)
    for mark, text in MARKS.items():
        auto.add_special_tokens({mark: text})
    auto.add_tokens(NEW)
    auto.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    assert len(auto) == 330 + 183
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.resize_token_embeddings(len(auto), pad_to_multiple_of=multiple, mean_resizing=False)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.shape != old[key].shape:
                tensor[len(old[key]) :] = old[key].double().mean(0)
    model.save_pretrained(folder / "resized")
    rows = [auto(text)["input_ids"] + [auto.eos_token_id] for text in TEXTS]
    assert max(map(max, rows)) == 330 + 182 and max(map(len, rows)) <= LENGTH
    write_lines(folder / "rows.jsonl", [{"input_ids": ids, "labels": ids} for ids in rows])
    write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    given = {"base_model": str(base), "datasets": [{"path": str(folder / "texts.jsonl")}], "sequence_len": LENGTH}
    settings = workshop.settings(case, folder, **THREE_STEPS, **TOKENS) | given
    settings |= {"resize_token_embeddings_to_32x": True} if multiple else {}
    return Grown(
        settings,
        {"base_model": str(folder / "resized"), "datasets": [{"path": str(folder / "rows.jsonl")}]},
        auto,
    )


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.parametrize(
    ("case", "layout", "multiple"),
    [
        ("llama 64", "alone", None),
        ("llama 64", "1d 2", None),
        ("llama 64 tied", "2d 2×2", None),
        ("llama 64", "2.5d 2×1×2", 32),
        ("llama 64", "3d 2×1×2", None),
        ("llama 64 tied", "FSDP 2", None),
        ("gpt2 64", "1d 2", 32),
    ],
)
def test_a_run_equals_the_plain_loop_on_the_resized_model(grown, tmp_path, case, layout, multiple):
    own = grown(case, multiple)
    settings = own.settings | LAYOUTS[layout] | {"output_dir": str(tmp_path / "run")}
    plain = own.plain(**{**LAYOUTS[layout], **({"micro_batch_size": 6} if layout == "FSDP 2" else {})})
    check(settings, run(settings), plain)

    size = 544 if multiple else 513
    left = tmp_path / "run"
    model = transformers.AutoModelForCausalLM.from_pretrained(left)
    tokenizer = transformers.AutoTokenizer.from_pretrained(left)
    assert read(left / "config.json")["vocab_size"] == size == model.get_output_embeddings().weight.shape[0]
    ids = torch.tensor([own.tokenizer(TEXTS[3])["input_ids"]])
    assert (logits(model, ids) - logits(plain.model, ids)).abs().max() <= SAME * logits(plain.model, ids).abs().max()
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [own.tokenizer(text)["input_ids"] for text in TEXTS]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
    ends = read(left / "generation_config.json")["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_other_new_rows_would_be_seen(grown, tmp_path):
    """Zeros in place of the mean: far outside what the runs above agree to."""
    own = grown("llama 64")
    zeroed = tmp_path / "zeroed"
    model = transformers.AutoModelForCausalLM.from_pretrained(own.reference["base_model"])
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[509:] = 0
    model.save_pretrained(zeroed)
    one, other = own.plain(), own.plain(base_model=str(zeroed))
    assert abs(one.losses[0] - other.losses[0]) > 100 * SAME * one.losses[0]


def test_a_run_with_more_tokens_goes_on_and_is_converted(grown, tmp_path):
    """From two ranks to another layout; bit for bit the whole run in the same one."""
    own = grown("llama 64 tied")
    whole = (
        own.settings
        | LAYOUTS["1d 2"]
        | {"output_dir": str(tmp_path / "whole"), "save_steps": 1, "save_strategy": "steps"}
    )
    found = run(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-3")
    again = whole | {
        "output_dir": str(tmp_path / "again"),
        "resume_from_checkpoint": str(tmp_path / "again/checkpoint-2"),
    }
    assert [line["loss"] for line in run(again)] == [line["loss"] for line in found]
    assert all(torch.equal(tensor, exported(again)[name]) for name, tensor in exported(whole).items())
    alone = again | {"tensor_parallel_size": 1}
    assert [line["loss"] for line in run(alone)] == pytest.approx([line["loss"] for line in found], rel=SAME)

    convert(tmp_path / "whole/checkpoint-3", tmp_path / "converted")
    names = [path.name for path in (tmp_path / "converted").iterdir()]
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(names)
    assert filecmp.cmpfiles(tmp_path / "converted", tmp_path / "whole", names, shallow=False)[0] == names

    other = again | {"tokens": NEW[:-1], "max_steps": 4}
    with pytest.raises(AssertionError, match="vocab|shape|513"):
        run(other)


def test_a_pad_token_that_the_tokenizer_has_changes_the_exported_tokenizer_alone(workshop, tmp_path):
    """In rows that come tokenized, too."""
    base = tmp_path / "base"
    shutil.copytree(workshop.model("llama"), base)
    MADE["plain"](base)
    plain = workshop.settings("llama", tmp_path / "plain", max_steps=2) | {"base_model": str(base)}
    padded = plain | {"output_dir": str(tmp_path / "padded"), "special_tokens": {"pad_token": "<s>"}}
    assert [line["loss"] for line in run(plain)] == [line["loss"] for line in run(padded)]
    assert all(torch.equal(tensor, exported(padded)[name]) for name, tensor in exported(plain).items())
    one, other = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("plain", "padded"))
    assert (one.pad_token, other.pad_token, len(one)) == (None, "<s>", len(other))
    assert read(tmp_path / "padded/config.json")["pad_token_id"] == other.pad_token_id
    assert one(TEXTS)["input_ids"] == other(TEXTS)["input_ids"]


def settings_of(base: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    own = {"base_model": str(base), "random_init": True, "datasets": [{"path": str(tmp_path / "texts.jsonl")}]}
    return TrainConfig.model_validate(own | {"output_dir": str(tmp_path / "run"), "sequence_len": 64} | changes)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A config of 330 tokens, as many as the tokenizer beside it has."""
    MADE["plain"](tmp_path / "base")
    transformers.LlamaConfig(vocab_size=330, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 330),
        ({"special_tokens": {"pad_token": "<s>"}}, 330),
        ({"special_tokens": {"pad_token": "<p>"}}, 331),
        ({"special_tokens": {"unk_token": "<u>", "additional_special_tokens": ["<a>", "<b>"]}}, 333),
        ({"tokens": ["hello"]}, 331),
        ({"resize_token_embeddings_to_32x": True}, 352),
        ({"tokens": ["hello"], "resize_token_embeddings_to_32x": True}, 352),
        ({"tokenizer": {"train": "bpe", "vocab_size": 330}}, 330),
        ({"tokenizer": {"train": "bpe", "vocab_size": 330}, "tokens": ["hello"]}, 331),
    ],
)
def test_the_vocabulary_grows_where_the_ids_need_it(base, tmp_path, changes, size):
    assert model_of(settings_of(base, tmp_path, **changes)).vocab_size == size


def test_a_vocabulary_that_is_larger_than_the_tokenizer_stays(base, tmp_path):
    content = read(base / "config.json")
    (base / "config.json").write_text(json.dumps(content | {"vocab_size": 400}))
    assert model_of(settings_of(base, tmp_path, tokens=["hello"])).vocab_size == 400
    assert model_of(settings_of(base, tmp_path, tokens=NEW)).vocab_size == 330 + len(NEW)


def test_a_tokenizer_that_is_larger_than_the_model_makes_it_grow(base, tmp_path, capfd):
    content = read(base / "config.json")
    (base / "config.json").write_text(json.dumps(content | {"vocab_size": 300}))
    made = prepared_run(settings_of(base, tmp_path), 1)
    assert made.model.vocab_size == 330 and made.model.base.vocab_size == 300
    assert "vocabulary: grows from 300 to 330 tokens" in capfd.readouterr().out


def test_tokens_without_a_tokenizer_are_refused(base, tmp_path):
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer there"):
        model_of(settings_of(base, tmp_path, tokens=["hello"]))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"special_tokens": {"pad": "<p>"}}, "special_tokens.pad"),
        ({"special_tokens": {"pad_token": 3}}, "special_tokens.pad_token"),
        ({"tokens": "hello"}, "tokens"),
        ({"tokens": ["a", ""]}, "tokens"),
        ({"resize_token_embeddings_to_32x": 32}, "resize_token_embeddings_to_32x"),
    ],
)
def test_mistakes_are_named(changes, key):
    from tessera.config.load import make_config

    with pytest.raises(UserError) as error:
        make_config({"base_model": "./m", "datasets": [{"path": "./d"}]} | changes)
    assert error.value.key.startswith(key)
