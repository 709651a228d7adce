"""WikiText-103 (Merity et al. 2016), or any text: what a language model may train on first."""

from collections.abc import Sequence

import numpy as np

from fedinit.data.clients import Choice
from fedinit.data.sources import find, read_hub, read_parquet
from fedinit.data.text import Texts
from fedinit.errors import RequestError, one_line

HUB, PART = "Salesforce/wikitext", "wikitext-103-raw-v1"


def wikitext(data_dir: str | None, choice: Choice) -> tuple[Texts, Texts | None]:
    """WikiText-103, or text files of your own, a text on each line: proxy data without users."""
    if data_dir is None:
        return _texts(_hub("train"), choice), _texts(_hub("test"), choice)
    files = find(data_dir, "*.parquet", "*.txt")
    if files[0].suffix == ".txt":
        lines: list[str] = []
        for path in files:
            try:
                lines += path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"{path}: {one_line(error)}") from None
        return _texts(lines, choice), None
    splits = {
        split: [
            text
            for path in files
            if path.name.startswith(split)
            for text in read_parquet(path, ["text"])["text"].to_pylist()
        ]
        for split in ("train", "test")
    }
    if not splits["train"]:
        raise RequestError(f"dataset_args.data_dir: {data_dir} holds no train*.parquet")
    test = _texts(splits["test"], choice) if splits["test"] else None
    return _texts(splits["train"], choice), test


def _hub(split: str) -> list[str | None]:
    return read_hub(HUB, split, ["text"], PART)["text"].to_pylist()


def _texts(lines: Sequence[str | None], choice: Choice) -> Texts:
    """Return the lines that are not blank, each as if it were an author's own."""
    texts = [line for line in lines if line and line.strip()]
    if not texts:
        raise RequestError("dataset_args.data_dir: there is no text in its files")
    width = len(str(len(texts)))
    return Texts(np.array([f"{place:0{width}d}" for place in range(len(texts))]), texts).of(choice)
