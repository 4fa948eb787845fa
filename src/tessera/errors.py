"""The one error a user can mend: it names the key, the value, the reason and the nearest values that work."""


class UserError(ValueError):
    """A mistake in what the user gave (config, files, sizes). The command line prints it and exits with code 2.

    `key` and `value` are what was given, `reason` says why it does not fit, `hint` what would.
    """

    def __init__(self, key: str, value: object, reason: str, hint: str = "") -> None:
        self.key, self.value, self.reason, self.hint = key, value, reason, hint
        given = f"{key}: {value}" if value is not None else key
        super().__init__(f"{given}\n  {reason}" + (f"\n  {hint}" if hint else ""))
