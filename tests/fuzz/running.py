"""Cases of runs that are hit while they run: killed, starved of disk, cut off from their terminal, started twice."""

import os
import shutil
import signal

from fuzz.case import Case, group, stopped
from fuzz.subject import BROKEN, NO_PERMISSION, NO_SPACE, Fault
from fuzz.world import SETTINGS, digest, snapshot, write_yaml


@group(2)
def killed(case: Case) -> None:
    """SIGKILL at any operation on files; the next start leaves nothing of it and ends as if nothing had been."""
    case.kind = 4
    at = case.dice.randrange(1, case.world.operations + 1)
    case.what = f"SIGKILL at operation {at} of {case.world.operations}"
    case.tessera("train", "run.yaml", fault=Fault(after=at, signal=signal.SIGKILL), codes=(0, -signal.SIGKILL))
    case.ends_as_if_nothing_had_been()


@group(2)
def no_space(case: Case) -> None:
    """From some operation on nothing can be written, or no file beyond a size; then there is space again."""
    case.kind = 2
    if case.dice.random() < 0.6:
        at = case.dice.randrange(1, case.world.operations + 1)
        fault = Fault(after=at, errno=NO_SPACE)
        case.what = f"no space from operation {at} of {case.world.operations} on"
    else:
        fault = Fault(file_size=case.dice.choice([600, 3000, 5000, 9000, 20_000, 30_000, 60_000]))
        case.what = f"no file larger than {fault.file_size} bytes"
    seen = case.tessera("train", "run.yaml", fault=fault, free=True, codes=(0, 1, 2, 120))
    if seen.code == 0 and digest(case.here / "new/model.safetensors") != case.world.weights:
        case.wrong("exit code 0 without the weights")
    case.ends_as_if_nothing_had_been()


TARGETS = [
    "metrics.jsonl",
    "summary.json",
    "resolved_config.yaml",
    "loss.png",
    "README.md",
    "model.safetensors",
    ".export",
    "checkpoint-",
    "LATEST",
    "prepared",
    "config.json",
    "state.json",
]


@group(2)
def forbidden(case: Case) -> None:
    """Permission denied, or an error of the disk, for one of the files of a run."""
    case.kind, target = 6, case.cycle(*TARGETS)
    number = case.pick(NO_PERMISSION, BROKEN)
    case.what = f"{os.strerror(number)} for {target}"
    case.tessera("train", "run.yaml", fault=Fault(after=1, errno=number, path=target), free=True)
    case.ends_as_if_nothing_had_been(lines=target != "metrics.jsonl")


@group(2)
def folders_for_files(case: Case) -> None:
    """A folder, a link or bytes that are no text in the place of a file that a run writes."""
    case.kind, out = 6, case.here / "out"
    name, form = (
        case.pick(
            "metrics.jsonl",
            "summary.json",
            "resolved_config.yaml",
            "README.md",
            "model.safetensors",
            "config.json",
            ".export",
            "prepared",
            "tokenizer.json",
        ),
        None,
    )
    target = out / name
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    form = case.cycle("folder", "bytes", "link", "circle", "full folder", "fifo")
    precious = case.here / "precious"
    precious.write_text("keep me\n")
    if form == "folder":
        target.mkdir()
    elif form == "full folder":
        (target / "x").mkdir(parents=True)
    elif form == "fifo":
        os.mkfifo(target)
    elif form == "bytes":
        target.write_bytes(b'\xff\xfe{"step": 1}\n\x00\n{"step": []}\nnull\n')
    elif form == "link":
        target.symlink_to("../precious")
    else:
        target.symlink_to(name)
    case.what = f"{name} is a {form}"
    case.tessera("train", "more.yaml", free=True)
    if not precious.exists() or (precious.read_text() != "keep me\n" and name in (".export", "prepared")):
        case.wrong("what a link in the output folder leads to is lost")


@group(2)
def leftovers(case: Case) -> None:
    """Links and files where a run leaves folders, and checkpoints moved to another disk: saves go on."""
    case.kind, out, disk = 3, case.here / "out", case.here / "disk"
    disk.mkdir()
    (disk / "precious").write_text("keep me\n")
    form = case.cycle(
        "checkpoint moved",
        "part file",
        "part link",
        "part folder",
        "removed part",
        "latest part",
        "export link",
        "output moved",
        "replaced part",
    )
    settings = SETTINGS | {"output_dir": "./out", **case.pick({}, {"save_total_limit": 1}, {"save_total_limit": 2})}
    if form == "checkpoint moved":
        name = case.pick("checkpoint-1", "checkpoint-2")
        shutil.move(out / name, disk / name)
        (out / name).symlink_to(disk / name)
    elif form == "part file":
        (out / ".checkpoint-3.part").write_text("x")
    elif form == "part link":
        (out / f".checkpoint-{case.pick(3, 7)}.part").symlink_to(disk)
    elif form == "part folder":
        (out / ".checkpoint-3.part").mkdir()
        (out / ".checkpoint-3.part/inner").symlink_to(disk)
    elif form == "removed part":
        (out / ".checkpoint-2.removed.part").symlink_to(disk)
    elif form == "replaced part":
        (out / ".checkpoint-3.replaced.part").write_text("x")
    elif form == "latest part":
        (out / ".LATEST.part").mkdir()
    elif form == "export link":
        (out / ".export").symlink_to(disk)
    else:
        shutil.move(out, disk / "out")
        out.symlink_to(disk / "out")
        case.outputs.add("disk")
    case.what = f"{form}, save_total_limit {settings.get('save_total_limit')}"
    write_yaml(case.here / "more.yaml", settings)
    case.outputs.add("disk")
    if case.ends_as_if_nothing_had_been("out", names=False).code == 0 and not (disk / "precious").exists():
        case.wrong("what a link in the output folder leads to is lost")
    odd = sorted(path.name for path in out.glob(".*part")) + [path.name for path in out.glob("abandoned-*")]
    if odd and form != "output moved":
        case.wrong(f"left in out: {', '.join(odd)}")


@group(2)
def terminal(case: Case) -> None:
    """A terminal that is closed, full, gone after three lines, or knows ASCII alone: the run goes on."""
    case.kind = 14
    kinds = ("closed", "head", "full", "ascii")
    streams = case.pick(
        (case.pick(*kinds), "file"), ("file", case.pick(*kinds)), (case.pick(*kinds), case.pick(*kinds))
    )
    case.what = f"stdout {streams[0]}, stderr {streams[1]}"
    line = case.pick(
        ["train"],
        ["train"],
        ["train"],
        ["inspect"],
        ["config-keys"],
        ["verify", "--set", "tensor_parallel_size=2"],
        ["convert"],
    )
    words = {"convert": ["out/checkpoint-2", "target"], "config-keys": []}.get(line[0], ["run.yaml"])
    name = ""
    if "ascii" in streams and line[0] == "train":
        name = "naïve-数.yaml"
        (case.here / "run.yaml").rename(case.here / name)
        words = [name]
    case.outputs |= {"target", "shown"}
    seen = case.tessera(*line[:1], *words, *line[1:], terminal=streams, codes=(0,) if line == ["train"] else (0, 1, 2))
    if line == ["train"] and seen.code == 0:
        case.is_the_run("new")


@group(1)
def signals(case: Case) -> None:
    """Each signal to stop, at any step: the run saves and ends well, and goes on as if it had not been."""
    case.kind, number = 14, case.cycle(signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    step = case.pick(1, 2)
    case.what = f"{number.name} in step {step}"
    seen = case.tessera("train", "run.yaml", fault=Fault(step=step, signal=number), codes=(0,))
    if seen.code == 0 and not (case.here / f"new/checkpoint-{step}/SHA256SUMS").is_file():
        case.wrong("exit code 0 without a checkpoint")
    case.ends_as_if_nothing_had_been()


@group(1)
def started_twice(case: Case) -> None:
    """A second start in the folder of a run that lives: refused, nothing touched. Once that is killed, it goes on."""
    case.kind, step = 1, case.pick(1, 2, 3)
    case.what = f"a second start in step {step} of the first"
    first = case.tessera("train", "run.yaml", fault=Fault(step=step, signal=signal.SIGSTOP))
    if not first.pid:
        case.wrong(f"the first did not come to step {step}: {first.said[-300:]}", kind=6)
        return
    before = snapshot(case.here)
    try:
        changes = case.pick([], ["--set", "seed=7"], ["--set", "auto_resume_from_checkpoints=false"])
        second = case.tessera("train", "run.yaml", *changes)
        if second.code != 2:
            case.wrong(f"the second start was not refused: exit code {second.code}")
        if snapshot(case.here) != before:
            case.wrong("the second start has changed the folder of the first")
    finally:
        stopped(case, first)
    if not case.findings:
        case.ends_as_if_nothing_had_been()
