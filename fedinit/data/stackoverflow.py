"""Stack Overflow by user, from TensorFlow Federated's database; or another of its layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedinit.data.clients import Choice
from fedinit.data.sources import download_lzma, find, hashed, read_json
from fedinit.data.stack_exchange import read_posts
from fedinit.data.text import Texts
from fedinit.data.tff import read_tff
from fedinit.errors import RequestError

URL = "https://storage.googleapis.com/tff-datasets-public/stackoverflow.sqlite.lzma"
Split = tuple[Texts, Texts | None]


def stackoverflow(data_dir: str | None, choice: Choice) -> Split:
    """Questions and answers of Stack Overflow by user (natural clients)."""
    if data_dir is None:
        return read_tff(download_lzma(URL, "stackoverflow.sqlite"), choice)
    files = find(data_dir, *_READERS)
    reader = next(read for pattern, read in _READERS.items() if files[0].match(pattern))
    return reader(files, choice)


def _tff(files: list[Path], choice: Choice) -> Split:
    return read_tff(files[0], choice)


def _json(files: list[Path], choice: Choice) -> Split:
    """Read the paper's JSON, {user: {tokens: [sentence, ...]}}; *train* and *test* are a split."""
    train = [path for path in files if "train" in path.name]
    test = [path for path in files if "test" in path.name and path not in train]
    if not (train and test):
        return _sentences(files).of(choice), None
    return _sentences(train).of(choice), _sentences(test).of(choice)


def _sentences(files: list[Path]) -> Texts:
    owners, texts = [], []
    for path in files:
        for place, (user, data) in enumerate(read_json(path).items()):
            sentences = data.get("tokens") if isinstance(data, dict) else None
            if not isinstance(sentences, list) or not all(
                isinstance(sentence, str) for sentence in sentences
            ):
                raise RequestError(f"{path}: user {place + 1} has no list of sentences 'tokens'")
            own = [sentence for sentence in sentences if sentence.strip()]
            if not own:
                raise RequestError(f"{path}: user {place + 1} has no sentences")
            texts += own
            owners += [hashed(user)] * len(own)
    return Texts(np.array(owners), texts)


def _posts(files: list[Path], choice: Choice) -> Split:
    return read_posts(files[0]).of(choice), None


_READERS: dict[str, Callable[[list[Path], Choice], Split]] = {
    "*.sqlite": _tff,
    "*.json": _json,
    "*Posts.xml": _posts,  # of a dump's many
}
