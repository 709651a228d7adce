"""Posts.xml of a Stack Exchange dump: what people wrote, in HTML, by its owners."""

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fedinit.data.sources import hashed
from fedinit.data.text import Texts
from fedinit.errors import RequestError, one_line

_CODE = ("code", "pre")
_MARKS = ("b", "code", "del", "em", "i", "kbd", "s", "strike", "strong", "sub", "sup", "u")
_IN_A_WORD = ("a", "span", *_MARKS)  # other tags part words


def read_posts(path: Path) -> Texts:
    """Read the posts that have an owner and words of their own; code is left out.

    Raises:
        RequestError: the file is not XML in UTF-8, or has no such post.
    """
    owners, texts = [], []
    try:
        with path.open("rb") as file:
            events = ElementTree.iterparse(file, ("start", "end"))  # noqa: S314 - see below
            _, root = next(events)
            for event, element in events:
                if event == "end" and element.tag == "row":
                    owner = element.get("OwnerUserId")
                    text = html_text(element.get("Body", ""))
                    if owner and text:
                        owners.append(hashed(owner))
                        texts.append(text)
                    root.clear()  # or the whole dump stays in memory
    except (ElementTree.ParseError, OSError) as error:  # expat bounds what entities expand to
        raise RequestError(f"{path}: {one_line(error)}") from None
    if not texts:
        raise RequestError(f"{path}: no row has OwnerUserId and Body")
    return Texts(np.array(owners), texts)


def html_text(html: str) -> str:
    """Return the text of HTML without its code, each run of white space one space."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    return " ".join("".join(parser.parts).split())


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._code = 0  # how deep within code

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag in _CODE
        self.parts.append("" if tag in _IN_A_WORD else " ")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in _CODE and self._code > 0
        self.parts.append("" if tag in _IN_A_WORD else " ")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.parts.append(data)
