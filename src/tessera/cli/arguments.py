"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="The YAML file of the run.", metavar="CONFIG")]
Subject = Annotated[
    str, typer.Argument(help="A YAML file, or a model: a folder, a name or a size such as 70B.", metavar="CONFIG|MODEL")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the file; inner ones with dots."),
]
MainAddress = Annotated[
    str | None, typer.Option("--main-process-ip", "--master-addr", help="Address or host name of machine 0.")
]
MainPort = Annotated[
    int | None,
    typer.Option("--main-process-port", "--master-port", min=1, max=65535, help="Its port; unset: 29500."),
]
