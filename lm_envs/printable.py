"""Text from models, servers and data, made safe to print."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, bidirectional controls, line separators and lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return the text with characters that control a terminal as escapes such as ``\x1b``; tabs and newlines stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str, width: int = 200) -> str:
    """Return one printable line of at most ``width`` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= width else text[: width - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type without one."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
