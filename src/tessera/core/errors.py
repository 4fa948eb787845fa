"""The two errors the command line prints without a traceback: a mistake of the user, and a run that ended badly."""


class UserError(ValueError):
    """A mistake in what the user gave (config, files, sizes). The command line prints it and exits with code 2.

    `key` and `value` are what was given, `reason` says why it does not fit, `hint` what would.
    """

    def __init__(self, key: str, value: object, reason: str, hint: str = "") -> None:
        self.key, self.value, self.reason, self.hint = key, value, reason, hint
        given = f"{key}: {value}" if value is not None else key
        super().__init__(f"{given}\n  {reason}" + (f"\n  {hint}" if hint else ""))


class RunFailed(RuntimeError):
    """A run that started and did not end well; its message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)
