"""Labelled images in the hub's layout: a struct {bytes, path}, an integer label, maybe an owner."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, from_numpy

from fedinit.data.sources import read_hub, read_parquet
from fedinit.errors import RequestError, one_line

_WORTH_A_BAR = 10000  # images; fewer are decoded in about a second


def read_images(
    source: list[Path] | tuple[str, str], image: str, label: str
) -> tuple[Tensor, Tensor]:
    """Read labelled images.

    Args:
        source: parquet files, or a repository on the hub and its split.
        image: the column of images.
        label: the column of integer labels.

    Returns:
        Images as uint8 (n, channels, height, width), and labels as int64 (n,).

    Raises:
        RequestError: the source cannot be read, an image does not decode or has another shape than
            the first, or a row has no label.
    """
    images, targets, _ = read_owned_images(source, image, label, owner=None)
    return images, targets


def read_owned_images(
    source: list[Path] | tuple[str, str], image: str, label: str, owner: str | None
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Read labelled images and whose they are, as `read_images` does.

    Returns:
        Images, labels, and the owners as text (n,); without an `owner` column they are empty.
    """
    columns = [image, label, *([owner] if owner else [])]
    if isinstance(source, tuple):
        named = [(f"{source[0]} ({source[1]})", read_hub(*source, columns))]
    else:
        named = [(str(path), read_parquet(path, columns)) for path in source]
    images = [_decode(table[image], name) for name, table in named]
    targets = [_labels(table[label], name) for name, table in named]
    owners = [_owners(table, owner, name) for name, table in named]
    for (name, _), part in zip(named, images, strict=True):
        if part.shape[1:] != images[0].shape[1:]:
            raise RequestError(f"{name}: images of shape {part.shape[1:]}, the first file's differ")
    return (
        from_numpy(np.concatenate(images)),
        from_numpy(np.concatenate(targets)),
        np.concatenate(owners),
    )


def _decode(column: pa.ChunkedArray, name: str) -> np.ndarray:
    contents = column.combine_chunks().field("bytes")

    def pixels(row: int) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(contents[row].as_py()))
            decoded = np.asarray(image.convert("RGB") if image.mode == "P" else image)
            if decoded.dtype != np.uint8:
                raise ValueError(f"its pixels are {decoded.dtype}, expected uint8")
            return decoded
        except (OSError, TypeError, ValueError) as error:
            raise RequestError(f"{name}: row {row}: not an image: {one_line(error)}") from None

    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:  # PIL lets go of the interpreter while it decodes
        decoded = list(
            track(
                pool.map(pixels, range(len(column))),
                "decoding images",
                total=len(column),
                console=console,
                transient=True,
                disable=len(column) < _WORTH_A_BAR or not console.is_terminal,
            )
        )
    if not decoded:
        raise RequestError(f"{name}: no rows")
    for row, each in enumerate(decoded):
        if each.shape != decoded[0].shape:
            raise RequestError(
                f"{name}: row {row}: an image of shape {each.shape}, not {decoded[0].shape}"
            )
    stacked = np.stack(decoded)
    return stacked[:, None] if stacked.ndim == 3 else np.moveaxis(stacked, -1, 1).copy()


def _labels(column: pa.ChunkedArray, name: str) -> np.ndarray:
    if column.null_count or not pa.types.is_integer(column.type):
        raise RequestError(f"{name}: expected an integer label in every row, got {column.type}")
    return column.to_numpy().astype(np.int64)


def _owners(table: pa.Table, owner: str | None, name: str) -> np.ndarray:
    if owner is None:
        return np.zeros(0, dtype=str)
    if table[owner].null_count:
        raise RequestError(f"{name}: {owner} is empty in {table[owner].null_count} rows")
    return table[owner].to_numpy(zero_copy_only=False).astype(str)
