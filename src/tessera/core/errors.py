"""The two errors the command line prints without a traceback: a mistake of the user, and a run that ended badly."""

import re

_LONGEST = 1000
"""Characters of a key or a value that a message shows: what a user gave may be megabytes."""

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def as_yaml(value: object) -> str:
    """A plain value as a YAML file has it: `true`, where Python says True."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def cut_short(given: object, longest: int = _LONGEST) -> str:
    """`given` as text, without its middle where it is long; characters that steer a terminal are written out."""
    if isinstance(given, int) and given.bit_length() > 4 * longest:
        return f"a number of {given.bit_length()} bits"  # Python refuses to write it in digits
    text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], as_yaml(given))
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 4 :]}"


class UserError(ValueError):
    """A mistake in what the user gave (config, files, sizes). The command line prints it and exits with code 2.

    `key` and `value` are what was given, `reason` says why it does not fit, `hint` what would.
    """

    def __init__(self, key: str, value: object, reason: str, hint: str = "") -> None:
        self.key, self.value, self.reason, self.hint = key, value, reason, hint
        given = f"{cut_short(key)}: {cut_short(value)}" if value is not None else cut_short(key)
        super().__init__(f"{given}\n  {reason}" + (f"\n  {hint}" if hint else ""))

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """What makes the same error in another process: `UserError(*parts)`."""
        return self.key, as_yaml(self.value), self.reason, self.hint


class RunFailed(RuntimeError):
    """A run that started and did not end well; its message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)
