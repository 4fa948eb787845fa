"""Draws docs/figures/panels.svg: `python docs/figures/panels.py`.

Nine processes on a 3 × 3 grid run the legs of summa and cannon (src/tessera/product/panels.py) on blocks that carry the
number of their panel. Each square shows, step by step, the panel that arrived and is multiplied there.
"""

import multiprocessing
import tempfile
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

from tessera.core.mesh import Mesh  # noqa: E402
from tessera.product.panels import Broadcasts, Shifts  # noqa: E402

SIDE = 3
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f")


def arrivals(rank: int, store: str, results: multiprocessing.SimpleQueue) -> None:
    """Puts (schedule, row, col, [the panel of R and of W at each step]) of this rank."""
    torch.set_num_threads(1)
    world = SIDE * SIDE
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh = Mesh({"row": SIDE, "col": SIDE})
    row, col = mesh.coordinates["row"], mesh.coordinates["col"]
    along_col, along_row = mesh.group(("col",)), mesh.group(("row",))
    legs = {
        "summa": (Broadcasts(along_col), Broadcasts(along_row)),
        "cannon": (Shifts(along_col, row), Shifts(along_row, col)),
    }
    for name, (r, w) in legs.items():
        own_r, own_w = torch.tensor([float(col)]), torch.tensor([float(row)])
        steps = [(int(a), int(b)) for a, b in zip(r.incoming(own_r), w.incoming(own_w), strict=True)]
        results.put((name, row, col, steps))
    dist.destroy_process_group()


def measured() -> dict[str, dict[tuple[int, int], list[tuple[int, int]]]]:
    """schedule → (row, col) → the panels of R and W at each step."""
    context = multiprocessing.get_context("fork")
    results, panels = context.SimpleQueue(), {"summa": {}, "cannon": {}}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=arrivals, args=(r, f"{folder}/store", results)) for r in range(SIDE * SIDE)]
        for process in ranks:
            process.start()
        for _ in range(2 * len(ranks)):
            name, row, col, steps = results.get()
            panels[name][row, col] = steps
        for process in ranks:
            process.join()
    return panels


def main() -> None:
    panels = measured()
    notes = {
        "summa": "summa: each rank in turn\nbroadcasts its panel",
        "cannon": "cannon: skewed once, then\neach rank takes its neighbour's",
    }
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tessera", "font.size": 11}):
        figure, grids = pyplot.subplots(2, SIDE, figsize=(8, 5.6), layout="constrained")
        for line, (name, note) in zip(grids, notes.items(), strict=True):
            line[0].set_ylabel(note, fontsize=11)
            for step, axes in enumerate(line):
                for (row, col), steps in panels[name].items():
                    r, w = steps[step]
                    assert r == w, "the panels that meet must be the same"
                    axes.add_patch(pyplot.Rectangle((col, row), 1, 1, facecolor=COLOURS[r], edgecolor="white", lw=2))
                    axes.text(col + 0.5, row + 0.5, str(r), ha="center", va="center", color="white", fontsize=14)
                axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal", xticks=[], yticks=[], title=f"step {step}")
                for spine in axes.spines.values():
                    spine.set_visible(False)
        figure.supxlabel("the panel that each rank of a 3 × 3 grid multiplies (row ↓, col →)", fontsize=11)
        figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
