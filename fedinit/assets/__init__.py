"""Embedded data and weights; README.md beside this file gives each one's source and licence."""

import hashlib
from functools import cache
from pathlib import Path

from fedinit.errors import RequestError

FOLDER = Path(__file__).parent


@cache
def asset(name: str) -> Path:
    """Return the path of an embedded file once its content is seen to be the one that was shipped.

    Raises:
        RequestError: the file is missing, or its SHA-256 is not the one in SHA256SUMS.
    """
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    expected = {file: digest for digest, file in (line.split() for line in lines)}
    path = FOLDER / name
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; reinstall fedinit") from None
    if found != expected[name]:
        raise RequestError(
            f"{path}: corrupt (its SHA-256 is not the shipped one); reinstall fedinit"
        )
    return path
