"""Shakespeare by speaking role: a window of characters predicts the next one."""

import numpy as np
import pyarrow.compute as pc
import torch

from fedinit.assets import asset
from fedinit.data.clients import Choice, check_counts
from fedinit.data.federated_dataset import ClientRows, FederatedDataset
from fedinit.data.sources import read_parquet
from fedinit.data.text import Texts, character_vocabulary, character_windows, spaced
from fedinit.errors import RequestError
from fedinit.randomness import Draw, keyed


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
    roles, speeches = _speeches()
    names, role = np.unique(roles, return_inverse=True)
    sizes = {
        "window": window,
        "examples_per_client": examples_per_client,
        "test_roles": test_roles,
        "test_examples": test_examples,
    }
    check_counts(sizes)
    if test_roles >= len(names):
        raise RequestError(f"dataset_args.test_roles: there are only {len(names)} roles")

    windows, starts, text = character_windows(speeches, window)
    order = np.argsort(role[text], kind="stable")
    starts, owners = starts[order], role[text][order]
    held_out = keyed(Draw.PARTITION, 0).permutation(len(names))[:test_roles]
    is_test = np.isin(owners, held_out)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train = train[_thin(owners[train], examples_per_client)]
    test = test[spaced(len(test), test_examples)]
    rows, test_rows = windows[starts[train]], windows[starts[test]]
    return FederatedDataset(
        torch.from_numpy(rows[:, :-1].copy()),
        torch.from_numpy(rows[:, -1].copy()),
        ClientRows.by_owner(names[owners[train]]),
        torch.from_numpy(test_rows[:, :-1].copy()),
        torch.from_numpy(test_rows[:, -1].copy()),
        num_classes=max(character_vocabulary().values()) + 1,
        labels="characters",
    )


def shakespeare_texts(data_dir: str | None, choice: Choice) -> tuple[Texts, None]:
    """Plays, next word or sub-word, by role (natural clients)."""
    if data_dir is not None:
        raise RequestError("dataset_args.data_dir: shakespeare-texts is embedded, it has no files")
    roles, speeches = _speeches()
    return Texts(roles, speeches).of(choice), None


def _speeches() -> tuple[np.ndarray, list[str]]:
    table = read_parquet(asset("shakespeare-roles.parquet"), ["play", "role", "speech"])
    roles = pc.binary_join_element_wise(table["play"], table["role"], "/")
    return roles.to_numpy(zero_copy_only=False).astype(str), table["speech"].to_pylist()


def _thin(owners: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced positions of each owner; `owners` is sorted."""
    _, first, count = np.unique(owners, return_index=True, return_counts=True)
    return np.concatenate(
        [start + spaced(size, most) for start, size in zip(first, count, strict=True)]
    )
