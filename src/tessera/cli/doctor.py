"""`tessera doctor [CONFIG]`: what of this machine, and of a run on it, is slow or wrong, and what to change."""

import json
from collections.abc import Sequence
from pathlib import Path

from tessera.config.load import load_config
from tessera.core import terminal
from tessera.core.errors import RunFailed
from tessera.doctor.examine import Asked, examine
from tessera.doctor.show import as_json, conclusion, lines
from tessera.launch.launch import filled_in
from tessera.launch.machines import Place
from tessera.launch.options import PORT, LaunchOptions


def doctor(config: Path | None, overrides: Sequence[str], options: LaunchOptions, in_json: bool, measure: bool) -> None:
    """Print the report. Raises UserError for what does not fit, RunFailed (exit code 1) where something is wrong."""
    together = options.machine is not None or options.main_address is not None
    place, here = options.place() if together else Place(), options.per_machine
    loaded = None
    if config is not None:
        loaded = filled_in(load_config(config, overrides)[0], *options.asked_for(None))
        here = options.processes_here(loaded.world_size) if options.machines else here
    asked = Asked(loaded, options.machines or 1, here, place, options.main_port or PORT, measure)
    report = examine(asked)
    if in_json:
        terminal.say(json.dumps(as_json(report), ensure_ascii=False, indent=1))
    else:
        out = terminal.console(soft_wrap=True, markup=False, emoji=False)
        for line, style in lines(report):
            indent = len(line) - len(line.lstrip())
            first = line[: line.find(" ", indent + 1)] if style != "bold" and " " in line[indent:] else line
            out.print(first, style=style or None, end="")
            out.print(line[len(first) :])
    if wrong := conclusion(report.findings):
        raise RunFailed(wrong)
