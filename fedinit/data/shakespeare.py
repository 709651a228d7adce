"""Shakespeare by speaking role: a window of characters predicts the next one."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fedinit.assets import asset
from fedinit.data.clients import check_counts
from fedinit.data.federated_dataset import ClientRows, FederatedDataset
from fedinit.data.sources import read_parquet
from fedinit.errors import RequestError
from fedinit.randomness import Draw, keyed

UNKNOWN, START = 0, "<s>"


def shakespeare(
    window: int = 40,
    examples_per_client: int = 200,
    test_roles: int = 42,
    test_examples: int = 2000,
) -> FederatedDataset:
    """Plays, next character after 40, by role (natural clients); the test roles are unseen ones.

    Args:
        window: number of characters that the model reads.
        examples_per_client: at most so many windows of a role, evenly spaced over its speeches.
        test_roles: number of roles held out, drawn once for all seeds.
        test_examples: number of windows of the held-out roles that make the test set.

    Raises:
        RequestError: a number is below 1, or no role would be left to train on.
    """
    table = read_parquet(asset("shakespeare-roles.parquet"), ["play", "role", "speech"])
    roles = pc.binary_join_element_wise(table["play"], table["role"], "/").to_numpy(
        zero_copy_only=False
    )
    names, role = np.unique(roles.astype(str), return_inverse=True)
    sizes = {
        "window": window,
        "examples_per_client": examples_per_client,
        "test_roles": test_roles,
        "test_examples": test_examples,
    }
    check_counts(sizes)
    if test_roles >= len(names):
        raise RequestError(f"dataset_args.test_roles: there are only {len(names)} roles")

    tokens, owner = _encode(table["speech"], role, window)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, window + 1)
    ends = np.flatnonzero(owner >= 0)  # positions of the characters to predict
    ends = ends[np.argsort(owner[ends], kind="stable")]
    owners = owner[ends]

    held_out = keyed(Draw.PARTITION, 0).permutation(len(names))[:test_roles]
    is_test = np.isin(owners, held_out)
    train = _thin(ends[~is_test], owners[~is_test], examples_per_client)
    test = ends[is_test]
    test = test[np.linspace(0, len(test) - 1, min(test_examples, len(test))).astype(int)]
    rows, test_rows = windows[train - window], windows[test - window]
    return FederatedDataset(
        torch.from_numpy(rows[:, :-1].copy()),
        torch.from_numpy(rows[:, -1].copy()),
        ClientRows.by_owner(names[owner[train]]),
        torch.from_numpy(test_rows[:, :-1].copy()),
        torch.from_numpy(test_rows[:, -1].copy()),
        num_classes=max(_vocabulary().values()) + 1,
    )


def _vocabulary() -> dict[str, int]:
    return json.loads(asset("charrnn-vocab.json").read_text(encoding="utf-8"))


def _encode(
    speeches: pa.ChunkedArray, role: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return one token array of all speeches, and the role of each token to predict (else -1).

    Each speech is preceded by `window` tokens, unknown ones and the start mark, so that no window
    reaches into the speech before it.
    """
    vocabulary = _vocabulary()
    lead = np.full(window, UNKNOWN, dtype=np.int16)
    lead[-1] = vocabulary[START]
    tokens, owners = [], []
    for speech, speaker in zip(speeches.to_pylist(), role, strict=True):
        codes = np.array([vocabulary.get(character, UNKNOWN) for character in speech], np.int16)
        tokens += [lead, codes]
        owners += [np.full(window, -1), np.full(len(codes), speaker)]
    return np.concatenate(tokens), np.concatenate(owners)


def _thin(ends: np.ndarray, owners: np.ndarray, most: int) -> np.ndarray:
    """Keep at most `most` evenly spaced positions of each owner; `owners` is sorted."""
    _, first, count = np.unique(owners, return_index=True, return_counts=True)
    return np.concatenate(
        [
            ends[start + np.linspace(0, size - 1, min(most, size)).astype(int)]
            for start, size in zip(first, count, strict=True)
        ]
    )
