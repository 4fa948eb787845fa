"""Exported models stop where their rows were trained to end: real runs, then generate() of transformers."""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tessera.checkpoint.convert import convert
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.data.tokenizer import save_tokenizer, train_bpe
from tessera.train.run import prepared_run
from train.runs import run

VOCABULARY, LENGTH = 300, 24
TEXT = "the cold river sails north"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, vocab_size=VOCABULARY),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, vocab_size=VOCABULARY),
}


def write_json(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content))


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def add_tokens(folder: Path, *texts: str, eos: str) -> dict[str, int]:
    """Special tokens of these texts in the tokenizer of `folder`; the ids."""
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).backend_tokenizer
    backend.add_special_tokens(list(texts))
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token=eos)
    return {text: int(backend.token_to_id(text)) for text in texts}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder without weights: a tokenizer with the marks <end>, <turn> and <tool>, all of them listed."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_tokenizer(train_bpe([TEXT], 260), folder)
    ids = add_tokens(folder, "<end>", "<turn>", "<tool>", "<other>", eos="<end>")
    write_json(folder / "generation_config.json", eos_token_id=list(ids.values())[:3], temperature=0.5, do_sample=True)
    return folder


def settings(base: Path, family: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    config = FAMILIES[family]().to_dict() | {"architectures": [], "bos_token_id": 5, "eos_token_id": 7}
    write_json(base / "config.json", **config)
    (base.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base_model": str(base),
        "random_init": True,
        "datasets": [{"path": str(base.parent / "rows.jsonl")}],
        "output_dir": str(base.parent / "run"),
        "sequence_len": LENGTH,
        "micro_batch_size": 2,
        "max_steps": 60,
        "learning_rate": 2e-2,
        "bf16": False,
        "save_steps": 60,
    } | changes


TOKENIZERS = ["of the base", "another", "trained", "changed eos"]
ALWAYS = {("llama", "of the base"), ("qwen3", "another"), ("gpt2", "trained"), ("llama", "changed eos")}
"""Every family and every tokenizer; the two do not know of each other."""


def test_the_list_covers_what_always_runs():
    families, tokenizers = map(set, zip(*ALWAYS, strict=True))
    assert (families, tokenizers) == (set(FAMILIES), set(TOKENIZERS))


def continued(folder: Path, prompt: list[int]) -> list[int]:
    """What generate() of transformers appends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        told = model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)
    found: list[int] = told[0, len(prompt) :].tolist()
    return found


def ends_of(folder: Path) -> list[int]:
    """The end tokens that both files name alike."""
    one, other = (read(folder / name)["eos_token_id"] for name in ("config.json", "generation_config.json"))
    assert one == other
    return one if isinstance(one, list) else [one]


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        pytest.param(family, tokenizer, marks=[] if (family, tokenizer) in ALWAYS else pytest.mark.slow)
        for family in FAMILIES
        for tokenizer in TOKENIZERS
    ],
)
def test_generate_stops_at_the_end_that_was_trained(base, tmp_path, family, tokenizer):
    listed, changes, eos = ends_of_base(base), {}, "<end>"
    if tokenizer == "another":
        eos = "<stop>"
        (tmp_path / "own").mkdir()
        save_tokenizer(train_bpe([TEXT], 280), tmp_path / "own")  # its ids up to 280 are text
        add_tokens(tmp_path / "own", "<stop>", eos="<stop>")
        changes["tokenizer"] = str(tmp_path / "own")
    elif tokenizer == "trained":
        eos = "<|endoftext|>"
        changes["tokenizer"] = {"train": "bpe", "vocab_size": 270}
    elif tokenizer == "changed eos":
        eos = "<other>"
        write_json(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token=eos)
    own = settings(base, family, [{"text": TEXT}] * 2, **changes)
    run(own)

    output = tmp_path / "run"
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    assert theirs.eos_token == eos
    kept = listed if tokenizer in ("of the base", "changed eos") else []
    assert ends_of(output) == list(dict.fromkeys([theirs.eos_token_id, *kept]))
    assert read(output / "generation_config.json")["temperature"] == 0.5
    ids = theirs(TEXT)["input_ids"]
    assert continued(output, ids[:2]) == [*ids[2:], theirs.eos_token_id]
    wrong = read(output / "generation_config.json") | {"eos_token_id": 7}
    write_json(output / "generation_config.json", **wrong)
    assert len(continued(output, ids[:2])) == LENGTH, "it would stop anyhow"

    convert(output / "checkpoint-60", tmp_path / "converted")
    assert ends_of(tmp_path / "converted")[0] == theirs.eos_token_id
    names = [path.name for path in (tmp_path / "converted").iterdir() if path.name != "generation_config.json"]
    assert filecmp.cmpfiles(tmp_path / "converted", output, names, shallow=False)[0] == names


def ends_of_base(base: Path) -> list[int]:
    found: list[int] = read(base / "generation_config.json")["eos_token_id"]
    return found


def test_the_learnt_end_of_a_turn_is_an_end_token_and_the_tokenizer_names_it(base, tmp_path):
    """Chat rows made elsewhere: learnt turns close with <turn>; the base model ends on <end>."""
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    turn, end, other = (backend.convert_tokens_to_ids(text) for text in ("<turn>", "<end>", "<other>"))
    write_json(base / "generation_config.json", eos_token_id=end)
    rows = []
    for cut in range(12):  # one row of twelve was cut behind <other>
        ids = [30, 31, turn, 40, 41, turn, 30, 32, turn, 42, 43, turn if cut else other]
        labels = [-100 if position % 6 < 3 else token for position, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    run(settings(base, "llama", rows, max_steps=40))
    assert ends_of(tmp_path / "run") == [turn, end]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<turn>"
    assert continued(tmp_path / "run", rows[1]["input_ids"][:3]) == [40, 41, turn]


def test_rows_without_a_known_end_leave_the_files_as_they_are_but_for_one_set(base, tmp_path):
    listed = ends_of_base(base)
    run(settings(base, "llama", [{"input_ids": [9, 8, 7, 6]}] * 2, max_steps=1, save_steps=1))
    assert ends_of(tmp_path / "run") == listed
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(base / name, tmp_path / "run" / name, shallow=False)


def test_without_a_generation_config_the_model_config_says_it(base, tmp_path):
    (base / "generation_config.json").unlink()
    own = settings(base, "llama", [{"text": TEXT}] * 2)
    run(own)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert read(tmp_path / "run/config.json")["eos_token_id"] == [theirs.eos_token_id, 7]
    ids = theirs(TEXT)["input_ids"]
    assert continued(tmp_path / "run", ids[:2]) == [*ids[2:], theirs.eos_token_id]


def test_a_resumed_run_exports_the_same(base, tmp_path):
    own = settings(
        base, "llama", [{"text": TEXT}] * 2, max_steps=2, save_steps=1, tokenizer={"train": "bpe", "vocab_size": 270}
    )
    run(own)
    ends = ends_of(tmp_path / "run")
    (tmp_path / "run/generation_config.json").unlink()
    run(own | {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-1")})
    assert ends_of(tmp_path / "run") == ends


def test_an_end_that_only_config_json_names_is_named_by_the_tokenizer(base, tmp_path):
    write_json(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    own = settings(base, "llama", [{"text": TEXT}] * 2, max_steps=1, save_steps=1)
    end = transformers.AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<other>")
    write_json(base / "config.json", **read(base / "config.json") | {"eos_token_id": [end, 7]})
    run(own)
    assert read(tmp_path / "run/tokenizer_config.json")["eos_token"] == "<other>"
    assert ends_of(tmp_path / "run")[0] == end


def test_a_broken_generation_config_is_refused_before_the_run(base, tmp_path):
    own = settings(base, "llama", [{"text": TEXT}] * 2)
    (base / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json\n  cannot be read as JSON"):
        prepared_run(TrainConfig.model_validate(own), 1)
    assert not (tmp_path / "run").exists()
