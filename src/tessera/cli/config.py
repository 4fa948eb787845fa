"""`tessera config`: what a file comes to, a file to begin with, every key, and a schema for editors."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.keys import ReadsConfig
from tessera.core import terminal

# What reads a config is imported where it is needed, so that `--help` stays quick.

app = typer.Typer(no_args_is_help=True, help="Show what a YAML file comes to, and explain its keys.")


@app.command(cls=ReadsConfig)
def show(
    config: Annotated[Path, typer.Argument(help="The YAML file of a run, or the name of a key.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the file (repeatable).")
    ] = None,
    explain: Annotated[bool, typer.Option("--all", help="Say above each key what it does.")] = False,
) -> None:
    """Print the resolved config: each key with its value and where the value comes from; or explain one key."""
    from tessera.config.explain import explained
    from tessera.config.load import resolve_config
    from tessera.config.show import shown

    told = None if config.exists() else explained(str(config))
    terminal.say(told or shown(resolve_config(config, overrides or []), explain=explain).removesuffix("\n"))


@app.command()
def starter() -> None:
    """Print a YAML file to begin with, in which every key is explained."""
    from tessera.config.describe import starter

    terminal.say(starter().removesuffix("\n"))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    import json

    from tessera.config.describe import json_schema

    terminal.say(json.dumps(json_schema(), indent=2))


@app.command()
def keys() -> None:
    """Print every key: what it does, why it does nothing, or that it is refused (docs/keys.md)."""
    from tessera.config.describe import keys_page

    terminal.say(keys_page().removesuffix("\n"))
