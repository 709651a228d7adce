"""TensorFlow Federated's SQLite of tf.Examples by client, read without TensorFlow."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fedinit.data.clients import Choice
from fedinit.data.sources import hashed
from fedinit.data.text import Texts
from fedinit.errors import RequestError, one_line

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def read_tff(path: Path, choice: Choice) -> tuple[Texts, Texts]:
    """Read the train and test texts of the chosen clients, without reading the others'.

    Raises:
        RequestError: the file is no such database, or an example of a client has no text.
    """
    try:
        address = f"file:{quote(str(path.resolve()))}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as database:
            return _split(database, path, "train", choice), _split(database, path, "test", choice)
    except sqlite3.Error as error:
        raise RequestError(f"{path}: {one_line(error)}") from None


def _split(database: sqlite3.Connection, path: Path, split: str, choice: Choice) -> Texts:
    counts = "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ? ORDER BY 1"
    found = database.execute(counts, (split,)).fetchall()
    if not found:
        raise RequestError(f"{path}: the table client_metadata has no clients of split '{split}'")
    if not all(isinstance(number, int) for _, number in found):
        raise RequestError(f"{path}: client_metadata has a num_examples that is no whole number")
    owners, texts = [], []
    for place in choice.clients(np.array([count for _, count in found])):
        client = found[place][0]
        examples = database.execute(
            "SELECT serialized_example_proto FROM examples WHERE split_name = ? AND client_id = ?",
            (split, client),
        )
        own = []
        for number, (example,) in enumerate(examples, start=1):
            try:
                own.append(example_text(example))
            except (ValueError, TypeError, IndexError) as error:
                raise RequestError(
                    f"{path}: split '{split}', client {place + 1} in order, example {number}: "
                    f"{one_line(error)}"
                ) from None
        if not own:
            raise RequestError(f"{path}: split '{split}', client {place + 1} has no examples")
        own = [text for text in own if text.strip()]
        texts += own
        owners += [hashed(client)] * len(own)
    if not texts:
        raise RequestError(f"{path}: split '{split}' has no text")
    return Texts(np.array(owners), texts)


def example_text(example: bytes) -> str:
    """Return the feature `tokens` of a serialized tf.Example: one string.

    Example {1: Features {1: {1: name, 2: Feature {1: BytesList {1: bytes}}}, ...}}.

    Raises:
        ValueError: it is something else.
        IndexError: it ends too early.
    """
    for features in _inner(memoryview(example), 1):
        for entry in _inner(features, 1):
            if bytes(next(_inner(entry, 1), b"")) == b"tokens":
                values = [
                    bytes(value)
                    for feature in _inner(entry, 2)
                    for strings in _inner(feature, 1)
                    for value in _inner(strings, 1)
                ]
                if values:
                    return b" ".join(values).decode()
    raise ValueError("not a tf.Example with the feature 'tokens'")


def _inner(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the fields of that number, of wire type `bytes`; the others are skipped."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire, size = key & 7, 0
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"not a protocol buffer: wire type {wire}")
        if at + size > len(message):
            raise IndexError("not a whole protocol buffer")
        if key >> 3 == number and wire == _BYTES:
            yield message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a position, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
        if message[at - 1] < 0x80:
            return value, at
