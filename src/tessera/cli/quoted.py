"""`tessera plan --tables`: tables that people quote, beside what our model says of them. `--output`: as a page."""

from collections.abc import Sequence
from pathlib import Path

from tessera.core import terminal
from tessera.core.files import check_target, writing_target
from tessera.plan.cluster import cluster_of
from tessera.plan.quoted import CLUSTER, QuotedTable, Searches
from tessera.plan.quoted_layouts import by_size, pipelined, sharded, tensor_sizes
from tessera.plan.quoted_rates import limits, llama_70b, shares_of_time
from tessera.plan.scaling_report import rows_as_markdown

TITLE = "# Tables people quote, and what our model says of them"
TABLES = (sharded, pipelined, by_size, limits, tensor_sizes, llama_70b, shares_of_time)


def tables(output: Path | None) -> None:
    """Make every table, and print the page or write it to the file `output`."""
    if output is not None:
        check_target(output, "--output")
    searches = Searches(cluster_of(CLUSTER))
    text = page([make(searches) for make in TABLES])
    if output is None:
        terminal.say(text)
        return
    with writing_target(output, "--output"):
        output.write_text(text)
    terminal.say(f"written: {output}")


def page(made: Sequence[QuotedTable]) -> str:
    """The tables as Markdown, with what they rest on."""
    cluster = cluster_of(CLUSTER)
    profile = cluster.profile
    known = "measured" if profile.measured else "published figures, not measured"
    parts = [
        TITLE,
        "Which layout for which model on how many devices: tables of it go around without a source, a batch or a "
        "baseline. Here each is made again from the planner's own model of memory and time ([planning](planning.md)), "
        "with what we assume. Nothing here was measured by us.",
        f"Devices: {cluster}; rates: {known} (profile {profile.name}), half of a prediction's band "
        f"{profile.error:.0%}. Two layouts of a table share the errors of the rates, so their order is surer than "
        "their times. Products in bfloat16; AdamW's states in float32, but where bfloat16 is said. Pipelines are by "
        "formula: no schedule of them is implemented. Nothing lies in host memory, MLPs are whole, and gradients are "
        "summed once a step: `tessera plan` tries these memory savers too, and with them more fits.",
        "Made by `tessera plan --tables --output docs/quoted-tables.md`.",
    ]
    for table in made:
        parts += [
            f"## {table.title}",
            f"Quoted: {table.quoted}",
            f"Assumed: {table.assumed}",
            rows_as_markdown(table.headings, table.rows),
            table.says,
        ]
    return "\n\n".join(parts) + "\n"
