"""Reddit's comments by author: pushshift's months of them, or LEAF's sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedinit.data import leaf
from fedinit.data.clients import Choice
from fedinit.data.sources import find, hashed, read_hub, read_parquet
from fedinit.data.text import Texts
from fedinit.errors import RequestError

HUB = "fddemarco/pushshift-reddit-comments"
_NOBODY = ["[deleted]", "[removed]", "AutoModerator"]
_MARKS = {"<PAD>", "<BOS>", "<EOS>"}  # LEAF's


def reddit(data_dir: str | None, choice: Choice) -> tuple[Texts, Texts | None]:
    """Comments on Reddit by author (natural clients)."""
    if data_dir is None:
        return _comments(read_hub(HUB, "train", ["author", "body"]), choice), None
    files = find(data_dir, "*.parquet", "train/*.json")
    if files[0].suffix == ".json":
        return _leaf(files).of(choice), _leaf(find(data_dir, "test/*.json")).of(choice)
    tables = [read_parquet(path, ["author", "body"]) for path in files]
    return _comments(pa.concat_tables(tables), choice), None


def _comments(table: pa.Table, choice: Choice) -> Texts:
    """Return the chosen authors' comments; only they are taken out of Arrow's memory."""
    author, body = table["author"], table["body"]
    there = pc.and_(
        pc.invert(pc.is_in(author, pa.array([*_NOBODY, None]))),
        pc.invert(pc.is_in(body, pa.array([*_NOBODY[:2], None]))),
    )
    there = pc.and_(there, pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(body)), 0))
    table = table.filter(pc.fill_null(there, False))
    if not len(table):
        raise RequestError("dataset_args.data_dir: there are no comments with an author")
    authors = table["author"].combine_chunks().dictionary_encode()
    rows = choice.rows(authors.indices.to_numpy())
    names = np.array([hashed(name) for name in authors.dictionary.to_pylist()])
    owners = names[authors.indices.to_numpy()[rows]]
    return Texts(owners, table["body"].take(pa.array(rows)).to_pylist())


def _leaf(files: list[Path]) -> Texts:
    owners, texts = [], []
    for user, comments, _ in leaf.users(files):
        own = [text for text in map(_joined, comments) if text]
        texts += own
        owners += [user] * len(own)
    if not texts:
        raise RequestError(f"{files[0].parent}: there is no text")
    return Texts(np.array(owners), texts)


def _joined(comment: Any) -> str:
    """Return one text of LEAF's lists of tokens, or lists of such lists, without its marks."""
    if isinstance(comment, str):
        return "" if comment in _MARKS else comment
    return " ".join(filter(None, map(_joined, comment))) if isinstance(comment, list) else ""
