"""From a name in an experiment file to what it names: one of ours, or the user's own."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from functools import cache
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
    except (Exception, SystemExit) as error:  # whatever the user's module does when imported
        raise RequestError(f"{kind}: cannot import '{name}': {located(error)}") from None
    try:
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        near = suggestion(error.name, dir(error.obj))
        raise RequestError(f"{kind}: cannot import '{name}': {named(error)}{near}") from None
    except Exception as error:  # a module may have a __getattr__ of its own
        raise RequestError(f"{kind}: cannot import '{name}': {located(error)}") from None
    return value


@cache  # what was imported, whatever becomes of the file
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

    A class that takes `**kwargs` usually hands them on to its base: it gets those of `offered` that
    a base asks for as well, but for the ones that it hands on itself, or that nobody takes.

    Raises:
        RequestError: an argument is unknown or missing, or the user's own code raises.
    """
    own, takes_any = _parameters(function)
    for name in arguments:
        if not takes_any and name not in own:
            raise unknown(f"{kind}_args key", name, own)
    names, hands_on = _taken(function)
    asked = {name: offered[name] for name in names if name in offered}
    while True:
        try:
            return function(**{**asked, **arguments})
        except RequestError:
            raise
        except Exception as error:  # the user's own function
            said = str(error) if isinstance(error, TypeError) else ""
            for name in arguments.keys() - names if not hands_on else ():
                if f"unexpected keyword argument '{name}'" in said:
                    raise unknown(f"{kind}_args key", name, names) from None
            clash = [name for name in asked if name not in own and f"'{name}'" in said]
            if not clash:
                name = getattr(function, "__name__", function)
                raise RequestError(f"{kind}: {name} failed: {located(error)}") from None
            del asked[clash[0]]


def taken(function: Any) -> list[str]:
    """Return the names of what a function takes, or a class and the bases it may hand it on to."""
    return _taken(function)[0]


def _taken(function: Any) -> tuple[list[str], bool]:
    """Return `taken`, and whether what else there is may still be somebody's to take."""
    names, takes_any = _parameters(function)
    for base in function.__mro__[1:-1] if inspect.isclass(function) else ():  # object takes nothing
        if takes_any and "__init__" in vars(base):
            further, takes_any = _parameters(base)
            names = [*names, *further]
    return names, takes_any


def _parameters(function: Any) -> tuple[list[str], bool]:
    """Return the names of the arguments that a function takes, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it does not say
        return [], True
    names = [each.name for each in parameters if each.kind in _BY_NAME]
    return names, any(each.kind is each.VAR_KEYWORD for each in parameters)


def add_to_path(folders: list[str]) -> None:
    """Put folders in front of the import path, so that a user's modules there can be named."""
    for folder in reversed(folders):
        if folder not in sys.path:
            sys.path.insert(0, folder)
