"""The one error for a request that cannot be carried out as written."""

from collections.abc import Iterable
from difflib import get_close_matches


class RequestError(Exception):
    """Bad input: its text is one clear line; the command line ends with it and exit status 2."""


class WriteError(Exception):
    """A file cannot be written; its text names the file and the reason."""


def one_line(error: object) -> str:
    """Return an error's text on one line, without what would move a terminal's cursor."""
    text = " ".join(str(error).split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def named(error: BaseException) -> str:
    """Return an error's type and text on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def unknown(kind: str, name: object, choices: Iterable[str]) -> RequestError:
    """Build the error for a name that is not among `choices`, suggesting the nearest one."""
    valid = sorted(choices)
    nearest = get_close_matches(str(name), valid, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ";"
    return RequestError(f"unknown {kind} '{name}'{hint} valid: {', '.join(valid) or 'none'}")
