"""The rates of products and attention in src/tessera/plan/profiles, fitted to published runs.

    python benchmarks/fit_profiles.py                             rates, and errors of the runs that were not fitted
    python benchmarks/fit_profiles.py --write                     and writes them into the profiles
    python benchmarks/fit_profiles.py --also memory_efficiency    what fitting that rate too would change

Reads llm_foundry_throughput.csv, torchtitan.csv and hardware_constants.csv in the folder of the validation data (see
fit_curves.py). A100-80, A100-40 and H100 are fitted to 12 of their rows in llm-foundry's table, far apart in what
decides a step; the others are predicted, and so are torchtitan's rows, none of which is fitted. H200 takes H100's
rates. Devices without published runs take the mean of A100-80's and H100's shares of their best measured product.

Three rates are fitted. `memory_efficiency` is not: these runs cannot tell it from `product_half`, for smaller models
have more of both. Nor is `dispatch_seconds`, which no run waits for, nor `overlap` and the curves of collectives, of
which too little shows in 12 runs (docs/decisions/0021-rates-that-ship.md).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fit_curves import read
from benchmarks.published import GPUS, Published, llm_foundry, torchtitan
from tessera.plan.calibrate import Run, calibrated
from tessera.plan.machine import Profile, far_apart, shipped_profiles
from tessera.plan.time import step_time

RATES = ("product_flops", "product_half", "attention_flops")
SEEN = 12
"""Rows of a device that are fitted."""
HALF = 256.0
"""Where `product_half` starts."""
DAO: Mapping[str, float] = {"A100-80": 0.63 * 312e12, "A100-40": 0.63 * 312e12, "H100": 335e12}
"""Where `attention_flops` starts, FLOP/s: the best in Dao 2023, FlashAttention-2 (arXiv 2307.08691) section 4.1."""
HARDWARE: Mapping[str, str] = {
    "A100-40": "A100-SXM-40GB",
    "A100-80": "A100-SXM-80GB",
    "H100": "H100-SXM-80GB",
    "H200": "H200-SXM-141GB",
    "B200": "B200-SXM-180GB",
    "GB200": "GB200-NVL72 (per GPU)",
    "MI300X": "MI300X-192GB",
    "L40S": "L40S-48GB",
    "RTX4090": "RTX-4090-24GB",
}
"""The row of hardware_constants.csv for each profile."""
TORCHTITAN: Mapping[str, str] = {"A100-80": "A100", "H100": "H100"}
"""torchtitan's GPU by profile. Its H100 have 96 GB of slower memory, and 500 W."""
FITTED_BAND, OTHER_BAND = 0.30, 0.40
PROFILES = Path(__file__).parents[1] / "src" / "tessera" / "plan" / "profiles"
README = "llm-foundry scripts/train/benchmarking/README.md@8c8dd48f7"
FIT = "fitted by benchmarks/fit_profiles.py"
SHARES = "the mean of A100-80's and H100's"


@dataclass(frozen=True)
class Rows:
    """Published runs of a device, and which of them are fitted; the others are held out."""

    published: Sequence[Published]
    runs: Sequence[Run]
    seen: Sequence[int]

    @property
    def fitted(self) -> list[Run]:
        """The runs that are fitted."""
        return [self.runs[i] for i in self.seen]

    def farthest(self, missed: NDArray[Any]) -> Published:
        """Of the rows held out the one that is `missed` by most."""
        return self.published[self.held[int(np.argmax(missed))]]

    @property
    def held(self) -> list[int]:
        """The places of the others."""
        return [i for i in range(len(self.runs)) if i not in self.seen]


def rows_of(device: str) -> Rows:
    """llm-foundry's runs of a profile's device, `SEEN` of them to fit."""
    published = llm_foundry(device)
    runs = [each.run() for each in published]
    return Rows(published, runs, far_apart([run.place for run in runs], SEEN))


def errors(profile: Profile, runs: Sequence[Run]) -> NDArray[Any]:
    """Predicted over measured seconds of each run, less 1."""
    return np.array([float(step_time(run.work, profile).total) / run.seconds - 1 for run in runs])


def best_products() -> dict[str, float | None]:
    """FLOP/s of the best matrix product measured in bfloat16 by profile; None where none is."""
    column = {row["gpu"]: row["measured_max_matmul_bf16_tflops"] for row in read("hardware_constants.csv")}
    return {name: float(column[gpu]) * 1e12 if column[gpu] else None for name, gpu in HARDWARE.items()}


def before(profile: Profile) -> Profile:
    """One of the fitted devices' at the best product and the best attention that were measured: where a fit starts."""
    best = best_products()[profile.name]
    assert best is not None
    return replace(profile, product_flops=best, product_half=HALF, attention_flops=DAO[profile.name])


def fitted(profile: Profile, rows: Rows, also: Sequence[str] = ()) -> Profile:
    """A profile at the rates that explain the rows seen, no faster than what was measured alone.

    `also`: other rates to fit, by the names that `calibrated` takes.
    """
    start = before(profile)
    found = calibrated(start, rows.fitted, profile.name, only=(*RATES, *also))
    limited = replace(found, memory_efficiency=min(found.memory_efficiency, 1.0), residuals=None, measured=False)
    product = min(found.product_flops, start.product_flops)
    return _with_rates(limited, product, found.product_half, min(found.attention_flops, product))


def _with_rates(profile: Profile, product: float, half: float, attention: float) -> Profile:
    """With four digits of each of RATES."""
    product, half, attention = (float(f"{rate:.4g}") for rate in (product, half, attention))
    return replace(profile, product_flops=product, product_half=half, attention_flops=attention)


def scaled(profile: Profile, sources: Sequence[Profile]) -> Profile:
    """A profile at the mean shares that `sources` reach of their best product, or peak if it has none measured."""
    best = best_products()
    own = best[profile.name]

    def whole(each: Profile) -> float:
        measured = best[each.name]
        return each.peak_flops["bfloat16"] if own is None or measured is None else measured

    def share(rate: str) -> float:
        return float(np.mean([getattr(each, rate) / whole(each) for each in sources]))

    half = float(np.mean([each.product_half for each in sources]))
    mine = whole(profile)
    return _with_rates(profile, share("product_flops") * mine, half, share("attention_flops") * mine)


def fitted_profiles(rows: Mapping[str, Rows], also: Sequence[str] = ()) -> dict[str, Profile]:
    """Every shipped profile of a GPU with its rates, its band and where they come from."""
    shipped = shipped_profiles()
    made = {name: _fitted_and_told(shipped[name], rows[name], also) for name in GPUS}
    h100 = made["H100"]
    same = _with_rates(shipped["H200"], h100.product_flops, h100.product_half, h100.attention_flops)
    made["H200"] = _told(same, OTHER_BAND, f"as H100's, whose compute is the same: {h100.sources['product_flops']}")
    best = best_products()
    for name in [name for name in HARDWARE if name not in made]:
        whole = "best measured product" if best[name] else "peak, for no product of this device is measured"
        source = f"assumed, not measured: {SHARES} share of the {whole}; theirs are {FIT}"
        made[name] = _told(scaled(shipped[name], [made["A100-80"], h100]), OTHER_BAND, source)
        made[name].sources["product_half"] = f"assumed, not measured: {SHARES}, {FIT}"
    return made


def _fitted_and_told(profile: Profile, rows: Rows, also: Sequence[str]) -> Profile:
    found = fitted(profile, rows, also)
    missed = np.abs(errors(found, rows.runs))[rows.held]
    rates = (
        f"{FIT} to {SEEN} of {len(rows.runs)} published training runs ({README}); "
        f"the others are predicted within {missed.mean():.1%} on average"
    )
    band = f"wider than runs of the fitted stack need, whose farthest is {missed.max():.0%} off: yours is another"
    return _told(found, FITTED_BAND, rates, band)


def _told(profile: Profile, band: float, rates: str, why: str = "") -> Profile:
    """With a band, and with the sources of it and of RATES."""
    why = why or f"assumed, not measured: wider than {FITTED_BAND}, that of fitted devices; no run of this one was seen"
    return replace(profile, error=band, sources={**profile.sources, **dict.fromkeys(RATES, rates), "error": why})


def lines(found: Mapping[str, Profile], rows: Mapping[str, Rows]) -> list[str]:
    """The rates of each profile, then the errors of the rows held out before and after, then torchtitan's."""
    told = [f"{'':8}{'products TFLOP/s':>18}{'half':>6}{'attention TFLOP/s':>19}{'memory':>8}{'GB/s inside':>13}"]
    for name, of in found.items():
        rates = f"{of.product_flops / 1e12:18.1f}{of.product_half:6.0f}{of.attention_flops / 1e12:19.1f}"
        told.append(f"{name:8}{rates}{of.memory_efficiency:8.2f}{of.inside['any'].bytes_per_second / 1e9:13.1f}")
    told += ["", f"{'held out':8}{'rows':>6}{'before':>9}{'mean':>8}{'median':>8}{'largest':>9}"]
    for name, of_device in rows.items():
        earlier, after = (
            np.abs(errors(profile, of_device.runs))[of_device.held] for profile in (before(found[name]), found[name])
        )
        shares = f"{earlier.mean():9.1%}{after.mean():8.1%}{np.median(after):8.1%}{after.max():9.1%}"
        told += [f"{name:8}{len(after):6}{shares}", f"{'':14}farthest: {of_device.farthest(after).name}"]
    for name, gpu in TORCHTITAN.items():
        told += ["", f"torchtitan on {name}: before, after"]
        published = torchtitan(gpu)
        runs = [each.run() for each in published]
        pairs = zip(published, errors(before(found[name]), runs), errors(found[name], runs), strict=True)
        told += [f"{earlier:+8.1%}{after:+8.1%}  {each.name}" for each, earlier, after in pairs]
    return told


def write(profile: Profile) -> None:
    """The rates, the band and their sources into the profile's file, which stays as it is otherwise."""
    file = PROFILES / f"{profile.name}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {key: getattr(profile, key) for key in (*RATES, "error")} | {"sources": dict(profile.sources)}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fit the rates of the shipped profiles to published runs.")
    parser.add_argument("--also", nargs="+", default=(), metavar="RATE", help="fit these too; only to look")
    parser.add_argument("--write", action="store_true", help="write the rates into the profiles")
    asked = parser.parse_args()
    if asked.also and asked.write:
        parser.error("--also is only to look: what ships are the three rates that the runs can tell")
    rows = {name: rows_of(name) for name in GPUS}
    found = fitted_profiles(rows, asked.also)
    print("\n".join(lines(found, rows)))
    for profile in found.values() if asked.write else ():
        write(profile)


if __name__ == "__main__":
    main()
