"""Which layout for which model on how many devices: tables that people quote, beside what our search finds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from tessera.plan.choice import Training
from tessera.plan.on_mesh import TOO_LARGE
from tessera.plan.quoted import (
    GPT_STEP,
    LLAMA_STEP,
    MISSING,
    QuotedTable,
    Searches,
    above_one,
    gib,
    in_stages,
    in_words,
    percent,
)


def sharded(searches: Searches) -> QuotedTable:
    """TP × FSDP × HSDP for five sizes of models on 8 and 16 devices."""
    rows = []
    for name in ("7B", "13B", "30B", "70B", "175B"):
        training = GPT_STEP if name == "175B" else LLAMA_STEP
        for devices in (8, 16):
            best = searches.best(name, devices, training)
            asked = [above_one(shard=devices), above_one(replicate=2, shard=devices // 2)]
            asked += [above_one(shard=devices // col, col=col) for col in (2, 4, 8)]
            asked += [above_one(row=devices), above_one(row=devices // 2, col=2)]
            ours = [searches.on(name, sizes, training) for sizes in asked]
            told = ["nothing fits", MISSING, MISSING] if best is None else [best.name, percent(best.mfu), gib(best)]
            known = [MISSING if each is None or best is None else f"{each.seconds / best.seconds:.2f}" for each in ours]
            rows.append([name, str(devices), *told, *known])
    return QuotedTable(
        "TP × FSDP × HSDP on 8 and 16 devices",
        "A layout for each of 7B–13B, 30B, 70B and 175B+; for 30B on 8 devices TP 2 × FSDP 4.",
        f"{in_words(LLAMA_STEP)}; 175B: {in_words(GPT_STEP)}. The last columns: seconds of a step over those of the "
        f"best layout; {MISSING}: does not surely fit, or does not divide. TP n stands for TP n × FSDP over the rest; "
        "row n cuts weights and tokens as FSDP does.",
        ("model", "devices", "best layout", "MFU", "GiB")
        + ("FSDP", "HSDP 2", "TP 2", "TP 4", "TP 8", "row n", "row n/2 × col 2"),
        rows,
        "The size of the model names no layout: what decides is whether states and gradients fit. At 7B FSDP alone is "
        "as fast as anything, for its gathers hide behind products and the sums of 1D do not. Above, memory decides: "
        "between the micro-batches of a step FSDP2 keeps whole gradients, while `row`, which cuts the same, keeps a "
        "rank's part. TP 2 × 4 for 30B on 8 devices is nearly right in this sense, as row 4 × col 2. With FSDP alone "
        "published runs of 30B on 8 × A100-80 reach an MFU of 55–56% (MosaicML, llm-foundry at 8c8dd48, everything "
        "recomputed).",
    )


MESHES = {"TP 1": above_one(), "TP 8": above_one(col=8), "2D 4 × 4": above_one(row=4, col=4)}
"""What a stage of a pipeline may be."""


def pipelined(searches: Searches) -> QuotedTable:
    """GPT of three sizes on 8 to 512 devices: geometry × pipeline."""
    rows = []
    for name in ("1.3B", "6.7B", "175B"):
        for devices in (8, 64, 512):
            best = searches.best(name, devices, GPT_STEP)
            formula = [
                (f"{tensor} × PP {stages} × DP {devices // (stages * prod(mesh.values()))}", made)
                for tensor, mesh in MESHES.items()
                for stages in (2, 4, 8)
                if (made := in_stages(searches, name, mesh, stages, devices, GPT_STEP)) and made.verdict != TOO_LARGE
            ]
            row = [name, str(devices)]
            row += ["nothing fits", MISSING] if best is None else [best.name, percent(best.mfu)]
            if formula:
                words, made = min(formula, key=lambda each: each[1].seconds)
                row += [words, percent(made.mfu)]
            else:
                row += ["nothing fits", MISSING]
            rows.append(row)
    return QuotedTable(
        "GPT: geometry × pipeline on 8 to 512 devices",
        "A geometry and a number of pipeline stages for each of GPT 1.3B, 7B and 175B at 8 to 512 devices.",
        f"{in_words(GPT_STEP)}. Of pipelines the fastest by formula of {', '.join(MESHES)}, with 2, 4 or 8 stages, "
        "1F1B, and FSDP (DP) over the rest; 6.7B is GPT-3's own size.",
        ("model", "devices", "best layout without a pipeline", "MFU", "best with a pipeline, by formula", "MFU"),
        rows,
        "The number of devices names no geometry: models that fit one machine want their weights cut, and no stages, "
        "on any number of devices. By formula no pipeline is ahead here; for the largest model on the most devices it "
        "is even.",
    )


@dataclass(frozen=True)
class Claim:
    """A layout that is quoted for sizes of models on so many devices, with a percentage that names nothing it is of."""

    sizes: str
    layout: str
    devices: int
    share: str
    model: str
    mesh: Mapping[str, int]
    stages: int
    data: tuple[int, ...]
    training: Training

    @property
    def makes(self) -> list[int]:
        """The devices that its sizes multiply to."""
        return [prod(self.mesh.values()) * self.stages * data for data in self.data]

    @property
    def stages_within(self) -> int:
        """As many of its stages as the quoted devices allow."""
        return min(self.stages, self.devices // prod(self.mesh.values()))


_MEDIUM = ("10–100B", "2D 4 × 4 × PP 2–4 × DP 2", 64, "80–85%", "39B", above_one(row=4, col=4))
_LARGE = ("> 100B", "2.5D / 3D TP 64+ × PP 8+ × DP 2–4", 256, "75–80%", "175B")
CLAIMS = (
    Claim("< 10B", "1D TP 4 × DP 2", 8, "85–90%", "7B", above_one(col=4), 1, (2,), LLAMA_STEP),
    Claim(*_MEDIUM, 2, (2,), GPT_STEP),
    Claim(*_MEDIUM, 4, (2,), GPT_STEP),
    Claim(*_LARGE, above_one(depth=4, row=4, col=4), 8, (2, 4), GPT_STEP),
    Claim(*_LARGE, above_one(inner=4, row=4, col=4), 8, (2, 4), GPT_STEP),
)


def by_size(searches: Searches) -> QuotedTable:
    """The layouts that are quoted for less than 10B, to 100B and above."""
    rows = []
    for claim in CLAIMS:
        made = in_stages(searches, claim.model, claim.mesh, claim.stages_within, claim.devices, claim.training)
        best = searches.best(claim.model, claim.devices, claim.training)
        ours = [MISSING, MISSING, MISSING]
        if made is not None:
            tensor = " × ".join(f"{axis} {n}" for axis, n in claim.mesh.items())
            data = claim.devices // (prod(claim.mesh.values()) * claim.stages_within)
            unfit = ", but does not fit" if made.verdict == TOO_LARGE else ""
            words = f"{tensor} × PP {claim.stages_within} × DP {data}"
            ours = [words, percent(searches.share(claim.model, made)) + unfit, percent(made.mfu)]
        told = [MISSING, MISSING] if best is None else [best.name, percent(searches.share(claim.model, best))]
        makes = "–".join(map(str, claim.makes))
        rows.append([claim.sizes, claim.layout, str(claim.devices), makes, claim.share, claim.model, *ours, *told])
    return QuotedTable(
        "Layouts by the size of the model",
        "Below 10B 1D TP 4 × DP 2 on 8 devices (85–90%), to 100B 2D 4 × 4 × PP 2–4 × DP 2 on 64 (80–85%), above 2.5D "
        "or 3D TP 64+ × PP 8+ × DP 2–4 on 256 (75–80%).",
        f"7B: {in_words(LLAMA_STEP)}; others: {in_words(GPT_STEP)}. The percentages name nothing that they are of; we "
        "read a share of the rate of as many lone devices with unlimited memory. Where sizes multiply to more devices "
        "than quoted, we take as many stages as the quoted devices allow.",
        ("size", "quoted layout", "quoted devices", "multiplies to", "quoted share", "our model", "ours, of that kind")
        + ("share", "MFU", "best of the search", "share"),
        rows,
        "The first two hold within our band, as rates that such layouts reach; neither is the best of its devices. The "
        "quoted sizes contradict the quoted devices: TP 64 × PP 8 × DP 2 takes 1,024, not 256, and PP 4 on a 4 × 4 "
        "grid with DP 2 takes 128, not 64. The third does not hold: 64 tensor ranks span eight machines, and what 2.5D "
        "and 3D move along `col` and `inner` hides behind nothing.",
    )


def tensor_sizes(searches: Searches) -> QuotedTable:
    """Which TP × FSDP is the fastest."""
    rows = []
    numbers = (1, 2, 4, 8, 16, 32)
    for name, devices, training in (("70B", 64, LLAMA_STEP), ("175B", 256, GPT_STEP)):
        made = {col: searches.on(name, above_one(shard=devices // col, col=col), training) for col in numbers}
        fitting = {col: judged.seconds for col, judged in made.items() if judged is not None}
        least = min(fitting.values(), default=1.0)
        cells = [f"{fitting[col] / least:.2f}" if col in fitting else MISSING for col in numbers]
        best = searches.best(name, devices, training)
        told = [MISSING, MISSING] if best is None else [best.name, f"{best.seconds / least:.2f}"]
        rows.append([name, str(devices), *cells, *told])
    return QuotedTable(
        "TP 8 as the best size",
        "TP 8, all devices of a machine, is the best tensor size.",
        f"70B: {in_words(LLAMA_STEP)}; 175B: {in_words(GPT_STEP)}; FSDP around. Cells: seconds of a step over those of "
        f"the fastest of the row; {MISSING}: does not surely fit.",
        ("model", "devices", *(f"TP {col}" for col in numbers), "best of the search", "seconds of it"),
        rows,
        "8 is the largest tensor size worth asking for on machines of 8, since a larger group leaves the machine; it "
        "is not the best one. One of 1 or 2 is, at this batch: what 1D sums lies between two products and hides behind "
        "nothing, what FSDP gathers hides.",
    )
