"""What must hold of output_dir before a run begins, so that hours later its files can be written."""

import os
from pathlib import Path

from tessera.checkpoint.folder import LATEST
from tessera.core.errors import UserError
from tessera.core.files import in_words
from tessera.models.beside import TOKENIZER_FILES
from tessera.models.tensor_files import INDEX, SINGLE
from tessera.train.notes import CARD, METRICS, PLOT, RESOLVED, SUMMARY

FILES = (
    METRICS,
    RESOLVED,
    SUMMARY,
    PLOT,
    CARD,
    LATEST,
    SINGLE,
    INDEX,
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)
"""What a run writes into output_dir itself; all else there are folders of its own names."""


def check_output(output: Path) -> None:
    """Raise UserError unless a run can write into `output`: a folder, or nothing yet, in a place that lets us."""
    elsewhere = "choose another output_dir"
    try:
        if output.is_symlink() and not output.exists():
            raise UserError("output_dir", output, "is a link that leads nowhere", elsewhere)
        there = next(above for above in (output, *output.absolute().parents) if above.exists())
        if not there.is_dir():
            reason = "is a file" if there == output else f"cannot be made: {there} is a file"
            raise UserError("output_dir", output, reason, elsewhere)
        if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
            read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            reason = "the file system is read-only" if read_only else f"permission denied in {there}"
            raise UserError("output_dir", output, reason, f"let this user write there, or {elsewhere}")
        for path in (output / name for name in FILES):
            if path.exists() and not path.is_file():
                what = "is a folder" if path.is_dir() else "is no regular file"
                raise UserError("output_dir", path, f"{what}, where a run writes a file", f"move it, or {elsewhere}")
            if path.exists() and not os.access(path, os.R_OK):
                raise UserError("output_dir", path, "permission denied", f"let this user read it, or {elsewhere}")
        for path in output.glob("checkpoint-*"):
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):  # it would count as none, and all begin anew
                raise UserError("output_dir", path, "permission denied", f"let this user read it, or {elsewhere}")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("output_dir", output, in_words(error), elsewhere) from error
