"""From a name in an experiment file to what it names: one of ours, or the user's own."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedinit.errors import RequestError, located, named, suggestion, unknown

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def resolve(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """Return `known[name]`, or the attribute that `package.module:attribute` names.

    Raises:
        RequestError: the name is unknown, or the attribute cannot be imported.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise unknown(kind, name, [*known, "package.module:attribute"])
    module_name, _, attribute = name.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise RequestError(f"{kind}: cannot import '{name}': {located(error)}") from None
    try:
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        near = suggestion(error.name, dir(error.obj))
        raise RequestError(f"{kind}: cannot import '{name}': {named(error)}{near}") from None
    return value


def source_of(kind: str, name: str) -> str | None:
    """Return the SHA-256 of the file that `package.module:attribute` is in; None of other names.

    Raises:
        RequestError: the attribute cannot be imported.
    """
    if ":" not in name:
        return None
    resolve(kind, name, {})
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def call(kind: str, function: Any, arguments: Mapping[str, Any], **offered: Any) -> Any:
    """Call what a run names with its `..._args`, and with those of `offered` that it asks for.

    Raises:
        RequestError: an argument is unknown or missing, or the user's own code raises.
    """
    names, takes_any = taken(function)
    for name in arguments:
        if not takes_any and name not in names:
            raise unknown(f"{kind}_args key", name, names)
    asked = {name: value for name, value in offered.items() if name in names}
    try:
        return function(**{**asked, **arguments})
    except RequestError:
        raise
    except Exception as error:  # the user's own function
        name = getattr(function, "__name__", function)
        raise RequestError(f"{kind}: {name} failed: {located(error)}") from None


def taken(function: Any) -> tuple[list[str], bool]:
    """Return the names of the arguments that a function or class takes, and whether any is taken.

    What a class takes as `**kwargs` it hands on to its base: that one's arguments are its own.
    """
    bases = function.__mro__[1:] if inspect.isclass(function) else ()
    names: list[str] = []
    for layer in (function, *bases):
        try:
            parameters = inspect.signature(layer).parameters.values()
        except (TypeError, ValueError):  # it does not say what it takes
            return names, True
        names += [each.name for each in parameters if each.kind in _BY_NAME]
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            return names, False
    return names, True


def add_to_path(folders: list[str]) -> None:
    """Put folders in front of the import path, so that a user's modules there can be named."""
    for folder in reversed(folders):
        if folder not in sys.path:
            sys.path.insert(0, folder)
