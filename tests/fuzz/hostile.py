"""Values that somebody writes by mistake or to do harm, for every place that takes one."""

import json
import random
from typing import Any

SIZES = [
    0, -1, 1, 2, 3, 7, 97, 4096, 10**6, 999_999_937, 10**9, 2**31 - 1, 2**31, 2**32, 10**10, 10**11, 2**53 + 1,
    10**18, 2**63 - 1, 2**63, 2**64, 10**30, 10**100, 10**400,
]  # fmt: skip
FLOATS = ["0.0", "-0.5", "1.5", ".nan", ".inf", "-.inf", "1e400", "1e-400", "1e308", "5e-324", "1_0.5", "1e5"]
TEXTS = [
    "", " ", "~", "~nosuchuser", "~nosuchuser/x", "\0", "a\0b", "a" * 300, "a" * 5000, "é" * 200, "no such thing",
    "x/" * 2000, "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/dev/null/x", "/proc/nothing/x",
    "%s%n{0}${rank}$HOME", "\u202e", "\ufeff", "\x1b[31mred", "[red]x[/red]", "[/nothing]", "line\nline", "\r\n",
    "NaN", "null", "on", "-", "--help", "owner/model", "file://x", "a:b", "数学", "\U0001f600",
]  # fmt: skip
YAML_SCALARS = [
    "2020-13-45", "2001-02-30", "0001-01-01T99:99:99Z", "!!int abc", "!!int ''", "!!float abc", "!!float ''", "0x_",
    "0b_", "0o9", "_", "-_", "+", "1:99:99", "9" * 5000, "-" + "9" * 5000, "!!timestamp abc", "!!timestamp ''",
    "!!binary '###'", "!!bool maybe", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!python/object/apply:os.system ['true']", "!foo bar", "!<x> y", "*nothing", "&a [*a]", "&a {b: *a}", "<<",
    "{<<: 1}", "{<<: *x}", "=", "? x", "'\\uD800'", '"\\uD800"', '"\\x00"', '"\\U0010FFFF"', '"\\UFFFFFFFF"',
    '"\\q"', "@x", "`x`", "%x", "[", "{", "]", "- - - x", "|\n x", ">\n x", "!!int 0x", "!!int 1e5",
    "0x" + "f" * 4000, "1e" + "9" * 400, ".", "..", "1__0", "190:20:30.15", "{[a]: 1}", "{{a: 1}: 2}", "[[1]]",
    "{1: 2, 1: 3}", "{a: 1, a: 2}", "~", "!!str [a]", "!!map [a]", "!!seq {a: 1}", "!!merge x",
    "2001-12-14t21:59:43.10-05:99", "9999-12-31T23:59:59-23:59",
]  # fmt: skip


def value(dice: random.Random) -> Any:
    """A value as a program holds it."""
    plain: list[Any] = [None, True, False, [], {}, [[]], [None], {"": 1}, {"a": {"b": 1}}, [1, "a"], 0.5, -1.5, 1e300]
    return dice.choice([dice.choice(SIZES), dice.choice(TEXTS), dice.choice(plain)])


def scalar(dice: random.Random) -> str:
    """A value as a YAML file writes it."""
    kind = dice.randrange(5)
    if kind == 0:
        return str(dice.choice(SIZES))
    if kind == 1:
        return dice.choice(FLOATS)
    if kind == 2:
        return json.dumps(dice.choice(TEXTS))
    return dice.choice(YAML_SCALARS)


def deep(dice: random.Random, opening: str, closing: str, inner: str = "") -> str:
    """Brackets in brackets, so many that a reader who recurses may not come back."""
    depth = dice.choice([90, 150, 990, 2000, 20_000, 200_000])
    return opening * depth + inner + (closing * depth if dice.random() < 0.7 else "")


def alias_bomb(dice: random.Random) -> str:
    """YAML that is small and means a great deal."""
    width, depth = dice.choice([(9, 9), (10, 30), (2, 40)])
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


def garbled(content: bytes, dice: random.Random) -> bytes:
    """The same with a few bytes altered, cut, put in or said twice."""
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at : at + dice.choice([1, 4, 100, len(data)])]
            case 2:
                odd = [
                    b"\0",
                    b"\xff\xfe",
                    b"\xed\xa0\x80",
                    b'"',
                    b"{",
                    b"[",
                    b"]",
                    b"\n",
                    b":",
                    b"\t",
                    b"%",
                    b"\xef\xbb\xbf",
                ]
                data[at:at] = dice.choice(odd) * dice.choice([1, 1, 50])
            case 3:
                data[at:at] = data[at : at + 64]
            case 4 if at < len(data):
                data[at] = dice.randrange(256)
            case _:
                del data[at:]
    return bytes(data)


def json_text(dice: random.Random) -> bytes:
    """The whole content of a JSON file that is none, or not what was expected."""
    choices = [
        b"", b" ", b"null", b"[]", b"{}", b"1", b'"x"', b"{", b"[1", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"NaN",
        b"{\"a\": NaN}", b"\0", b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b"9" * 5000, b"-" + b"9" * 5000, b"1e999",
        b"[" * 10 + b"]" * 10, b"{'a': 1}", deep(dice, "[", "]").encode(), deep(dice, '{"a":', "}", "1").encode(),
        b'{"a": 1' + b"0" * 4400 + b"}",
    ]  # fmt: skip
    return dice.choice(choices)
