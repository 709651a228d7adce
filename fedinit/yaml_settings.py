"""YAML as settings are written in it: safe, without surprises, and bounded."""

import re
from pathlib import Path
from typing import Any

import yaml

from fedinit.errors import RequestError, one_line

_MOST_VALUES = 1_000_000  # in a file


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, as YAML 1.2 has it: `1e-3` is a number, and no key is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`.

        Raises:
            yaml.YAMLError: a key is given twice.
        """
        given = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in given:
                problem = f"'{key.value}' is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            given.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


# Beside YAML's own: not UTF-8 or a date that does not exist; thousands of nested brackets.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def parse_value(text: str) -> Any:
    """Read one YAML value, as `--set key=value` gives it."""
    try:
        return _read(text)
    except _NOT_YAML as error:
        raise RequestError(f"'{text}' is not a YAML value: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Say what is wrong, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return one_line(f"{error.problem} (line {error.problem_mark.line + 1})")
    return one_line(error)


def _read(text: str) -> Any:
    """Read YAML; refuse aliases of aliases that stand for more than a file can hold."""
    content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    waiting, seen = [content], 0
    while waiting:
        each = waiting.pop()
        seen += 1
        if isinstance(each, dict | list):
            waiting += each.values() if isinstance(each, dict) else each
        if seen > _MOST_VALUES:
            raise ValueError(f"it stands for over {_MOST_VALUES} values")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of `key: value` settings.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    try:
        content = _read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except _NOT_YAML as error:
        raise RequestError(f"{path} is not YAML: {_why(error)}") from None
    if not is_settings(content):
        raise RequestError(f"{path}: expected `key: value` settings at the top level")
    return content


def is_settings(value: Any) -> bool:
    """Whether something is a mapping of names to values."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
