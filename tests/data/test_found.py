"""Which files an entry names: folders of one format, chosen files, splits and their parts, saved and hub data sets."""

import gzip
import io
import json
from collections import Counter
from unittest.mock import patch

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from tests.data.helpers import entry

from tessera.core.errors import UserError
from tessera.data import hub
from tessera.data.formats import container, json_rows
from tessera.data.sources import read_documents, read_files


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts(path, notes=None, **keys):
    files = read_files([entry(path, **keys)], None, None, notes)
    return [document.segments[0].text for file in files for document in read_documents(file)]


@pytest.fixture
def fill(write):
    """A folder with files of these contents."""

    def fill(**files):
        for name, content in files.items():
            folder = write(f"d/{name}", content)
        return folder.parents[len(name.split("/")) - 1]

    return fill


PARQUET_LIKE = b"\x89PNG\r\n\x1a\n\x00"


def test_other_files_of_a_folder_of_text_are_passed_over_and_counted(fill):
    notes: list[str] = []
    folder = fill(
        **{"b.txt": "B", "a.md": "A", "README.md": "# about", "LICENSE": "all rights", "x.png": PARQUET_LIKE},
        **{"weights.pkl": b"\x80\x04K\x01.", "sub/c.txt": "C", "sub/notice of sale.txt": "N"},
    )
    assert texts(folder, notes) == ["A", "B", "C", "N"]
    assert notes == [f"4 other files of {folder} passed over: LICENSE, README.md, weights.pkl, …"]


def test_other_files_of_a_folder_of_rows_too(fill):
    notes: list[str] = []
    folder = fill(
        **{"a.jsonl": rows("a"), "b.json": json.dumps([{"text": "b"}]), "README.md": "x", "d/c.jsonl": rows("c")},
        **{"load.py": "import os\nos.abort()\n", "dataset_infos.json": "{}"},
    )
    assert texts(folder, notes) == ["a", "b", "c"]
    assert notes == [f"3 other files of {folder} passed over: README.md, dataset_infos.json, load.py"]


def test_a_readme_alone_is_the_text(fill):
    assert texts(fill(**{"README.md": "me"})) == ["me"]


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        ({"a.csv": "text\nx\n", "b.json": '[{"text": "y"}]'}, "csv, json"),
        ({"a.jsonl": rows("x"), "b.txt": "y"}, "json, text"),
        ({"a.csv": "text\nx\n", "b.tsv": "text\nx\n"}, "csv, tsv"),
    ],
)
def test_a_folder_of_several_formats_is_refused_with_the_way_out(fill, files, kinds):
    folder, one = fill(**files), kinds.partition(",")[0]
    with pytest.raises(UserError, match=rf"several formats \({kinds}\).*\n  ds_type: {one} .*data_files"):
        texts(folder)
    assert texts(folder, ds_type=one) == ["x"]  # the way out that the message names


@pytest.mark.parametrize("name", ["rows.xml", "page.HTML", "data.yaml", "page.html.gz"])
def test_markup_is_no_text_to_train_on_unless_asked_for(fill, name):
    content = b"<p>x</p>"
    folder = fill(**{name: gzip.compress(content) if name.endswith(".gz") else content.decode()})
    with pytest.raises(UserError, match=r"is not a format that is read\n  ds_type: text"):
        texts(folder / name)
    with pytest.raises(UserError, match=f"the folder holds no data: it has {name}"):
        texts(folder)
    assert texts(folder / name, ds_type="text") == texts(folder, ds_type="text") == ["<p>x</p>"]


def test_data_files_and_ds_type_choose(fill, monkeypatch):
    folder = fill(**{"a.csv": "text\nx\n", "b.json": '[{"text": "y"}]', "more/c.jsonl": rows("z"), "d.txt": "t"})
    assert texts(folder, data_files="a.csv") == ["x"]
    assert texts(folder, data_files=["more/*.jsonl", "b.json"]) == ["z", "y"]
    assert texts(folder, ds_type="json") == ["y", "z"]
    assert texts(folder, ds_type="csv") == ["x"] and texts(folder, ds_type="text") == ["t"]
    monkeypatch.chdir(folder)
    assert texts("json", data_files="more/c.jsonl") == ["z"]
    with pytest.raises(UserError, match=r"data_files: \*.arrow\n  no such file in"):
        texts(folder, data_files="*.arrow")
    with pytest.raises(UserError, match="names several formats"):
        texts(folder, data_files=["a.csv", "b.json"])
    with pytest.raises(UserError, match="is a file already"):
        texts(folder / "a.csv", data_files="a.csv")


@pytest.mark.parametrize(("name", "content"), [("table", b"PAR1\0"), ("old", b"\x1f\x8b\x08\xff")])
def test_rows_under_a_name_that_does_not_say_so_are_not_passed_over(fill, name, content):
    with pytest.raises(UserError, match="which its name does not say"):
        texts(fill(**{"a.txt": "x", name: content}))


@pytest.mark.parametrize("files", [{"x.png": PARQUET_LIKE}, {"x.pkl": b"\x80"}, {"e.txt": ""}])
def test_a_folder_without_data_is_refused(fill, files):
    with pytest.raises(UserError, match="holds no data"):
        texts(fill(**files))


SPLIT = {"data/train-00000-of-00002.jsonl": rows("a"), "data/train-00001-of-00002.jsonl": rows("b")}
SPLIT |= {"data/test-00000-of-00001.jsonl": rows("t"), "data/train_sft-00000-of-00001.jsonl": rows("s")}


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        (SPLIT, None, ["a", "b"]),
        (SPLIT, "train", ["a", "b"]),
        (SPLIT, "test", ["t"]),
        (SPLIT, "train_sft", ["s"]),
        ({"train.jsonl": rows("a"), "dev.jsonl": rows("v"), "test.jsonl": rows("t")}, None, ["a"]),
        ({"train.jsonl": rows("a"), "dev.jsonl": rows("v"), "test.jsonl": rows("t")}, "validation", ["v"]),
        ({"my_train_1.jsonl": rows("a"), "my_test.jsonl": rows("t")}, None, ["a"]),
        ({"training/x.jsonl": rows("a"), "eval/x.jsonl": rows("t")}, "test", ["t"]),
        ({"x.jsonl": rows("a"), "y.jsonl": rows("b"), "test.jsonl": rows("t")}, None, ["a", "b"]),
        ({"contest.jsonl": rows("a"), "trains.jsonl": rows("b")}, None, ["a", "b"]),
        ({"train.txt": "A", "valid.txt": "V"}, None, ["A"]),
        ({"test_of_faith.txt": "A", "train journeys.txt": "B"}, None, ["A", "B"]),
    ],
)
def test_names_tell_the_split(fill, files, split, found):
    notes: list[str] = []
    assert texts(fill(**files), notes, split=split) == found
    left = len(files) - len(found)
    assert notes == ([] if split or not left else [notes[0]]) and all(f"{left} file" in note for note in notes)


def test_a_split_that_is_not_there_is_refused(fill, write):
    with pytest.raises(UserError, match=r"no files of the split validation\n  there: test, train"):
        texts(fill(**SPLIT), split="validation")
    with pytest.raises(UserError, match="has no files of the split train\n  there: test"):
        texts(write("t/test.jsonl", rows("t")).parent)
    with pytest.raises(UserError, match="is one file: it has the split train alone"):
        texts(write("a.jsonl", rows("a")), split="test")


TEN = [str(n) for n in range(10)]


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"split": "train[:3]"}, TEN[:3]),
        ({"split": "train[2:5]"}, TEN[2:5]),
        ({"split": "train[:20%]"}, TEN[:2]),
        ({"split": "train[55%:]"}, TEN[6:]),
        ({"split": "train[-3:]"}, TEN[-3:]),
        ({"split": "train[-30%:-10%]"}, TEN[-3:-1]),
        ({"split": "train[:99]"}, TEN),
        ({"split": "train[:]"}, TEN),
        ({"shards": 3}, TEN[:4]),
        ({"shards": 3, "shards_idx": 2}, TEN[7:]),
        ({"shards": 2, "shards_idx": 1, "split": "train[3:9]"}, TEN[6:9]),
        ({"shards": 2, "shards_idx": 1, "split": "train[3:9]", "skip": 2}, TEN[8:9]),
        ({"split": "train[4:]", "skip": 1}, TEN[5:]),
        ({"preprocess_shards": 4}, TEN),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_parts_of_a_split(write, keys, found, several):
    if several:
        for name, part in {"a": TEN[:4], "b": TEN[4:5], "c": TEN[5:]}.items():
            path = write(f"d/{name}.jsonl", rows(*part)).parent
    else:
        path = write("a.jsonl", rows(*TEN))
    assert texts(path, **keys) == found


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"split": "train[:10%]+test"}, "cannot be read"),
        ({"split": "train[x:]"}, "cannot be read"),
        ({"split": "train[5:5]"}, "leaves no row"),
        ({"shards": 2, "shards_idx": 2}, "there are 2 shards"),
        ({"shards_idx": 1}, "which is not given"),
    ],
)
def test_parts_that_are_none_are_refused(write, keys, told):
    with pytest.raises(UserError, match=told):
        texts(write("a.jsonl", rows(*TEN)), **keys)
    with pytest.raises(UserError, match="is text: it has no rows"):
        texts(write("a.txt", "x"), split="train[:1]")


@pytest.mark.parametrize("count", [1, 4, 10, 17])
@pytest.mark.parametrize("shards", [1, 3, 4])
def test_shards_are_those_of_the_datasets_library(write, count, shards):
    names = [str(n) for n in range(count)]
    path, library = write("a.jsonl", rows(*names)), datasets.Dataset.from_dict({"text": names})
    for index in range(min(shards, count)):
        assert texts(path, shards=shards, shards_idx=index) == library.shard(shards, index)["text"]


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ({"split": "train[:3]"}, {"a": 3}),
        ({"split": "train[3:7]"}, {"a": 4, "b": 1, "c": 1}),
        ({"split": "train[:40%]"}, {"a": 4, "b": 1, "c": 5}),
        ({"split": "train[:3]", "skip": 2}, {"a": 3}),
    ],
)
def test_a_part_is_found_without_parsing_its_rows_and_reads_no_more_than_decides(write, keys, read):
    """The lines that are looked at; of each file one row is parsed, which tells what its rows are."""
    for name, part in {"a": TEN[:4], "b": TEN[4:5], "c": TEN[5:]}.items():
        path = write(f"d/{name}.jsonl", rows(*part)).parent
    seen, parsed = Counter(), []

    def lines_of(file, path):
        for line in json_rows.lines_of(file, path):
            seen[path.stem] += 1
            yield line

    with (
        patch.object(container, "lines_of", lines_of),
        patch.object(json_rows, "parse_json", lambda line: parsed.append(line) or json.loads(line)),
    ):
        read_files([entry(path, **keys)])
    assert seen == Counter(read) + Counter(a=3 if "skip" in keys else 0)
    assert len(parsed) == 3


def test_rows_of_parquet_are_counted_by_its_footer(write):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEN}), sink)
    with patch("tessera.data.formats.tables._rows", side_effect=AssertionError):
        assert container.count_rows(write("a.parquet", sink.getvalue()), container.Container("parquet")) == 10
    assert texts(write("a.parquet", sink.getvalue()), split="train[-20%:]") == TEN[8:]


def test_parts_and_settings_are_part_of_the_key(write):
    path = write("a.jsonl", rows(*TEN))
    keys = [{}, {"split": "train[:3]"}, {"shards": 2}, {"shards": 2, "shards_idx": 1}, {"type": "pretrain"}]
    assert len({read_files([entry(path, **each)])[0].key for each in keys}) == len(keys)
    other = write("b.jsonl", rows(*TEN))
    assert read_files([entry(other)])[0].key == read_files([entry(path)])[0].key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    data = datasets.Dataset.from_list([{"text": text} for text in TEN])
    data.save_to_disk(folder / "one", num_shards=3)
    splits = {"train": data.select([7, 2]), "test": data.select(range(3))}
    datasets.DatasetDict(splits).save_to_disk(folder / "several")
    return folder


def test_what_datasets_saved_is_read_without_it(saved):
    assert texts(saved / "one") == TEN
    assert texts(saved / "one", split="train[:25%]") == TEN[:2]
    assert texts(saved / "several") == ["7", "2"]
    assert texts(saved / "several", split="test[1:]") == ["1", "2"]
    with pytest.raises(UserError, match="has the splits train, test, and not dev"):
        texts(saved / "several", split="dev")


def test_a_saved_data_set_names_files_of_its_own_folder_alone(saved, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    with pytest.raises(UserError, match="names no files of rows"):
        texts(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_made_for_the_hub_has_configurations(fill, cache):
    head = "---\nconfigs:\n- config_name: one\n  data_files: x.jsonl\n- config_name: two\n  data_files:\n"
    head += "  - split: train\n    path: y.jsonl\n  - split: test\n    path: z.jsonl\n---\n# about\n"
    folder = fill(**{"README.md": head, "x.jsonl": rows("x"), "y.jsonl": rows("y", "w"), "z.jsonl": rows("z")})
    assert texts(folder, name="one") == ["x"]
    assert texts(folder, name="two") == ["y", "w"]
    assert texts(folder, name="two", split="train[1:]") == ["w"]
    assert texts(folder, name="two", split="test") == ["z"]
    with pytest.raises(UserError, match="has train, test"):
        texts(folder, name="two", split="dev")
    with pytest.raises(UserError, match="cannot be read: ValueError: .*one"):
        texts(folder)


def test_a_name_of_the_hub_is_handed_to_datasets_and_nothing_else_is(write, cache, monkeypatch):
    asked = []
    local = datasets.load_dataset("json", data_files=str(write("a.jsonl", rows("a", "b"))))

    def load_dataset(path, name=None, **keys):
        asked.append((path, name, keys))
        return local

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "reachable", lambda _: True)
    keys = {"name": "cfg", "revision": "v1", "data_files": "x.json"}
    assert texts("owner/data-set.v2", split="train[1:]", **keys) == ["b"]
    assert asked == [("owner/data-set.v2", "cfg", {"data_files": ["x.json"], "revision": "v1"})]
    assert texts("wikitext") == ["a", "b"]
    for path in ("nowhere.txt", "nowhere.jsonl", "./a/b", "/a/b", "a/b/c", "../x", "rows.csv"):
        with pytest.raises(UserError, match="no such file or folder\n  give the path"):
            texts(path)
    assert len(asked) == 2


@pytest.mark.parametrize("reader", ["pandas", "webdataset", "imagefolder"])
def test_a_reader_of_the_datasets_library_is_no_data_set(write, monkeypatch, reader):
    """Of some versions, the one called pandas unpickles what it reads."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match="is a reader of the datasets library"):
        texts(reader, data_files=str(write("a.pkl", b"x")))


def test_without_a_network_it_is_said_what_to_download_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda _: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError) as caught:
        texts("tatsu-lab/alpaca")
    assert "gives no data set of this name: https://huggingface.co cannot be reached" in str(caught.value)
    assert "hf download --repo-type dataset tatsu-lab/alpaca --local-dir alpaca; then datasets" in str(caught.value)
    assert datasets.config.HF_HUB_OFFLINE is False and huggingface_hub.constants.HF_HUB_OFFLINE is False
