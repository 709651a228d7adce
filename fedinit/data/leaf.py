"""LEAF's JSON (Caldas et al. 2018): {users, num_samples, user_data: {user: {x, y}}}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedinit.data.sources import hashed, read_json
from fedinit.errors import RequestError


def users(paths: list[Path]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield each user's id, hashed, inputs x and targets y.

    Raises:
        RequestError: a file is not JSON in this layout, users are none or listed twice, one has no
            data, or its x and y differ in number.
    """
    for path in paths:
        content = read_json(path)
        names, data = content.get("users"), content.get("user_data")
        if not isinstance(names, list) or not isinstance(data, dict):
            raise RequestError(f"{path}: expected LEAF's keys users, num_samples and user_data")
        if not names or not all(isinstance(name, str) for name in names):
            raise RequestError(f"{path}: users: expected names")
        if len(set(names)) < len(names):
            raise RequestError(f"{path}: users: one is listed twice")
        for place, name in enumerate(names):
            of_user = data.get(name)
            if not isinstance(of_user, dict) or not {"x", "y"} <= of_user.keys():
                raise RequestError(f"{path}: user_data has no x and y of users[{place}]")
            inputs, targets = of_user["x"], of_user["y"]
            if not isinstance(inputs, list) or not isinstance(targets, list) or not inputs:
                raise RequestError(f"{path}: users[{place}] has no examples")
            if len(inputs) != len(targets):
                raise RequestError(
                    f"{path}: users[{place}] has {len(inputs)} x and {len(targets)} y"
                )
            yield hashed(name), inputs, targets
