"""The one error for a request that cannot be carried out as written."""

import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches

_OURS = ("fedinit", "clients", "strategies", "experiments")
_INSTALLED = ("<", *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))


class RequestError(Exception):
    """Bad input: its text is one clear line; the command line ends with it and exit status 2."""


class NotHereError(RequestError):
    """What a request needs is not on this machine and cannot be had now; the text says where to."""


class WriteError(Exception):
    """A file cannot be written; its text names the file and the reason."""


_SAYING = (RequestError, RuntimeError, ValueError, TypeError)  # what our own code raises


def one_line(error: object) -> str:
    """Return an error's text on one line, without what would move a terminal's cursor."""
    text = " ".join(str(error).split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def named(error: BaseException) -> str:
    """Return an error's type and text on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def located(error: BaseException) -> str:
    """Return an error's type and text and the line that raised it: the user's own, if there is one.

    There is none where our own code says what is wrong.
    """
    own = last = ""
    ours = False
    for frame, line in traceback.walk_tb(error.__traceback__):
        last = f"{frame.f_code.co_filename}:{line}"
        ours = str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS
        if not ours and not last.startswith(_INSTALLED):
            own = last
    place = own or ("" if ours and isinstance(error, _SAYING) else last)
    return one_line(f"{type(error).__name__}: {error} ({place})") if place else named(error)


def unknown(
    kind: str, name: object, choices: Iterable[str], listed: Iterable[str] = ()
) -> RequestError:
    """Build the error for a name that is not among `choices`, suggesting the nearest one.

    Args:
        kind: what is named.
        name: the name.
        choices: the valid names.
        listed: those of them to list; default: all.
    """
    valid = sorted(choices)
    shown = ", ".join(sorted(listed) or valid) or "none"
    return RequestError(f"unknown {kind} '{name}'{suggestion(name, valid) or ';'} valid: {shown}")


def suggestion(name: object, choices: Iterable[str]) -> str:
    """Return a question after the nearest of `choices`, to end a message with; empty if none is."""
    nearest = get_close_matches(str(name), choices, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
