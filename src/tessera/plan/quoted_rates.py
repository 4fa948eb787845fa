"""How far a geometry goes, how fast a layout is and what it holds: tables that people quote, beside our predictions."""

from collections.abc import Callable
from typing import Any

from tessera.models.config import ModelConfig
from tessera.models.shapes import shape_of
from tessera.plan.choice import Training
from tessera.plan.flops import step_flops
from tessera.plan.on_mesh import TOO_LARGE, fastest_on, without_limit
from tessera.plan.quoted import (
    GPT_STEP,
    LLAMA_STEP,
    MISSING,
    QuotedTable,
    Searches,
    above_one,
    in_stages,
    in_words,
    percent,
    smallest_on,
)
from tessera.plan.recommend import Judged
from tessera.plan.scaling import GEOMETRIES, nearest_meshes

HALF = 0.5
"""A geometry is said to scale so far as each device does half of what one alone would."""


def limits(searches: Searches) -> QuotedTable:
    """How far each geometry goes with all devices as its tensor axes."""
    name, training = "175B", GPT_STEP
    model = shape_of(name)
    shares: dict[str, dict[int, float]] = {geometry: {} for geometry in GEOMETRIES}
    numbers = (8, 16, 32, 64, 128, 256, 512, 1024)
    for devices in numbers:
        for geometry in GEOMETRIES:
            made = _unlimited(searches, model, geometry, devices, training)
            if made is not None:
                shares[geometry][devices] = searches.share(name, made)
    rows = []
    for geometry, quoted in QUOTED_RANGES.items():
        of = shares[geometry]
        far = [n for n, share in of.items() if share >= HALF]
        fastest = [n for n in numbers if max(GEOMETRIES, key=lambda each: shares[each].get(n, 0.0)) == geometry]
        known = [percent(of[n]) if n in of else MISSING for n in numbers]
        told = [str(max(far, default=MISSING)), ", ".join(map(str, fastest)) or "none of them"]
        rows.append([geometry, *quoted, *known, *told])
    return QuotedTable(
        "Geometries by the number of devices",
        "1D for 8–16 devices, 2D for 16–64, 2.5D for 64–256, 3D for 256 and more; they scale to 16, 64, 256 and 1,024.",
        f"{name}; {in_words(training)}; unlimited memory; all devices are tensor axes, in the shape nearest to the "
        "geometry's. Cells: share of the rate of as many lone devices. Scales to: the most with at least "
        f"{percent(HALF)}. {MISSING}: the model's heads or widths do not divide.",
        ("geometry", "quoted for", "quoted to", *map(str, numbers), "scales to", "fastest of the four on"),
        rows,
        "1D ends where heads no longer divide, and slows down where its group leaves a machine: it holds to about what "
        "is quoted. 2D and 2.5D go farther than quoted and are never worse than 1D at this batch: weights that move "
        "along `row` hide behind products as long as a rank has tokens enough. 3D does not hold: `inner` moves the "
        "wide hidden stream, nothing hides it, and it is the axis that leaves the machine first, the mesh being "
        "numbered with `col` innermost. No geometry has a limit of its own; the links, the heads and the tokens of a "
        "device have.",
    )


QUOTED_RANGES = {"1D": ("8–16", "16"), "2D": ("16–64", "64"), "2.5D": ("64–256", "256"), "3D": ("256+", "1,024")}


def _unlimited(
    searches: Searches, model: ModelConfig, geometry: str, devices: int, training: Training
) -> Judged | None:
    """The fastest of the meshes nearest to a geometry's shape that the model divides over; None where none does."""
    cluster = without_limit(searches.cluster.of(devices))
    for _, meshes in nearest_meshes(geometry, devices):
        made = [fastest_on(model, mesh, cluster, training) for mesh in meshes]
        if any(made):
            return min(filter(None, made), key=lambda judged: judged.seconds)
    return None


LLAMA_70B = {1: (65, 1800), 2: (45, 1600), 4: (30, 1400)}
"""By TP: GB a device and tokens per second and device that are quoted for Llama 70B on 8 × A100-80."""


def llama_70b(searches: Searches) -> QuotedTable:
    """Llama 70B on eight devices of 80 GB."""
    name, rows = "llama-2-70b", []
    model, cluster = shape_of(name), searches.cluster.of(8)
    each_token = step_flops(model, [LLAMA_STEP.sequence_len]) / LLAMA_STEP.sequence_len
    peak = cluster.profile.peak_flops[LLAMA_STEP.dtype]
    halves = Training(LLAMA_STEP.sequence_len, 8, stored="bfloat16")
    for col, (gigabytes, rate) in LLAMA_70B.items():
        sizes = above_one(shard=8 // col, col=col)
        one_row_each = [
            Training(LLAMA_STEP.sequence_len, 8 // col, stored=stored) for stored in ("float32", "bfloat16")
        ]
        least = [f"{smallest_on(model, sizes, cluster, step).peak.total / 1e9:.0f}" for step in one_row_each]
        small = fastest_on(model, sizes, cluster, halves)
        fits = small is not None and small.verdict != TOO_LARGE
        told = f"{small.tokens_per_second / 8:.0f} ({small.verdict})" if fits and small else "does not fit"
        needs, shared = rate * each_token / 1e12, rate / 8
        mfu = percent(shared * each_token / peak)
        rows.append([str(col), str(gigabytes), *least, str(rate), f"{needs:.0f}", f"{shared:.0f}", mfu, told])
    return QuotedTable(
        "Llama 70B on 8 × A100-80 at TP 1, 2 and 4",
        "65, 45 and 30 GB; 1,800, 1,600 and 1,400 tokens a second and device.",
        f"Rows of {LLAMA_STEP.sequence_len} tokens, TP × FSDP over 8 devices. Ours: the least that a device holds (one "
        "row in a step, everything recomputed), with AdamW's states in float32 and in bfloat16; tokens/s a device with "
        f"bfloat16 states and {halves.global_batch} rows a step.",
        ("TP", "quoted GB", "GB, float32", "GB, bfloat16", "quoted tokens/s a device", "takes TFLOP/s a device")
        + ("read as those of 8 devices: tokens/s a device", "MFU", "ours, bfloat16"),
        rows,
        f"A device has {peak / 1e12:.0f} TFLOP/s: the quoted rates are those of a machine of eight, not of a device, "
        "and then plausible. The quoted memory does not hold: states and gradients are cut eight ways in every row, so "
        "TP saves activations and gathered weights alone; all in bfloat16 they take twice 30 GB.",
    )


def shares_of_time(searches: Searches) -> QuotedTable:
    """MFU and the share of communication at 13B and 175B."""
    tp8 = above_one(shard=32, col=8)
    cases: list[tuple[str, str, str, Callable[[], Judged | None]]] = [
        ("13B", "best layout, 16 devices", "55%", lambda: searches.best("13B", 16, LLAMA_STEP)),
        ("175B", "TP 8 × FSDP 32", "48–52%, 15–25%", lambda: searches.on("175B", tp8, GPT_STEP)),
        (
            "175B", "TP 8 × PP 8 × FSDP 4, by formula", "48–52%, 15–25%",
            lambda: in_stages(searches, "175B", above_one(col=8), 8, 256, GPT_STEP),
        ),
        ("175B", "best layout, 256 devices", "58%, < 10%", lambda: searches.best("175B", 256, GPT_STEP)),
    ]  # fmt: skip
    rows = []
    profile = searches.cluster.profile
    ceiling = profile.product_flops / profile.peak_flops[GPT_STEP.dtype]
    for name, layout, quoted, make in cases:
        made = make()
        if made is None:
            rows.append([name, layout, quoted, *[MISSING] * 4])
            continue
        moved: Any = sum(made.time.collectives.values())
        shares = (moved / made.seconds, made.time.communication / made.seconds)
        band = f"{percent(made.mfu / (1 + made.band))}–{percent(min(ceiling, made.mfu / (1 - made.band)))}"
        rows.append([name, f"{layout}: {made.name}", quoted, percent(made.mfu), band, *map(percent, shares)])
    return QuotedTable(
        "MFU and the share of communication",
        "13B: MFU 55%; 175B: 48–52% with 15–25% of the step in communication, or 58% with less than 10%.",
        f"13B: {in_words(LLAMA_STEP)}; 175B: {in_words(GPT_STEP)}. Communication: all collectives over the step, and "
        f"those that nothing hides. The band is the profile's, at most {percent(ceiling)}: the best rate that products "
        "were measured at.",
        ("model", "layout", "quoted MFU, communication", "MFU", "its band", "communication", "exposed"),
        rows,
        "13B and TP 8 at 175B hold within our band; with a pipeline, by formula, TP 8 is about what is quoted. 58% "
        "with less than 10% holds for exposed communication, where TP is small and FSDP or `row` cuts the weights: "
        "nearly as much is moved, and more of it is hidden. `tessera measure` takes the rates of your stack, and a "
        "narrower band.",
    )
