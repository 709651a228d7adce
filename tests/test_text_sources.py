"""Readers of texts by their authors, on files in the exact layouts of the sources."""

import json
import lzma
import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedinit.data import DATASETS
from fedinit.data.clients import Choice
from fedinit.data.reddit import reddit
from fedinit.data.sources import download_lzma, hashed
from fedinit.data.stack_exchange import html_text
from fedinit.data.stackoverflow import stackoverflow
from fedinit.data.text import Texts
from fedinit.data.tff import example_text
from fedinit.errors import RequestError

REAL = Path(__file__).parents[2] / "shared" / "data"
AUTHOR = "Ada Lovelace"  # no message may name her


def by_owner(texts: Texts | None) -> dict[str, list[str]]:
    assert texts is not None
    found: dict[str, list[str]] = {}
    for owner, text in zip(texts.owners, texts.texts, strict=True):
        found.setdefault(owner, []).append(text)
    return found


def expected(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {hashed(owner): own for owner, own in texts.items()}


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes shorter than 128: its key, its size, itself."""
    return bytes([number << 3 | 2, len(content)]) + content


def example(text: str) -> bytes:
    """A tf.Example with `score` (int64), `tokens` (bytes), and fields that nobody knows."""
    score = field(1, field(1, b"score") + field(2, field(3, b"\x08\x96\x01")))
    tokens = field(1, field(1, b"tokens") + field(2, field(1, field(1, text.encode()))))
    unknown = bytes([9 << 3, 0x96, 0x01]) + bytes([10 << 3 | 1]) + bytes(8)  # varint, 64 bits
    return unknown + bytes([11 << 3 | 5]) + bytes(4) + field(1, score + tokens)


TRAIN = {AUTHOR: ["how do i <url> ?", "thanks ."], "b": ["use a list"], "c": ["no", "yes", "so"]}
TEST = {"d": ["unseen words"]}


def write_tff(folder: Path, metadata: bool = True) -> Path:
    path = folder / "stackoverflow.sqlite"
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)"
    )
    if metadata:
        database.execute(
            "CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)"
        )
    for split, clients in (("train", TRAIN), ("test", TEST), ("heldout", {"e": ["never read"]})):
        for client, texts in clients.items():
            rows = [(split, client, example(text)) for text in texts]
            database.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
            if metadata:
                database.execute(
                    "INSERT INTO client_metadata VALUES (?, ?, ?)", (client, split, len(texts))
                )
    database.commit()
    database.close()
    return path


def test_a_tf_example_by_hand():
    assert example_text(example("déjà vu")) == "déjà vu"


def test_tff_keeps_its_own_split_and_reads_only_the_chosen(tmp_path):
    write_tff(tmp_path)
    train, test = stackoverflow(str(tmp_path), Choice())
    assert by_owner(train) == expected(TRAIN)
    assert by_owner(test) == expected(TEST)
    least, _ = stackoverflow(str(tmp_path), Choice(max_clients=1))
    assert len(by_owner(least)) == 1
    frequent = {user: own for user, own in TRAIN.items() if len(own) > 1}
    with pytest.raises(RequestError, match="min_examples: no client has 2 examples"):
        stackoverflow(str(tmp_path), Choice(min_examples=2))  # the test client has one
    connection = sqlite3.connect(tmp_path / "stackoverflow.sqlite")
    with connection:
        connection.execute("UPDATE client_metadata SET num_examples = 2 WHERE client_id = 'd'")
    connection.close()
    assert by_owner(stackoverflow(str(tmp_path), Choice(min_examples=2))[0]) == expected(frequent)


def test_choosing_clients_is_choosing_their_rows():
    """The same authors, whether chosen by their counts or among their rows."""
    owners = np.repeat([f"{place:02d}" for place in range(30)], np.arange(1, 31))
    choice = Choice(max_clients=7, min_examples=5, seed=3)
    names = np.unique(owners)[choice.clients(np.arange(1, 31))]
    assert set(owners[choice.rows(owners)]) == set(names)


def test_the_papers_json(tmp_path):
    """Two files are a split where they say so; one file is not."""
    data = {user: {"tokens": texts} for user, texts in TRAIN.items()}
    (tmp_path / "train.json").write_text(json.dumps(data))
    train, test = stackoverflow(str(tmp_path), Choice())
    assert (by_owner(train), test) == (expected(TRAIN), None)
    (tmp_path / "test.json").write_text(json.dumps({"d": {"tokens": TEST["d"]}}))
    train, test = stackoverflow(str(tmp_path), Choice())
    assert (by_owner(train), by_owner(test)) == (expected(TRAIN), expected(TEST))


POSTS = """\ufeff<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="1" OwnerUserId="7" Body="&lt;p&gt;What is &amp;lt;b&amp;gt; &amp;amp; why?&lt;/p&gt;" />
  <row Id="2" Body="&lt;p&gt;nobody's&lt;/p&gt;" />
  <row Id="3" OwnerUserId="8" Body="&lt;p&gt;Try&lt;/p&gt;&lt;pre&gt;&lt;code&gt;x=1&lt;/code&gt;
&lt;/pre&gt;&lt;p&gt;this&lt;br&gt;now&lt;/p&gt;" />
  <row Id="4" OwnerUserId="7" Body="&lt;p&gt;&lt;code&gt;only code&lt;/code&gt;&lt;/p&gt;" />
  <row Id="5" OwnerUserId="7" Body="" />
</posts>
"""


def test_posts_of_a_stack_exchange_dump(tmp_path):
    (tmp_path / "Posts.xml").write_text(POSTS, encoding="utf-8")
    for other in ("Badges", "Comments", "PostHistory"):  # they come with it
        (tmp_path / f"{other}.xml").write_text("<rows/>")
    train, test = stackoverflow(str(tmp_path), Choice())
    assert by_owner(train) == expected({"7": ["What is <b> & why?"], "8": ["Try this now"]})
    assert test is None


def test_html_becomes_its_text():
    assert html_text("<p>a<em>b</em> c</p><ul><li>d</li><li>e</li></ul>") == "ab c d e"
    assert html_text("x</code>y <code>z <pre>w</pre> v</code>u") == "xy u"
    assert html_text("<h2>one</h2>two<hr>three") == "one two three"
    assert html_text("<td>a</td><td>b</td>x<pre><code>y</code></pre>z") == "a b x z"


def write_comments(path: Path, comments: list[tuple[str | None, str | None]]) -> None:
    authors, bodies = zip(*comments, strict=True)
    pq.write_table(pa.table({"author": authors, "body": bodies, "score": [1] * len(bodies)}), path)


def test_reddits_comments_without_those_of_nobody(tmp_path):
    write_comments(
        tmp_path / "RC_2009-01.parquet",
        [(AUTHOR, "hello"), ("[deleted]", "gone"), ("b", "[removed]"), ("b", " \n"), (None, "x")],
    )
    write_comments(tmp_path / "RC_2009-02.parquet", [("b", "hi"), (AUTHOR, "again"), ("c", None)])
    train, test = reddit(str(tmp_path), Choice())
    assert by_owner(train) == expected({AUTHOR: ["hello", "again"], "b": ["hi"]})
    assert test is None
    assert by_owner(reddit(str(tmp_path), Choice(min_examples=2))[0]) == expected(
        {AUTHOR: ["hello", "again"]}
    )


def write_leaf(folder: Path, split: str, users: dict[str, list]) -> Path:
    (folder / split).mkdir(exist_ok=True)
    path = folder / split / "all_data_niid_0.json"
    data = {
        user: {"x": texts, "y": [{"target_tokens": text} for text in texts]}
        for user, texts in users.items()
    }
    sizes = [len(texts) for texts in users.values()]
    path.write_text(json.dumps({"users": list(users), "num_samples": sizes, "user_data": data}))
    return path


def test_reddit_of_leaf_keeps_its_own_split(tmp_path):
    """A text is lists of ten tokens with marks, which are no words."""
    text = [["<BOS>", "where", "to"], ["begin", "?", "<EOS>", "<PAD>"]]
    write_leaf(tmp_path, "train", {AUTHOR: [text, [["<PAD>"]]], "b": [["flat", "list"], "string"]})
    write_leaf(tmp_path, "test", {"b": [[["end"]]]})
    train, test = reddit(str(tmp_path), Choice())
    assert by_owner(train) == expected({AUTHOR: ["where to begin ?"], "b": ["flat list", "string"]})
    assert by_owner(test) == expected({"b": ["end"]})


def no_database(folder: Path) -> None:
    (folder / "so.sqlite").write_bytes(b"SQLite format 3\0" + bytes(200))


def no_example(folder: Path) -> None:
    with sqlite3.connect(write_tff(folder)) as database:
        database.execute(
            "UPDATE examples SET serialized_example_proto = ? WHERE client_id = ?",
            (example("x")[:-3], AUTHOR),
        )
    database.close()


def no_rows(folder: Path) -> None:
    with sqlite3.connect(write_tff(folder)) as database:
        database.execute("DELETE FROM examples WHERE client_id = ?", (AUTHOR,))
    database.close()


def no_test_text(folder: Path) -> None:
    with sqlite3.connect(write_tff(folder)) as database:
        database.execute(
            "UPDATE examples SET serialized_example_proto = ? WHERE split_name = 'test'",
            (example(" "),),
        )
    database.close()


def no_number(folder: Path) -> None:
    with sqlite3.connect(write_tff(folder)) as database:
        database.execute("UPDATE client_metadata SET num_examples = NULL")
    database.close()


def no_split(folder: Path) -> None:
    with sqlite3.connect(write_tff(folder)) as database:
        database.execute("DELETE FROM client_metadata WHERE split_name = 'test'")
    database.close()


def posts(text: bytes):
    return lambda folder: (folder / "Posts.xml").write_bytes(text)


def paper(content: object):
    return lambda folder: (folder / "train.json").write_text(json.dumps(content))


def truncated(folder: Path) -> None:
    path = folder / "RC.parquet"
    write_comments(path, [(AUTHOR, "hello")])
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("read", "damage", "texts"),
    [
        (stackoverflow, no_database, ["so.sqlite"]),
        (
            stackoverflow,
            lambda folder: write_tff(folder, metadata=False),
            ["no such table: client_metadata"],
        ),
        (stackoverflow, no_example, ["split 'train', client 1 in order, example 1", "protocol"]),
        (stackoverflow, no_rows, ["split 'train', client 1", "no examples"]),
        (stackoverflow, no_split, ["no clients of split 'test'"]),
        (stackoverflow, no_test_text, ["stackoverflow.sqlite", "split 'test' has no text"]),
        (stackoverflow, no_number, ["stackoverflow.sqlite", "num_examples", "whole number"]),
        (stackoverflow, paper({"b": {"tokens": ["x"]}, AUTHOR: {}}), ["train.json: user 2"]),
        (stackoverflow, paper({AUTHOR: {"tokens": [" "]}}), ["user 1", "no sentences"]),
        (stackoverflow, paper([1]), ["expected a JSON object"]),
        (stackoverflow, posts(b"<posts>\n<row Body='caf\xe9'/></posts>"), ["Posts.xml", "line 2"]),
        (stackoverflow, posts(b"<posts><row OwnerUserId='1'"), ["Posts.xml"]),
        (stackoverflow, posts(b"<posts><row Body='x'/></posts>"), ["no row has OwnerUserId"]),
        (
            stackoverflow,
            lambda _folder: None,
            ["holds no *.sqlite and no *.json and no *Posts.xml"],
        ),
        (reddit, truncated, ["RC.parquet"]),
        (
            reddit,
            lambda folder: write_comments(folder / "RC.parquet", [("[deleted]", "x")]),
            ["no comments with an author"],
        ),
        (
            reddit,
            lambda folder: write_leaf(folder, "train", {"b": ["x"], AUTHOR: []}),
            ["all_data_niid_0.json: users[1] has no examples"],
        ),
    ],
)
def test_damaged_files_are_one_line_that_names_no_author(read, damage, texts, tmp_path):
    damage(tmp_path)
    with pytest.raises(RequestError) as refused:
        read(str(tmp_path), Choice())
    message = str(refused.value)
    for text in texts:
        assert text in message
    assert "\n" not in message
    assert AUTHOR not in message
    assert str(tmp_path) in message or "comments" in message


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("stackoverflow", ["stackoverflow.sqlite.lzma", "put stackoverflow.sqlite, unpacked"]),
        ("reddit", ["fddemarco/pushshift-reddit-comments", "train-*.parquet"]),
    ],
)
def test_without_the_network_it_is_said_which_file_goes_where(name, texts):
    with pytest.raises(RequestError) as refused:
        DATASETS[name]()
    for text in [*texts, "dataset_args.data_dir"]:
        assert text in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_fetched_is_unpacked_once(tmp_path):
    """From an address of this machine: the database comes out as it was packed."""
    path = write_tff(tmp_path)
    packed = tmp_path / "stackoverflow.sqlite.lzma"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    unpacked = download_lzma(str(packed), "stackoverflow.sqlite")
    assert unpacked.read_bytes() == path.read_bytes()
    when = unpacked.stat().st_mtime_ns
    assert download_lzma(str(packed), "stackoverflow.sqlite") == unpacked
    assert unpacked.stat().st_mtime_ns == when


@pytest.mark.skipif(not (REAL / "stackexchange-beer").exists(), reason="needs ../shared/data")
def test_real_posts_by_their_users():
    """782 users wrote something that is not code alone; a tenth of them are the test set."""
    train, test = stackoverflow(str(REAL / "stackexchange-beer"), Choice())
    assert (len(by_owner(train)), test) == (782, None)
    data = DATASETS["stackoverflow"](
        str(REAL / "stackexchange-beer"), length=20, vocabulary=1000, max_examples_per_client=5
    )
    assert len(data.owners) == 704
    assert tuple(data.inputs.shape[1:]) == (20, 18)
    assert data.owners.sizes.max() <= 5
    assert data.num_classes == 1003
