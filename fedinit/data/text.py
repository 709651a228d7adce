"""Texts by their authors as rows to predict: characters, words, or a tokenizer's sub-words."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import from_numpy

from fedinit.assets import asset
from fedinit.data.clients import Choice, check_counts, held_out_clients
from fedinit.data.federated_dataset import IGNORED, ClientRows, FederatedDataset
from fedinit.errors import NotHereError, RequestError, named, one_line, unknown

UNKNOWN, START = 0, "<s>"  # of the character vocabulary
SPECIAL = ("<unk>", "<s>", "</s>")  # the first words of a vocabulary
WORD_CHARACTERS = 18  # bytes of a word that are read, its two ends included
_WORD = re.compile(r"</?\w+>|\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}]\w+)*|[^\w\s]")
_WORD_START, _WORD_END = 1, 2  # bytes that no text has
Keep = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Texts:
    """Texts and whose they are.

    Attributes:
        owners: (n,) ids of the authors, hashed.
        texts: (n,) the texts; none is blank.
    """

    owners: np.ndarray
    texts: Sequence[str]

    def of(self, choice: Choice) -> "Texts":
        """Return the texts of the chosen authors; what is counted is texts.

        Raises:
            RequestError: a number is below 1, or no author has enough texts.
        """
        return self.at(choice.rows(self.owners))

    def at(self, rows: np.ndarray) -> "Texts":
        """Return the texts at these positions."""
        return Texts(self.owners[rows], [self.texts[row] for row in rows])


@dataclass(frozen=True)
class Rows:
    """What texts become: rows (n, ...), what each predicts, and the text that each is from (n,)."""

    inputs: np.ndarray
    targets: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """How texts become rows.

    Attributes:
        rows: the rows of texts that a choice keeps; it is called with the text of each row (m,) and
            returns the positions of those to keep.
        classes: number of different targets.
        labels: a name of the targets' vocabulary: where two are equal, a number means the same.
    """

    rows: Callable[[Sequence[str], Keep], Rows]
    classes: int
    labels: str


Read = Callable[[str | None, Choice], tuple[Texts, Texts | None]]


class TextDataset:
    """A data set that a run can name, made of what `read` returns.

    Args:
        read: takes `data_dir` and the choice of authors; returns the chosen authors' training texts
            and those of the source's own test split, or None where it has none.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __call__(
        self,
        data_dir: str | None = None,
        tokens: str = "words",
        length: int = 20,
        vocabulary: int | str = 10000,
        tokenizer: str = "distilbert/distilgpt2",
        max_clients: int | None = None,
        min_examples: int = 1,
        max_examples_per_client: int | None = None,
        test_share: float = 0.1,
        max_test_examples: int = 10000,
        seed: int = 0,
    ) -> FederatedDataset:
        """Read the texts and make them rows; the clients are the authors.

        Args:
            data_dir: a folder with the data's files; by default they are fetched once.
            tokens: `characters` (a window predicts the next one: charrnn), `words` (each predicts
                the next: charlm) or `subwords` (likewise: distilgpt2).
            length: characters of a window, or words or sub-words of a row.
            vocabulary: how many of the training texts' most frequent words are told apart, or a
                text file with a word on each line.
            tokenizer: of the sub-words: a folder, or a name on the hub.
            max_clients: at most so many authors, of each split where the source has a test split.
            min_examples: authors with fewer texts are left out, of each split likewise.
            max_examples_per_client: at most so many rows of each author.
            test_share: share of the authors whose texts are the test set, where the source has no
                split of its own.
            max_test_examples: at most so many test rows, evenly spaced.
            seed: of these draws; the same for all runs.

        Raises:
            RequestError: the data are missing, cannot be had, or are damaged; a name is unknown; or
                a number is wrong.
        """
        if tokens not in ENCODERS:
            raise unknown("dataset_args.tokens", tokens, ENCODERS)
        check_counts({"length": length, "max_test_examples": max_test_examples})
        train, test = self._read(data_dir, Choice(max_clients, min_examples, None, seed))
        if test is None:
            held = held_out_clients(train.owners, test_share, seed)
            train, test = train.at(np.flatnonzero(~held)), train.at(np.flatnonzero(held))
        encoder = ENCODERS[tokens](train.texts, length, vocabulary, tokenizer)
        choice = Choice(max_examples_per_client=max_examples_per_client, seed=seed)
        rows = encoder.rows(train.texts, lambda text: choice.rows(train.owners[text]))
        tested = encoder.rows(test.texts, lambda text: spaced(len(text), max_test_examples))
        return FederatedDataset(
            from_numpy(rows.inputs),
            from_numpy(rows.targets),
            ClientRows.by_owner(train.owners[rows.text]),
            from_numpy(tested.inputs),
            from_numpy(tested.targets),
            num_classes=encoder.classes,
            labels=encoder.labels,
        )


def characters(_texts: Sequence[str], length: int, *_unused: object) -> Encoder:
    """A window of characters predicts the next one; the vocabulary is charrnn's."""
    numbers = character_vocabulary()

    def rows(texts: Sequence[str], keep: Keep) -> Rows:
        windows, starts, text = character_windows(texts, length)
        kept = keep(text)
        chosen = windows[starts[kept]]
        return Rows(chosen[:, :-1].copy(), chosen[:, -1].copy(), text[kept])

    return Encoder(rows, max(numbers.values()) + 1, "characters")


def character_vocabulary() -> dict[str, int]:
    """Return charrnn's number of each character; 0 is any other."""
    return json.loads(asset("charrnn-vocab.json").read_text(encoding="utf-8"))


def character_windows(
    texts: Iterable[str], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every window of `length` characters and the next, and which of them are of a text.

    Each text is preceded by `length` characters, unknown ones and the start mark, so that no window
    reaches into the text before it.

    Returns:
        windows (m, length + 1), a view; the numbers (n,) of those that end within a text; and that
        text (n,).
    """
    numbers = character_vocabulary()
    lead = np.full(length, UNKNOWN, dtype=np.int16)
    lead[-1] = numbers[START]
    pieces, owners = [], []
    for place, text in enumerate(texts):
        codes = np.array([numbers.get(character, UNKNOWN) for character in text], np.int16)
        pieces += [lead, codes]
        owners += [np.full(length, -1), np.full(len(codes), place)]
    codes, owner = np.concatenate(pieces), np.concatenate(owners)
    ends = np.flatnonzero(owner >= 0)
    return np.lib.stride_tricks.sliding_window_view(codes, length + 1), ends - length, owner[ends]


def words(texts: Sequence[str], length: int, vocabulary: int | str, *_unused: object) -> Encoder:
    """Each word predicts the next one, read by its characters, so that unknown ones differ."""
    known = [*SPECIAL, *_vocabulary(texts, vocabulary)]
    number = {word: place for place, word in enumerate(known)}
    unknown_word, start, end = (number[word] for word in SPECIAL)

    def rows(texts: Sequence[str], keep: Keep) -> Rows:
        forms = {word: place for place, word in enumerate(SPECIAL)}  # every word that is there
        sequences = [
            [start, *(forms.setdefault(word, len(forms)) for word in split_words(text)), end]
            for text in texts
        ]
        index, present, text = _chunks(sequences, length, keep)
        flat = np.fromiter(chain.from_iterable(sequences), np.int64)
        spelled = np.stack([_spell(word) for word in forms])
        targets = np.array([number.get(word, unknown_word) for word in forms], np.int32)
        inputs = spelled[flat[index]]
        inputs[~present] = 0
        return Rows(inputs, np.where(present, targets[flat[index + 1]], IGNORED), text)

    return Encoder(rows, len(known), _fingerprint(known))


def split_words(text: str) -> list[str]:
    """Return a text's words in lower case; punctuation marks and tags like <url> are words."""
    return _WORD.findall(text.lower())


def subwords(_texts: Sequence[str], length: int, _vocabulary: object, tokenizer: str) -> Encoder:
    """Each sub-word of a byte-level BPE tokenizer predicts the next one."""
    encode = load_tokenizer(tokenizer)
    mark = encode.eos_token_id
    if mark is None:
        raise RequestError(f"dataset_args.tokenizer: '{tokenizer}' has no eos_token")

    def rows(texts: Sequence[str], keep: Keep) -> Rows:
        found = encode(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        sequences = [[mark, *ids, mark] for ids in found]
        index, present, text = _chunks(sequences, length, keep)
        flat = np.fromiter(chain.from_iterable(sequences), np.int32)
        inputs = np.where(present, flat[index], mark)  # attention never looks ahead to the padding
        return Rows(inputs, np.where(present, flat[index + 1], IGNORED), text)

    numbers = encode.get_vocab()
    return Encoder(rows, len(encode), _fingerprint(sorted(numbers, key=numbers.__getitem__)))


ENCODERS: dict[str, Callable[[Sequence[str], int, int | str, str], Encoder]] = {
    "characters": characters,
    "words": words,
    "subwords": subwords,
}


def load_tokenizer(name: str) -> Any:
    """Return a tokenizer of transformers, from a folder or the hub.

    Raises:
        RequestError: transformers is not installed, or the tokenizer's files cannot be had.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise NotHereError(
            "dataset_args.tokens: subwords needs transformers: pip install 'fedinit[language]'"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the network, the hub, and whatever a damaged file raises
        raise NotHereError(
            f"dataset_args.tokenizer: cannot read '{name}' ({named(error)}); put the hub's "
            "tokenizer.json and tokenizer_config.json into a folder and name that"
        ) from None


def _chunks(
    sequences: Sequence[Sequence[int]], length: int, keep: Keep
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut sequences into rows of at most `length` predictions.

    Returns:
        Of the rows kept: the positions (n, length) in the sequences laid end to end of what is
        read, what comes after each being what it predicts; where there is something to predict
        (n, length); and the sequence (n,) of each row.
    """
    sizes = np.array([len(each) - 1 for each in sequences])  # predictions
    begins = np.concatenate([[0], np.cumsum(sizes + 1)])[:-1]
    counts = -(-sizes // length)
    text = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its text
    kept = keep(text)
    text, place = text[kept], place[kept] * length
    present = place[:, None] + np.arange(length) < sizes[text, None]
    index = begins[text, None] + place[:, None] + np.arange(length)
    return np.where(present, index, 0), present, text


def _vocabulary(texts: Sequence[str], vocabulary: int | str) -> list[str]:
    """Return the words to tell apart, but for the special ones."""
    if isinstance(vocabulary, str):
        try:
            lines = Path(vocabulary).read_text(encoding="utf-8").lower().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"dataset_args.vocabulary: {vocabulary}: {one_line(error)}"
            ) from None
        found = dict.fromkeys(line.strip() for line in lines)
        return [word for word in found if word and word not in SPECIAL]
    check_counts({"vocabulary": vocabulary})
    counts = Counter(chain.from_iterable(map(split_words, texts)))
    order = sorted(counts, key=lambda word: (-counts[word], word))  # equally frequent: by alphabet
    return [word for word in order if word not in SPECIAL][:vocabulary]


def _spell(word: str) -> np.ndarray:
    """Return a word's bytes between its two ends, cut or padded to WORD_CHARACTERS."""
    spelling = np.zeros(WORD_CHARACTERS, np.int16)
    codes = [_WORD_START, *word.encode()[: WORD_CHARACTERS - 2], _WORD_END]
    spelling[: len(codes)] = codes
    return spelling


def spaced(rows: int, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced positions of so many rows."""
    return np.linspace(0, rows - 1, min(most, rows)).astype(int)


def _fingerprint(vocabulary: Iterable[str]) -> str:
    return sha256("\n".join(vocabulary).encode()).hexdigest()[:16]
