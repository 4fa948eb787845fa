"""The commands that ask the planner. Each imports what it needs when it is called, so that `--help` stays quick."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.arguments import Overrides
from tessera.sizes import bounds


def count(
    subject: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or a model: a folder, a name or a size such as 70B; unset: Llama 3 70B with 16 layers.",
            metavar="[CONFIG|MODEL]",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Numbers of devices to compare, with commas between; unset: as many as the file has, or 8,16,64,512."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model, as the argument has it.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=bounds.LAYERS, help="Layers; unset: those of the model.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=bounds.ROWS, help="Sequences of the micro-batch; unset: as in the file, or 512."),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=1, max=bounds.TOKENS, help="Tokens of a sequence; unset: as in the file, or 64."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep gathered copies for the backward.")] = False,
    memory: Annotated[float, typer.Option(help="GiB of a device, which the best mesh may hold.")] = 80.0,
    context: Annotated[
        bool, typer.Option("--context", help="Also layouts whose devices share rows: Ulysses, exchange, ring.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for scale.md, scale.svg and scale.png.")] = None,
) -> None:
    """Estimate communication and memory per device for up to hundreds of devices; needs no devices."""
    from tessera.cli.count import Asked, count

    count(Asked(subject, model, ranks, layers, batch, sequence, keep, memory, context), output)


def plan(
    context: typer.Context,
    subject: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|CONFIG", help="A model by name, size or folder; or the YAML file of a run."),
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="TEXT|FILE", help="The devices: 8xH100, 4x8xA100-80, a file, or this machine.")
    ] = "this",
    sequence_len: Annotated[int | None, typer.Option(min=1, max=bounds.TOKENS, help="Tokens of a row.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, max=bounds.ROWS, help="Rows of a step.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What products run in: bfloat16 or float32; unset: as in --config, or bfloat16.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="As in a config; unset: as in --config, or adamw_torch_fused.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file whose other keys the plan's config keeps.")] = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="How many layouts to show.")] = 5,
    trace: Annotated[
        int, typer.Option(min=0, max=50, help="Verify the memory of so many of them by tracing the model's own code.")
    ] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what is alive around the best one's peak into this PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    target: Annotated[
        float | None,
        typer.Option("--target-tokens-per-second", help="Find the smallest cluster of such devices that reaches it."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Say how long so many tokens take, e.g. 1T.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a device hour, in any currency.")] = None,
    profile: Annotated[str | None, typer.Option(help="A profile of the device, by name or as a file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the winner's config here.")] = None,
    matmul: Annotated[
        str | None, typer.Option(metavar="M,N,K", help="Instead: the meshes of --devices for one product.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=bounds.RANKS, help="Devices of --matmul.")] = 8,
    scaling: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="Instead: strong and weak scaling over so many devices of --cluster Nx8x…; --output names a folder.",
        ),
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Instead: tables people quote, beside ours; --output names a page.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Find the layout for a model on a cluster, or judge that of a config: does it fit, how fast, why."""
    from tessera.cli.plan import Asked, plan_command
    from tessera.cli.plan_options import check_together

    check_together({name: value for name, value in context.params.items() if _is_given(context, name)})
    asked = Asked(
        cluster, sequence_len, global_batch, dtype, optimizer, config, top, trace, plot, matmul, devices, as_json,
        target, tokens, price, profile, overrides or [], output, scaling, tables,
    )  # fmt: skip
    plan_command(subject, asked)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was written, even with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def measure(
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the profile here too.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, max=bounds.RANKS_HERE, help="Processes; unset: one for each GPU, or for each core up to 8."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds: fewer sizes, fewer rounds, no whole steps.")
    ] = False,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead: bring this machine's profile to the steps of runs: the output_dir of each.",
        ),
    ] = None,
) -> None:
    """Measure this machine for the planner: products, attention, collectives, links, steps. Writes a profile."""
    from tessera.cli.measure import run

    run(output, ranks, quick, fit or [])
