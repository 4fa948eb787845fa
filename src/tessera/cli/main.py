"""The command line. Each command imports what it needs when it is called, so that `--help` stays quick."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tessera import __version__
from tessera.cli import config as config_commands
from tessera.cli import planner
from tessera.cli.arguments import Config, MainAddress, MainPort, Overrides, Subject
from tessera.cli.keys import ReadsConfig
from tessera.core import exhausted, terminal
from tessera.core.errors import RunFailed, UserError
from tessera.core.writing import why
from tessera.sizes import bounds

app = typer.Typer(
    name="tessera",
    help="Train Transformer language models with tensor parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.say(f"tessera {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.add_typer(config_commands.app, name="config")
app.command("config-schema", hidden=True)(config_commands.schema)  # as these two were called before
app.command("config-keys", hidden=True)(config_commands.keys)


@app.command(cls=ReadsConfig)
def train(
    config: Config,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1, max=bounds.RANKS, help="Processes of all machines; without it the product of the sizes in the file."
        ),
    ] = None,
    overrides: Overrides = None,
    per_machine: Annotated[
        int | None,
        typer.Option("--nproc-per-node", min=1, max=bounds.RANKS_HERE, help="Processes to start on this machine."),
    ] = None,
    machines: Annotated[
        int | None, typer.Option("--num-machines", "--nnodes", min=1, max=bounds.RANKS, help="Machines.")
    ] = None,
    machine: Annotated[
        int | None,
        typer.Option("--machine-rank", "--node-rank", max=bounds.RANKS, help="Which of them this is, from 0."),
    ] = None,
    main_address: MainAddress = None,
    main_port: MainPort = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            max=bounds.RESTARTS,
            help="Restart all ranks from the last checkpoint, at most N times.",
        ),
    ] = 0,
    launcher: Annotated[str, typer.Option(help="Who starts the ranks: tessera, torchrun or accelerate.")] = "tessera",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take output_dir from the run that holds it, which then stops.")
    ] = False,
) -> None:
    """Train the model of a YAML file; starts its own ranks, or runs as one under torchrun."""
    from tessera.launch.launch import launch
    from tessera.launch.options import LaunchOptions, known_launcher

    by = known_launcher(launcher)
    options = LaunchOptions(per_machine, machines, machine, main_address, main_port, max_restarts, by, take_over)
    launch(config, overrides or [], num_processes, options)


@app.command(cls=ReadsConfig)
def launch(
    config: Config,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a batch script for Slurm.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write it; unset: to the terminal.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=bounds.RANKS, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, max=bounds.RANKS_HERE, help="GPUs of each; unset: none are asked for.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="The time limit, as Slurm writes it: 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="The partition.")] = None,
    account: Annotated[str | None, typer.Option(help="The account.")] = None,
    job_name: Annotated[str, typer.Option(help="The job's name.")] = "tessera",
    main_process_port: Annotated[int, typer.Option(min=1, max=65535, help="Where machine 0 listens.")] = 29500,
    max_restarts: Annotated[
        int, typer.Option(min=0, max=bounds.RESTARTS, help="Restarts after a failure, within the job.")
    ] = 0,
    overrides: Overrides = None,
) -> None:
    """Write a batch script that trains on several machines, saves before its time limit and goes on by itself."""
    from tessera.cli.launch import Job, launch

    job = Job(nodes, gpus_per_node, time, partition, account, job_name, main_process_port, max_restarts)
    launch(config, job, overrides or [], slurm, output)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("outputs/demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, max=bounds.STEPS, help="Optimizer steps; without it the usual number.")
    ] = None,
) -> None:
    """Train a small Llama at tensor size 2 on Python's standard library and check it against one process."""
    from tessera.demos.demo import demo

    demo(output, steps)


@app.command()
def demo_memory(
    ranks: Annotated[str, typer.Option(help="Rank counts to compare, with commas between.")] = "1,2,4",
    causal: Annotated[bool, typer.Option("--causal", help="Predict the next token instead of the same one.")] = False,
) -> None:
    """Measure the memory that tensor parallelism saves, and that the loss does not depend on it."""
    from tessera.demos.memory import demo_memory

    demo_memory(ranks, causal)


@app.command(cls=ReadsConfig)
def preprocess(
    config: Config,
    debug: Annotated[bool, typer.Option("--debug", help="Show rows: each token, and whether it is learnt.")] = False,
    examples: Annotated[
        int, typer.Option("--debug-num-examples", min=1, max=1000, help="Rows that --debug shows.")
    ] = 5,
    overrides: Overrides = None,
) -> None:
    """Read, tokenize and store the data of a run without training; a run then starts with what is there."""
    from tessera.cli.preprocess import preprocess

    preprocess(config, overrides or [], examples if debug else 0)


@app.command(cls=ReadsConfig)
def inspect(
    config: Subject,
    overrides: Overrides = None,
    weight: Annotated[str | None, typer.Option(help="The parameter to picture; without it the first up.")] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="Picture residual, q, k, v, attention, gate, up or hidden; without it the streams."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw who holds which block into this .svg or .png.")] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,TOKENS,…",
            help="Where ranks share sequences: the documents of a row, such as 3000,1000,4096; without it one.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what each rank of a layout holds and receives: parameters, bytes, blocks, collectives. Starts no ranks."""
    from tessera.cli.inspect import inspect

    inspect(config, overrides or [], weight, activation, picture, as_json, documents)


app.command()(planner.count)


@app.command(cls=ReadsConfig)
def verify(
    config: Config,
    full: Annotated[bool, typer.Option("--full", help="At the model's own sizes instead of in miniature.")] = False,
    all_layouts: Annotated[
        int | None,
        typer.Option(min=1, max=bounds.RANKS_HERE, metavar="RANKS", help="Verify every layout of this many ranks."),
    ] = None,
    inject: Annotated[
        str | None,
        typer.Option(metavar="K|all", help="Leave out the K-th collective of a step, or each in turn: is it caught?"),
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON.")] = None,
    overrides: Overrides = None,
) -> None:
    """Prove that a layout computes what one process computes: loss, every gradient, weights, and traffic by formula."""
    from tessera.cli.verify import Asked, verify

    verify(config, Asked(overrides or [], full, all_layouts, inject, report))


@app.command(cls=ReadsConfig)
def doctor(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of a run, to look at it too.")] = None,
    overrides: Overrides = None,
    per_machine: Annotated[
        int | None, typer.Option("--nproc-per-node", min=1, max=bounds.RANKS_HERE, help="Processes on each machine.")
    ] = None,
    machines: Annotated[
        int | None, typer.Option("--num-machines", "--nnodes", min=1, max=bounds.RANKS, help="Machines of the run.")
    ] = None,
    machine: Annotated[
        int | None,
        typer.Option(
            "--machine-rank",
            "--node-rank",
            max=bounds.RANKS,
            help="Which of them this is: started on each, they measure the network between them.",
        ),
    ] = None,
    main_address: MainAddress = None,
    main_port: MainPort = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure links, by processes that exchange messages.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at this machine, and at a run on it: what is slow or wrong, and what to change. Needs no GPU."""
    from tessera.cli.doctor import doctor
    from tessera.launch.options import LaunchOptions

    options = LaunchOptions(per_machine, machines, machine, main_address, main_port)
    doctor(config, overrides or [], options, as_json, measure)


app.command(cls=ReadsConfig)(planner.plan)


app.command()(planner.measure)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The output_dir of a run.", metavar="OUTPUT_DIR")],
    other: Annotated[
        Path | None, typer.Argument(help="That of another run, to compare with.", metavar="[OUTPUT_DIR]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; without it report.html (of two: compared.html) in OUTPUT_DIR."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again while the run goes on; the page reloads itself.")
    ] = False,
) -> None:
    """Write one HTML page on a run, or two side by side: loss, time, memory, communication, ranks, config."""
    from tessera.cli.report import report

    report([folder, *([other] if other else [])], output, watch)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint-N folder, or a Hugging Face one.", metavar="FROM")],
    target: Annotated[Path, typer.Argument(help="The folder to write, new or empty.", metavar="TO")],
    config: Annotated[
        Path | None, typer.Option(help="A folder with config.json and tokenizer; without it where the run had them.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it as in the checkpoint.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="The largest file of weights, such as 500MB; without it 5GB.")
    ] = None,
) -> None:
    """Turn a checkpoint into a Hugging Face folder, or such a folder into a checkpoint; starts no ranks."""
    from tessera.cli.convert import convert

    convert(source, target, config, dtype, max_shard_size)


def main() -> None:
    """Run a command. A mistake of the user ends with its message and code 2, a failed run with code 1.

    Code 1 too where a command's result was to be printed, and could not be written. (docs/exit-codes.md)
    """
    with terminal.outlived() as out:
        try:
            app()
        except UserError as error:
            _complain(str(error))
            raise SystemExit(2) from None
        except RunFailed as error:
            _complain(str(error))
            raise SystemExit(error.exit_code) from None
        except Exception as error:
            if (told := _of_the_system(error)) is None:
                raise
            _complain(told)
            raise SystemExit(1) from None
        except SystemExit as ended:
            out.flush()
            if out.lost and not ended.code and sys.argv[1:2] != ["train"]:  # a run leaves more than what it says
                raise SystemExit(1) from None
            raise


def _of_the_system(error: Exception) -> str | None:
    """What to tell of a file that failed, or of memory that ran out, where nothing below has; None for a defect."""
    if exhausted.ran_out(error):
        return exhausted.memory_in_words(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return why(error, Path(os.fsdecode(error.filename)))
    return None


def _complain(message: str) -> None:
    first, _, rest = message.partition("\n")
    console = terminal.console(error=True, soft_wrap=True, markup=False, emoji=False)
    console.print(first, style="bold red")
    if rest:
        console.print(rest)
