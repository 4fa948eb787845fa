"""Cases of what a person types: the YAML file, --set, options, the environment."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.world import SETTINGS, write_yaml

SIZE_KEYS = [
    "tensor_parallel_size", "tensor_parallel_slices", "tensor_parallel_depth", "dp_shard_size", "dp_replicate_size",
    "micro_batch_size", "gradient_accumulation_steps", "sequence_len", "save_steps", "save_total_limit", "max_steps",
    "seed", "warmup_steps", "logging_steps", "eval_steps", "val_set_size", "check_replicas_steps", "num_epochs",
    "group_timeout_minutes", "tensor_parallel_scratch_gib", "learning_rate", "weight_decay", "max_grad_norm",
    "context_parallel_size", "ulysses_size", "ulysses_chunks", "tiled_mlp_num_shards",
]  # fmt: skip
MODES = ("1d", "2d", "2.5d", "3d")
READERS = (("inspect", "run.yaml"), ("train", "run.yaml"), ("launch", "run.yaml", "--slurm"), ("verify", "run.yaml"))


def read(case: Case, *more: str, file: str = "run.yaml", **how: Any) -> None:
    """Have the config read by one of the commands that read it; training that goes on and on is stopped."""
    words = list(case.pick(READERS[0], READERS[1], READERS[1], READERS[2], READERS[3]))
    words[1] = file
    case.tessera(*words, *more, **how)


def keys() -> list[str]:
    """Every key of the YAML file."""
    from tessera.config.schema import TrainConfig

    return list(TrainConfig.model_fields)


@group(4)
def yaml_text(case: Case) -> None:
    """YAML that is none, or much more than it seems."""
    case.kind, file = 17, case.here / "run.yaml"
    text = file.read_text()
    form = case.cycle(*range(8), 7, 7)
    if form == 0:
        case.what, content = (
            "brackets",
            f"{text}seed: {hostile.deep(case.dice, case.pick('[', '{a: '), '', '')}\n".encode(),
        )
    elif form == 1:
        case.what = "an alias bomb"
        content = f"{text}{hostile.alias_bomb(case.dice)}\n".encode()
    elif form == 2:
        count = case.pick(50, 3000, 40_000)
        case.what = f"{count} unknown keys"
        content = (text + "".join(f"key_{i}: {i}\n" for i in range(count))).encode()
    elif form == 3:
        case.what, content = "garbled bytes", hostile.garbled(text.encode(), case.dice)
    elif form == 4:
        case.what = "another encoding"
        content = text.encode(case.pick("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp500"))
    elif form == 5:
        lines = text.splitlines()
        at = case.dice.randrange(len(lines) + 1)
        lines[at:at] = [
            case.pick("---", "...", "--- !x", "%YAML 9.9\n---", "%TAG ! !", "\t- x", "? - a\n: b", "<<: *x", "<<: [1]")
        ]
        case.what, content = "a line of YAML's own", "\n".join(lines).encode()
    elif form == 6:
        odd = [
            b"",
            b"\n",
            b"null",
            b"[]",
            b"- a",
            b"a",
            b"{}",
            b"---",
            b"1: 2",
            b"[1]: 2",
            b"? {a: b}\n: c",
            b"\xff",
            b"\0",
            b"#",
            b"~: 1",
        ]
        case.what, content = "a file that is no mapping", case.pick(*odd)
    else:
        key = case.pick(*keys())
        scalar = hostile.scalar(case.dice)
        case.what, content = f"{key}: {scalar[:40]}", f"{text}{key}: {scalar}\n".encode()
    file.write_bytes(content)
    read(case, free=b"output_dir" not in content)


@group(4)
def config_values(case: Case) -> None:
    """Every key with values of every kind."""
    case.kind = 17
    settings: dict[str, Any] = dict(SETTINGS)
    for _ in range(case.pick(1, 1, 2)):
        key = case.pick(*keys())
        settings[key] = hostile.value(case.dice)
        if key == "datasets" and case.dice.random() < 0.7:
            inner = case.pick("path", "type", "field", "split")
            settings[key] = [{"path": "./book.txt", inner: hostile.value(case.dice)}]
        if key in ("tokenizer", "tensor_parallel_mesh", "fsdp_config") and case.dice.random() < 0.7:
            inner = case.pick("train", "vocab_size", "row", "col", "inner", "depth", "offload_params", "nothing")
            settings[key] = {inner: hostile.value(case.dice)}
        if key in SIZE_KEYS and type(settings[key]) is int:
            case.kind = 16
        if key in ("base_model", "tokenizer", "resume_from_checkpoint"):
            case.kind = 19 if settings[key] in ("owner/model", "a" * 300) else 18
        case.what += f"{key}={settings[key]!r:.40} "
    output = settings["output_dir"]
    case.outputs |= {output.strip("./").split("/")[0]} if isinstance(output, str) else set()
    write_yaml(case.here / "run.yaml", settings)
    read(case, free=output != "./new")


@group(2)
def set_option(case: Case) -> None:
    """--set with every kind of text."""
    case.kind = 17
    key = case.pick(*keys(), "tensor_parallel_mesh.row", "", " ", "a=b", "nothing")
    scalar = hostile.scalar(case.dice) if case.dice.random() < 0.8 else hostile.deep(case.dice, "[", "")[:100_000]
    if key == "output_dir":
        key = "seed"
    case.what = f"--set {key}={scalar[:40]}"
    read(case, "--set", f"{key}={scalar}"[:100_000].replace("\0", "?"))


@group(5)
def sizes(case: Case) -> None:
    """Sizes that no machine has, in keys that others are compared with."""
    case.kind, settings = 16, SETTINGS | {"max_steps": 1, "save_steps": None}
    names = case.dice.sample(SIZE_KEYS, case.pick(1, 1, 2, 3))
    if case.dice.random() < 0.5:
        names[0] = case.pick(*SIZE_KEYS[:8])
    for name in names:
        settings[name] = case.dice.choice(hostile.SIZES)
    settings["tensor_parallel_mode"] = case.pick(*MODES)
    if case.dice.random() < 0.3:
        axes = case.dice.sample(["inner", "depth", "row", "col"], 2)
        settings["tensor_parallel_mesh"] = {axis: case.dice.choice(hostile.SIZES) for axis in axes}
        names.append("tensor_parallel_mesh")
    if case.dice.random() < 0.1:
        settings["tokenizer"] = {"train": "bpe", "vocab_size": case.pick(10**9, 10**18, 2**64, 257)}
        names.append("tokenizer")
    if case.turn % 4 == 3:  # switches that exclude each other
        switches = {"depth_weights": "shard", "size": 2, "schedule": case.cycle("gather", "summa", "cannon")}
        names = [f"tensor_parallel_{name}" for name in switches]
        settings = SETTINGS | dict(zip(names, switches.values(), strict=True)) | {"tensor_parallel_mode": "2d"}
    case.what = ", ".join(f"{name} {settings[name]!r:.40}" for name in names) + f", {settings['tensor_parallel_mode']}"
    write_yaml(case.here / "run.yaml", settings)
    read(case)


@group(2)
def other_tools(case: Case) -> None:
    """Keys of other tools with values of every kind, beside ours."""
    from tessera.config import compat

    case.kind = 17
    tables = [compat.TOP.refused, compat.TOP.ours, compat.TOP.no_effect]
    settings = SETTINGS | {case.pick(*case.pick(*tables)): hostile.value(case.dice) for _ in range(3)}
    if case.turn % 2:
        settings["fsdp_config"] = {case.pick(*compat.FSDP.others): hostile.value(case.dice)}
    if case.dice.random() < 0.3:
        settings["datasets"] = [{"path": "./book.txt", case.pick(*compat.DATASETS.others): hostile.value(case.dice)}]
    settings["output_dir"] = "./new"
    case.what = ", ".join(f"{key}={value!r:.30}" for key, value in settings.items() if key not in SETTINGS)
    write_yaml(case.here / "run.yaml", settings)
    read(case)


@group(2)
def deepspeed(case: Case) -> None:
    """DeepSpeed configs, in a file and in the YAML, with values of every kind."""
    from tessera.config import compat
    from tessera.config.deepspeed import TAKEN, WELL_KNOWN

    case.kind = 17
    names = [*compat.DEEPSPEED.others, *TAKEN, "bf16", "optimizer", "zero_optimization", "nothing"]
    zero = {"stage": case.pick(0, 1, 2, 3, 3, hostile.value(case.dice))}
    config: Any = {"zero_optimization": zero}
    for _ in range(case.pick(0, 1, 2)):
        name, value = case.pick(*names), case.pick(hostile.value(case.dice), {"enabled": True}, {"device": "cpu"})
        (zero if name.startswith("zero.") else config)[name.removeprefix("zero.")] = value
    form = case.cycle("file", "values", "garbled", "deep", "name")
    written = json.dumps(config).encode()
    if form == "garbled":
        written = hostile.garbled(written, case.dice)
    elif form == "deep":
        written = hostile.deep(case.dice, "[", "]").encode()
    (case.here / "ds.json").write_bytes(written)
    named = case.pick(*WELL_KNOWN, "no.json", "model", "/dev/zero", hostile.value(case.dice))
    given = {"values": config, "name": named}.get(form, "ds.json")
    case.what = f"deepspeed {form}: {given!r:.80} {config!r:.80}"
    write_yaml(case.here / "run.yaml", SETTINGS | {"deepspeed": given, "output_dir": "./new"})
    read(case)


@group(2)
def keys_as_options(case: Case) -> None:
    """Keys of the file as options of the command, nested too, with every kind of text."""
    case.kind = 17
    key = case.pick(
        *keys(), "datasets.0.path", "datasets.9.path", "fsdp-config.offload-params", "tokenizer.train", "a.b.c"
    )
    key = "seed" if key == "output_dir" else key.replace("_", case.pick("_", "-"))
    scalar = hostile.scalar(case.dice)[:10_000].replace("\0", "?")
    words = case.pick([f"--{key}", scalar], [f"--{key}={scalar}"], [f"{key}={scalar}"], [f"--{key}"], [f"--no-{key}"])
    case.what = " ".join(words)[:80]
    read(case, *words)


@group(1)
def pipe(case: Case) -> None:
    """A config that can be read but once, and is not there for ranks."""
    case.kind = 13
    content = (case.here / "run.yaml").read_bytes()
    if case.dice.random() < 0.3:
        content = case.pick(b"", b"\xff", content[:20])
    ranks = ["--set", "tensor_parallel_size=2"] if case.dice.random() < 0.5 else []
    case.what = f"{len(content)} bytes through /dev/stdin {ranks}"
    if len(content) < 50:
        read(case, *ranks, file="/dev/stdin", stdin=content, codes=(2,))
    elif ranks:
        case.tessera("train", "/dev/stdin", *ranks, stdin=content, codes=(0,))
    else:
        case.tessera("train", "/dev/stdin", stdin=content, codes=(0,))
        case.is_the_run("new")


@group(1)
def config_path(case: Case) -> None:
    """A config file that is no file."""
    case.kind = 18
    odd = case.here / "odd.yaml"
    form = case.cycle("folder", "link", "circle", "none", "device", "long", "socket")
    if form == "folder":
        odd.mkdir()
    elif form == "link":
        odd.symlink_to("run.yaml")
    elif form == "circle":
        odd.symlink_to("odd.yaml")
    elif form == "socket":
        os.mknod(odd, 0o140644)
    words = {"none": "nothing.yaml", "device": case.pick("/dev/null", "/dev/zero"), "long": "a" * 5000}
    case.what = f"the config file is a {form}"
    read(case, file=words.get(form, "odd.yaml"))


OPTIONS: dict[str, list[str]] = {
    "train": ["--num-processes", "--max-steps", "--nproc-per-node", "--num-machines", "--max-restarts"],
    "launch": ["--nodes", "--gpus-per-node", "--main-process-port", "--max-restarts"],
    "count": ["--layers", "--batch", "--sequence", "--memory"], "verify": ["--all-layouts"],
}  # fmt: skip
WORD_OPTIONS = {
    "train": ["--main-process-ip", "--launcher", "--set"],
    "launch": ["--time", "--partition", "--account", "--job-name", "--output", "--set"],
    "inspect": ["--weight", "--activation", "--picture", "--set"],
    "count": ["--ranks", "--model"],
    "verify": ["--inject", "--json", "--set"],
    "convert": ["--config", "--dtype", "--max-shard-size"],
}


@group(4)
def options(case: Case) -> None:
    """Options with numbers and words of every kind."""
    name = case.cycle("train", "launch", "inspect", "verify", "train", "convert", "train", "launch", "count")
    words: list[str] = {"count": [], "convert": ["out/checkpoint-2", "target"]}.get(name, ["run.yaml"])
    words = [*words, *(["--slurm"] if name == "launch" else [])]
    case.kind = 19
    if name in OPTIONS and case.dice.random() < 0.6:
        for option in case.dice.sample(OPTIONS[name], min(case.pick(1, 2), len(OPTIONS[name]))):
            number = str(
                case.dice.choice(hostile.SIZES)
                if case.dice.random() < 0.8
                else case.pick("x", "1.5", "nan", "inf", "1e9", "")
            )
            words += [option, number]
            case.kind = 16
    else:
        option = case.pick(*WORD_OPTIONS[name])
        odd = case.pick(
            *hostile.TEXTS,
            "100000000000",
            "8,",
            "8,x",
            "1,2,3,4,5,6,7",
            "0",
            "-1",
            "10e9",
            "1e400GB",
            "9" * 400 + "MB",
            "all",
        )
        words += [
            option,
            odd.replace("\0", "?")
            if option != "--output"
            else case.pick("no/where/job.sh", "model", "/dev/full", "job.sh"),
        ]
        case.kind = 16 if option in ("--ranks", "--max-shard-size") else 19
    if name == "count":
        words += ["--ranks", "2"] if "--ranks" not in words else []
        words += ["--model", "model"] if "--model" not in words else []
    case.outputs |= {"target", "job.sh"}
    case.what = " ".join([name, *(word[:40] for word in words)])
    case.tessera(name, *words, free=name in ("inspect", "verify"))


@group(1)
def words(case: Case) -> None:
    """Command lines that are none."""
    case.kind, pieces = (
        19,
        [
            "train",
            "inspect",
            "count",
            "run.yaml",
            "--set",
            "--help",
            "--nothing",
            "",
            "-x",
            "--",
            "=",
            "config",
            "keys",
            "show",
            "--learning-rate",
            "seed=1",
        ],
    )
    chosen = case.dice.sample(pieces, case.dice.randrange(1, 5))
    case.what = " ".join(chosen)
    case.tessera(*chosen)


@group(5)
def written(case: Case) -> None:
    """Files that a command is asked to write, where that cannot be, and well-formed questions of every command."""
    case.kind = 19
    target = case.pick("no/where/x", "model", "/dev/full", "book.txt/x", "a" * 300, "target/x")
    lines = [
        ["inspect", "run.yaml", "--picture", f"{target}.svg"],
        ["count", "--ranks", "2", "--model", "model", "--batch", "2", "--sequence", "4", "--output", target],
        ["verify", "run.yaml", "--json", target, "--set", "tensor_parallel_size=2"],
        ["launch", "run.yaml", "--slurm", "--output", target],
        ["convert", "model", target],
        ["convert", "out/checkpoint-2", target],
        ["inspect", "run.yaml", "--json", "--set", "tensor_parallel_size=2", "--activation", "q"],
        ["count", "--ranks", "2", "--model", "model", "--batch", "2", "--sequence", "4"],
        ["config", "schema"],
        ["config", "show", "run.yaml", "--datasets.0.path", "book.txt"],
    ]
    line = case.cycle(*lines)
    case.what = " ".join(line)[:100]
    case.outputs |= {target.split("/")[0], f"{target}.svg", "no"} - {"model", "book.txt"}
    case.tessera(*line)


VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
GOOD = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29555",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
}
NEEDED = VARIABLES[:4]


@group(2)
def environment(case: Case) -> None:
    """Some of the variables by which a launcher speaks, or all with one that is nonsense."""
    case.kind = 12
    given = {name: GOOD.get(name, "1") for name in case.dice.sample(VARIABLES, case.dice.randrange(1, len(VARIABLES)))}
    if set(NEEDED) <= given.keys() or case.dice.random() < 0.4:
        given |= {name: GOOD[name] for name in NEEDED if case.dice.random() < 0.9}
        given[case.pick(*NEEDED)] = case.pick(
            "", "x", "-1", "1.5", "99999999999", " ", "nowhere.invalid" if case.dice.random() < 0.1 else "0x"
        )
    if set(NEEDED) <= given.keys() and all(given[name] == GOOD[name] for name in NEEDED):
        del given[case.pick(*NEEDED)]
    case.what = json.dumps(given)
    command = case.pick("train", "train", "verify")
    case.tessera(command, "run.yaml", variables=given, free=True)


@group(1)
def other_variables(case: Case) -> None:
    """Variables that libraries read, with nonsense in them."""
    case.kind = 12
    name = case.pick(
        "OMP_NUM_THREADS",
        "COLUMNS",
        "TESSERA_ATTEMPT",
        "TERM",
        "LC_ALL",
        "HOME",
        "CUDA_VISIBLE_DEVICES",
        "TMPDIR",
        "TORCHELASTIC_RESTART_COUNT",
    )
    odd = case.pick("", "x", "-1", "0", "1e9", "/nowhere", "99999999999999999999")
    case.what = f"{name}={odd}"
    case.tessera("train", "run.yaml", variables={name: odd})


def settings_of(here: Path) -> dict[str, Any]:
    return yaml.safe_load((here / "run.yaml").read_text())
