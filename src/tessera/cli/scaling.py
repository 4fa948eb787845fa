"""`tessera plan MODEL --scaling 8,16,32`: how the rate of training grows with the number of devices."""

from pathlib import Path

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target_folder, writing_target
from tessera.models.shapes import shape_of
from tessera.plan.choice import Training
from tessera.plan.machine import Cluster
from tessera.plan.scaling import Study, scaling_study
from tessera.plan.scaling_report import MARKS, described, draw, markdown, terminal_table
from tessera.sizes.bounds import RANK_COUNTS, RANKS

KEY = "--scaling"


def scaling(subject: str, cluster: Cluster, training: Training, text: str, output: Path | None) -> None:
    """Compare so many devices, print both tables, and write them with their figure into the folder `output`."""
    if cluster.machines:
        hint = f"Nx{cluster.per_machine}x{cluster.profile.name}"
        raise UserError("--cluster", str(cluster), f"{KEY} takes devices without their number", hint)
    devices = numbers_of(text)
    for number in devices:
        of = cluster.of(number)
        if of.devices != number:
            below = number // cluster.per_machine * cluster.per_machine
            hint = f"{below} or {below + cluster.per_machine}"
            raise UserError(KEY, number, f"does not fill machines of {cluster.per_machine} devices", hint)
    if output is not None:
        check_target_folder(output, "--output")
    console = terminal.console(markup=False)
    study = scaling_study(subject, shape_of(subject), cluster, training, devices)
    for line in described(study):
        console.print(line)
    console.print(terminal_table("strong scaling", study.strong))
    console.print(terminal_table("weak scaling", study.weak))
    for line in (MARKS, *study.missing):
        console.print(line)
    if output is not None:
        written(study, output)
        console.print(f"written: {output}/scaling.md, scaling.svg")


def written(study: Study, output: Path) -> None:
    """Write scaling.md and scaling.svg into the folder, which need not exist."""
    training = study.training
    command = (
        f"tessera plan {study.name} {KEY} {','.join(map(str, study.devices))} "
        f"--cluster Nx{study.cluster.per_machine}x{study.cluster.profile.name} "
        f"--sequence-len {training.sequence_len} --global-batch {training.global_batch}"
    )
    with writing_target(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
        (output / "scaling.md").write_text(markdown(study, command))
        draw(study, output / "scaling.svg")


def numbers_of(text: str) -> list[int]:
    """Numbers of devices, e.g. 8,16,32. Raises UserError for what is none."""
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or numbers[-1] > RANKS or len(numbers) > RANK_COUNTS:
        reason = f"are the numbers of devices to compare, at most {RANK_COUNTS} of them, each from 1 to {RANKS}"
        raise UserError(KEY, text, reason, "for example 8,16,32,64")
    return numbers
