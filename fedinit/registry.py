"""From a name in an experiment file to what it names: one of ours, or the user's own."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from fedinit.errors import RequestError, located, suggestion, unknown


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
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:  # whatever the user's module raises while it is imported
        near = suggestion(error.name, dir(error.obj)) if isinstance(error, AttributeError) else ""
        raise RequestError(f"{kind}: cannot import '{name}': {located(error)}{near}") from None
    return value


def call(kind: str, function: Any, arguments: Mapping[str, Any], **offered: Any) -> Any:
    """Call what a run names with its `..._args`, and with those of `offered` that it asks for.

    Raises:
        RequestError: an argument is unknown or missing, or the user's own code raises.
    """
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    except (TypeError, ValueError):  # it does not say what it takes
        parameters, takes_any = {}, True
    for name in arguments:
        if not takes_any and name not in parameters:
            raise unknown(f"{kind}_args key", name, parameters)
    asked = {name: value for name, value in offered.items() if name in parameters}
    try:
        return function(**{**asked, **arguments})
    except RequestError:
        raise
    except Exception as error:  # the user's own function
        name = getattr(function, "__name__", function)
        raise RequestError(f"{kind}: {name} failed: {located(error)}") from None


def add_to_path(folders: list[str]) -> None:
    """Put folders in front of the import path, so that a user's modules there can be named."""
    for folder in reversed(folders):
        if folder not in sys.path:
            sys.path.insert(0, folder)
