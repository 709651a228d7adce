"""Where data sets come from: files in a folder, or the Hugging Face hub."""

import json
import logging
import lzma
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedinit.errors import NotHereError, RequestError, named, one_line


def find(folder: str, *patterns: str) -> list[Path]:
    """Return the files of the first pattern that matches any, in order of their names.

    Raises:
        RequestError: `folder` does not exist, or holds none of them.
    """
    at = Path(folder)
    if not at.is_dir():
        raise RequestError(f"dataset_args.data_dir: {folder}: no such folder")
    for pattern in patterns:
        if found := sorted(at.rglob(pattern)):
            return found
    raise RequestError(f"dataset_args.data_dir: {folder} holds no {' and no '.join(patterns)}")


def read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of a parquet file.

    Raises:
        RequestError: the file is missing, truncated, or lacks a column.
    """
    try:
        return pq.read_table(path, columns=list(columns), memory_map=True)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{path}: {one_line(error)}") from None


def read_hub(
    repository: str, split: str, columns: Sequence[str], part: str | None = None
) -> pa.Table:
    """Read columns of a split of a data set on the hub; it is fetched once, with a progress bar.

    Args:
        repository: its name on the hub.
        split: train, test, ...
        columns: which.
        part: one of the configurations that the repository has, if it has several.

    Raises:
        NotHereError: it cannot be had; the text says which files to put where instead.
    """
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each attempt
    try:
        return load_dataset(repository, part, split=split).select_columns(list(columns)).data.table
    except Exception as error:  # the network, the hub, and what it holds
        raise NotHereError(
            f"dataset: cannot fetch {repository} from the Hugging Face hub ({named(error)}); put "
            f"its parquet files ({split}-*.parquet) into a folder and name it with "
            "dataset_args.data_dir"
        ) from None


def download_lzma(url: str, name: str) -> Path:
    """Return the unpacked file of an address; it is fetched and unpacked once, with a progress bar.

    Raises:
        NotHereError: it cannot be had; the text says which file to put where instead.
    """
    from datasets import DownloadManager

    try:
        packed = Path(DownloadManager().download(url))
        unpacked = packed.with_name(f"{packed.name}-{name}")
        if not unpacked.exists():
            partial = unpacked.with_suffix(".partial")
            with lzma.open(packed) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(unpacked)
    except Exception as error:  # the network, the disk, and a damaged file
        raise NotHereError(
            f"dataset: cannot fetch {url} ({named(error)}); put {name}, unpacked, into a folder "
            "and name it with dataset_args.data_dir"
        ) from None
    return unpacked


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestError: the file is missing, not UTF-8, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def hashed(owner: str) -> str:
    """Return an id that does not tell whose it is: authors' names never leave a loader."""
    return sha256(owner.encode()).hexdigest()[:16]
