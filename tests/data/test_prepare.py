"""Config to rows on disk: what each kind of data becomes, what is refused, when the folder is reused."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.helpers import TEXT, all_rows, entry
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.data.prepare import prepare
from tessera.data.samples import SampleWriter
from tessera.data.sources import read_documents, read_files
from tessera.data.tokenizer import save_tokenizer

TOKENS = [{"input_ids": [10 + i, 20 + i, 30 + i]} for i in range(10)]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_ino) for path in folder.rglob("*"))


def test_text_is_cut_into_windows_with_the_end_between_documents(write, settings, tokenizer):
    folder = write("d/a.txt", TEXT).parent
    write("d/b.txt", "x = 1\n")
    last = write("c.txt", "y = 2\n")
    prepared = prepare(settings(folder, entry(last, "completion")), None)
    texts = [one.ids for one in tokenizer.backend.encode_batch([TEXT, "x = 1\n", "y = 2\n"])]
    end = tokenizer.eos_id
    stream = [*texts[0], end, *texts[1], end, *texts[2]]
    rows = all_rows(prepared.folder)
    assert [token for row, _ in rows for token in row] == stream
    assert [len(row) for row, _ in rows[:-1]] == [16] * (len(rows) - 1)
    assert len(rows) > 1 and len(rows[-1][0]) == len(stream) % 16
    assert all(tokens == labels for tokens, labels in rows)
    assert prepared.manifest.train_tokens == len(stream)
    assert prepared.manifest.train_targets == len(stream) - len(rows)


def test_lines_become_rows_ended(write, settings, tokenizer):
    path = write("a.jsonl", [{"body": "a b"}, {"body": "return"}, {"body": ""}])
    prepared = prepare(settings(entry(path, field="body")), None)
    expected = [[*one.ids, tokenizer.eos_id] for one in tokenizer.backend.encode_batch(["a b", "return"])]
    assert [row for row, _ in all_rows(prepared.folder)] == expected
    assert prepared.manifest.dull_rows == 1
    assert "1 row without anything to learn left out" in prepared.summary()


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_alpaca_masks_the_prompt(write, settings, tokenizer, train_on_inputs):
    path = write("a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3!"}])
    config = settings(entry(path, "alpaca"), sequence_len=1000, train_on_inputs=train_on_inputs)
    (document,) = read_documents(read_files(config.datasets)[0])
    prompt, text = (one.ids for one in tokenizer.backend.encode_batch([segment.text for segment in document.segments]))
    tokens = [*prompt, *text, tokenizer.eos_id]
    masked = [*[-100] * len(prompt), *text, tokenizer.eos_id]
    prepared = prepare(config, None)
    assert all_rows(prepared.folder) == [(tokens, tokens if train_on_inputs else masked)]
    assert (prepared.folder / "train" / "labels.npy").exists() is not train_on_inputs


def test_a_row_is_opened_once_as_the_tokenizer_does(tmp_path, write, settings, tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    save_tokenizer(replace(tokenizer, backend=backend), tmp_path)
    alpaca = write("a.jsonl", [{"instruction": "Add.", "output": "3"}])
    lines = write("b.jsonl", [{"text": "a"}])
    prepared = prepare(settings(alpaca, lines, tokenizer=str(tmp_path), sequence_len=1000), None)
    for row, _ in all_rows(prepared.folder):
        assert (row[0], row.count(start), row[-1]) == (start, 1, tokenizer.eos_id)


def test_tokenized_rows_need_no_tokenizer_and_stay_as_they_are(write, settings):
    rows = [*TOKENS, {"input_ids": [1, 2], "labels": [-100, -100]}, {"input_ids": [9]}]
    prepared = prepare(settings(write("a.jsonl", rows), tokenizer=None), 40)
    assert [tokens for tokens, _ in all_rows(prepared.folder)] == [row["input_ids"] for row in rows]
    assert all_rows(prepared.folder)[-2] == ([1, 2], [-100, -100])
    assert prepared.tokenizer_folder is None and prepared.manifest.dull_rows == 0


def test_kinds_mix_in_the_order_of_the_config(write, settings, tokenizer):
    text, lines, tokens = (
        write("a.txt", "a b"),
        write("b.jsonl", [{"text": "a b"}]),
        write("c.jsonl", TOKENS[:1]),
    )
    rows = [row for row, _ in all_rows(prepare(settings(text, tokens, text, lines), None).folder)]
    ids = tokenizer.backend.encode("a b").ids
    assert rows == [ids, [10, 20, 30], ids, [*ids, tokenizer.eos_id]]


LENGTHS = [{"input_ids": list(range(1, 1 + n))} for n in (4, 5, 6, 3)]


@pytest.mark.parametrize(
    ("strategy", "lengths", "says"),
    [("drop", [4, 3], "2 rows longer than 4 dropped"), ("truncate", [4, 4, 4, 3], "2 rows cut to 4 tokens")],
)
def test_too_long_rows(write, settings, strategy, lengths, says):
    config = settings(write("a.jsonl", LENGTHS), sequence_len=4, excess_length_strategy=strategy)
    prepared = prepare(config, None)
    assert [len(row) for row, _ in all_rows(prepared.folder)] == lengths
    assert says in prepared.summary()


def test_too_long_rows_raise_on_request(write, settings):
    path = write("a.jsonl", LENGTHS)
    with pytest.raises(UserError, match=r"2 rows exceed sequence_len 4; the first: .*a.jsonl, line 2") as error:
        prepare(settings(path, sequence_len=4, excess_length_strategy="raise"), None)
    assert "sequence_len: 6" in str(error.value)
    assert prepare(settings(path, sequence_len=6, excess_length_strategy="raise"), None).manifest.train_rows == 4


@pytest.mark.parametrize(("least", "lengths"), [(None, [4, 5, 6, 3]), (4, [4, 5, 6]), (6, [6])])
def test_rows_shorter_than_min_sample_len_are_dropped_and_counted(write, settings, least, lengths):
    prepared = prepare(settings(write("a.jsonl", LENGTHS), min_sample_len=least), None)
    assert [len(row) for row, _ in all_rows(prepared.folder)] == lengths
    dropped = prepared.manifest.short_rows
    assert dropped == 4 - len(lengths)
    assert (f"{dropped} row{'s' * (dropped > 1)} shorter than min_sample_len dropped" in prepared.summary()) == (
        dropped > 0
    )
    assert (f"{dropped} are shorter than min_sample_len." in prepared.summary()) == (dropped > 0)


def test_min_sample_len_counts_windows_and_leaves_a_row(write, settings):
    path = write("a.jsonl", [{"text": "a b c d e a b"}])
    config = settings(entry(path, "completion"), sequence_len=4, min_sample_len=4)
    prepared = prepare(config, None)
    assert [len(row) for row, _ in all_rows(prepared.folder)] == [4, 4] and prepared.manifest.short_rows == 1
    with pytest.raises(UserError, match="no row is left") as error:
        prepare(settings(entry(path, "completion"), sequence_len=16, min_sample_len=100), None)
    assert "a smaller min_sample_len" in str(error.value)


def test_a_prompt_cut_before_its_answer_teaches_nothing(write, settings):
    row = {"instruction": "Add.", "output": "3"}
    path = write("a.jsonl", [row])
    config = settings(entry(path, "alpaca"), excess_length_strategy="truncate")
    with pytest.raises(UserError, match="no row is left: 1 without a token to learn\n  a larger sequence_len"):
        prepare(config, None)


def test_texts_without_an_answer_are_not_called_too_short(write, settings, tokenizer):
    rows = [{"segments": [{"label": False, "text": "a b c d"}]}] * 3
    config = settings(entry(write("a.jsonl", rows), "input_output"), sequence_len=64)
    with pytest.raises(UserError, match="no row is left: 3 without a token to learn\n  are columns and roles"):
        prepare(config, None)


MASKED = [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}] * 2


@pytest.mark.parametrize(
    ("name", "content", "changes", "says"),
    [
        ("a.jsonl", TOKENS, {"sequence_len": 2}, "no row is left: 10 longer than sequence_len 2"),
        ("a.txt", "a", {}, "no row is left"),
        ("a.jsonl", MASKED, {}, "no row of the train split has a token to learn"),
        ("a.jsonl", TOKENS, {"val_set_size": 10}, "val_set_size: 10"),
        ("a.jsonl", TOKENS[:1], {"val_set_size": 0.5}, "at most 0"),
        ("a.jsonl", '{"input_ids": [1, 2]}\n{"input_ids": [1, 2}', {}, "line 2"),
        ("a.jsonl", TOKENS, {"vocab": 39}, "line 10\n  token 39 is outside the model's vocabulary of 39"),
        ("a.jsonl", [{"input_ids": [1, 2], "labels": [1, 50]}], {"vocab": 40}, "token 50 is outside"),
        ("a.txt", TEXT, {"vocab": 100}, "outside the model's vocabulary of 100"),
        ("a.txt", TEXT, {"vocab": 269, "train": 270}, "tokenizer.vocab_size: 270"),
        ("a.txt", TEXT, {"train": 100}, "at least 257"),
        ("a.txt", TEXT, {"tokenizer": None}, "base_model: "),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, write, settings, name, content, changes, says):
    path = write(name, content)
    changes = dict(changes)
    vocab = changes.pop("vocab", None)
    if "train" in changes:
        changes["tokenizer"] = type("Trained", (), {"vocab_size": changes.pop("train")})()
    before = listing(tmp_path)
    with pytest.raises(UserError) as error:
        prepare(settings(path, **changes), vocab)
    assert says in str(error.value)
    assert listing(tmp_path) == before


def test_vocabulary_that_just_fits(write, settings):
    assert prepare(settings(write("a.jsonl", TOKENS)), 40).manifest.largest_token == 39


def test_reused_only_when_nothing_that_matters_changed(tmp_path, write, settings):
    path = write("a.jsonl", TOKENS)
    first = prepare(settings(path), None)
    files = listing(first.folder)
    again = prepare(settings(path, seed=7), None)  # without a split the seed does not matter
    assert again.reused and not first.reused and listing(first.folder) == files
    assert prepare(settings(path.rename(path.with_name("moved.jsonl"))), None).reused
    with pytest.raises(UserError, match="token 39"):
        prepare(settings(path.with_name("moved.jsonl")), 39)

    changed = write("a.jsonl", [{"input_ids": [11, 20, 30]}, *TOKENS[1:]])  # as many bytes
    assert not prepare(settings(changed), None).reused
    assert all_rows(first.folder)[0][0] == [11, 20, 30]
    changes = [
        {}, {"sequence_len": 15}, {"excess_length_strategy": "truncate"}, {"train_on_inputs": True},
        {"min_sample_len": 2}, {"val_set_size": 2}, {"val_set_size": 2, "seed": 43}, {"val_set_size": 0.2},
    ]  # fmt: skip
    assert len({prepare(settings(changed, **change), None).manifest.key for change in changes}) == len(changes)


def test_the_tokenizer_is_part_of_the_key(write, settings):
    path = write("a.txt", TEXT)
    train = [type("Trained", (), {"vocab_size": n})() for n in (270, 275)]
    one, two = (prepare(settings(path, tokenizer=t), 275) for t in train)
    assert two.manifest.tokenizer_size == 275 and not two.reused
    assert one.manifest.key != two.manifest.key != prepare(settings(path), None).manifest.key


def test_a_trained_tokenizer_lies_in_the_folder(write, settings):
    from transformers import AutoTokenizer

    trained = type("Trained", (), {"vocab_size": 270})()
    config = settings(write("a.txt", TEXT), tokenizer=trained)
    for prepared in (prepare(config, 270), prepare(config, 270)):
        assert prepared.tokenizer_folder == prepared.folder
        theirs = AutoTokenizer.from_pretrained(prepared.folder)
        assert theirs.decode([token for row, _ in all_rows(prepared.folder) for token in row]) == TEXT
        assert prepared.manifest.eos_token_id == theirs.eos_token_id
    with pytest.raises(UserError, match="at most 260"):
        prepare(config, 260)


def test_a_folder_of_others_is_never_replaced(tmp_path, write, settings):
    mine = tmp_path / "out" / "prepared" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        prepare(settings(write("a.jsonl", TOKENS)), None)
    (mine.parent / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds something else"):
        prepare(settings(write("a.jsonl", TOKENS)), None)
    assert mine.read_text() == "years of work"


def test_prepared_data_of_another_version_is_replaced(write, settings):
    config = settings(write("a.jsonl", TOKENS))
    manifest = prepare(config, None).folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"gone": 1}))
    assert not prepare(config, None).reused
    assert prepare(config, None).reused


@pytest.mark.parametrize("writing", [True, False], ids=["writing", "renaming"])
def test_a_write_that_fails_keeps_what_was_there(tmp_path, write, settings, monkeypatch, writing):
    prepared = prepare(settings(write("a.jsonl", TOKENS)), None)
    before, rename = listing(tmp_path / "out"), Path.rename

    def full(folder, target):
        if writing or (target == prepared.folder and not folder.name.endswith(".old")):
            raise OSError(28, "No space left on device")
        return rename(folder, target)

    monkeypatch.setattr(*((SampleWriter, "append") if writing else (Path, "rename")), full)
    with pytest.raises(UserError, match="no space is left on the disk, .* are needed, .* are free"):
        prepare(settings(write("b.jsonl", TOKENS[1:])), None)
    assert listing(tmp_path / "out") == before
    assert len(all_rows(prepared.folder)) == 10


def test_a_process_killed_while_it_replaces_leaves_nothing_in_the_way(write, settings, monkeypatch):
    """Killed before its first removal or renaming, before its second..., in a removal half way."""
    rmtree, rename = shutil.rmtree, Path.rename
    config, changed = settings(write("a.jsonl", TOKENS)), settings(write("b.jsonl", TOKENS[1:]))

    def go_on() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    def remove(folder, **options):
        (folder / "manifest.json").unlink(missing_ok=True)
        go_on()
        rmtree(folder, **options)

    def move(folder, target):
        go_on()
        return rename(folder, target)

    for calls in range(8):
        prepare(config, None)
        left = iter(range(calls))
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", remove)
            patch.setattr(Path, "rename", move)
            prepare(changed, None)
        assert prepare(changed, None).manifest.train_rows == len(TOKENS) - 1
    assert next(left, None) is not None  # the last one was not killed


@pytest.mark.parametrize(("size", "held"), [(3, 3), (0.2, 2), (0.001, 1), (0.99, 9)])
def test_split(tmp_path, write, settings, size, held):
    def split(seed, folder):
        folder = prepare(settings(path, val_set_size=size, seed=seed), None, tmp_path / folder).folder
        return [[row[0] for row, _ in all_rows(folder, name)] for name in ("train", "eval")]

    path = write("a.jsonl", TOKENS)
    train, held_out = split(1, "a")
    assert len(held_out) == held
    assert sorted(train + held_out) == [row["input_ids"][0] for row in TOKENS]
    assert split(1, "b") == [train, held_out]
    others = [split(seed, f"c{seed}") for seed in range(2, 12)]
    assert any(other != [train, held_out] for other in others)
    assert all(rows == sorted(rows) for other in others for rows in other)  # file order within each


def test_no_split_has_no_eval_rows(write, settings):
    prepared = prepare(settings(write("a.jsonl", TOKENS)), None)
    assert prepared.manifest.eval_rows == 0
    with pytest.raises(UserError, match=r"eval/tokens.npy\n  does not exist"):
        all_rows(prepared.folder, "eval")


def test_masks_that_attention_ignores_are_reported(write, settings):
    prepared = prepare(settings(write("a.jsonl", [{"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}])), None)
    assert "1 row with a masked token that later ones still attend to" in prepared.summary()


def test_the_real_config_fits(tmp_path, write):
    config = TrainConfig(
        base_model=str(tmp_path),
        datasets=[{"path": str(write("a.txt", TEXT))}],
        tokenizer={"train": "bpe", "vocab_size": 270},
        sequence_len=16,
        output_dir=str(tmp_path / "out"),
    )
    prepared = prepare(config, 270)
    assert prepared.folder == tmp_path / "out" / "prepared"
    assert prepared.summary().startswith("data: 3 rows, 37 tokens")


def test_preparing_imports_no_torch():
    code = "import sys, tessera.data.prepare, tessera.data.stdlib; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# ---- output_dir and data, one in the other


@pytest.mark.parametrize("place", ["d/out", "d/runs/out", "linked"])
def test_what_a_run_writes_into_its_data_folder_is_no_data(tmp_path, write, settings, place):
    folder = write("d/a.jsonl", TOKENS).parent
    output = tmp_path / "in" / place
    output.mkdir(parents=True)
    (output / "metrics.jsonl").write_text("{}\n")
    given = folder
    if place == "linked":
        (tmp_path / "given").symlink_to(folder)  # the data by another name
        given, output = tmp_path / "given", folder / "out"
    config = settings(given, output_dir=str(output))
    first = prepare(config, 40)
    (output / "metrics.jsonl").write_text("{}\n{}\n")
    again = prepare(config, 40)
    assert again.reused and first.manifest.train_rows == len(TOKENS)


def test_output_dir_that_is_the_data_folder_is_refused_at_once(tmp_path, write, settings):
    folder = write("d/a.jsonl", TOKENS).parent
    before = listing(tmp_path)
    (tmp_path / "same").symlink_to(folder)
    for name in (folder, folder / ".." / "d", tmp_path / "same"):
        with pytest.raises(
            UserError, match="output_dir: .*\n  is the data folder .* too: .*\n  a folder of its own, such as"
        ):
            prepare(settings(folder, output_dir=str(name)), 40)
    (tmp_path / "same").unlink()
    assert listing(tmp_path) == before


def test_data_within_output_dir_are_read(tmp_path, write, settings):
    folder = write("d/a.jsonl", TOKENS).parent
    for _ in range(2):
        prepared = prepare(settings(folder, output_dir=str(tmp_path / "in")), 40)
        assert prepared.manifest.train_rows == len(TOKENS)
    assert prepared.reused
