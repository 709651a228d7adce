"""A run, fully specified; and the experiment file that spans several of them."""

import itertools
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal
from zlib import crc32

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from fedinit.errors import RequestError, unknown

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Partition(_Strict):
    """How rows are dealt to clients: dirichlet reads `alpha`, iid and dirichlet `clients`."""

    kind: Literal["iid", "dirichlet", "natural"] = "natural"
    alpha: PositiveFloat = 0.1
    clients: PositiveInt = 100


class Client(_Strict):
    """Local training: the client optimizer and what it needs."""

    optimizer: str = "sgd"
    lr: PositiveFloat = 0.05
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    momentum: Decay = 0.0
    weight_decay: NonNegativeFloat = 0.0
    mu: NonNegativeFloat = 0.0
    shuffle: bool = True
    max_grad_norm: PositiveFloat | None = None


class Server(_Strict):
    """The server optimizer; each reads the settings that it knows and no other."""

    optimizer: str = "sgd"
    lr: PositiveFloat = 1.0
    momentum: Decay = 0.9
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.99)
    eps: PositiveFloat = 1e-3
    initial_accumulator: NonNegativeFloat = 0.0


class Stragglers(_Strict):
    """Each round a client does E ~ U{epochs[0]..epochs[1]} local epochs with this probability."""

    fraction: Fraction = 0.0
    epochs: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (1, 5)


class Run(_Strict):
    """One run, fully specified. Names are resolved, and sizes checked, before any work starts."""

    dataset: str
    dataset_args: dict[str, Any] = {}
    partition: Partition = Partition()
    model: str
    model_args: dict[str, Any] = {}
    loss: str = "cross-entropy"
    loss_args: dict[str, Any] = {}
    initialization: str = "random"
    trainable: Literal["all", "head"] = "all"
    strategy: str = "fedopt"
    strategy_args: dict[str, Any] = {}
    reduce: Literal["auto", "worker", "client"] = "auto"
    client: Client = Client()
    server: Server = Server()
    stragglers: Stragglers = Stragglers()
    rounds: PositiveInt = 100
    cohort: PositiveInt = 10
    seed: Annotated[int, Field(ge=0)] = 0
    evaluate_every: PositiveInt = 5
    target_accuracy: Fraction | None = None
    workers: PositiveInt | Literal["auto"] = "auto"


LONGEST = 150  # characters of a run's name
_FREE_FORM = ("dataset_args", "model_args", "loss_args", "strategy_args")


class Experiment(BaseModel):
    """The runs that one file asks for, and the settings in which they differ."""

    model_config = ConfigDict(frozen=True)

    name: str
    folder: Path
    varied: list[str]
    runs: dict[str, Run]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads `1e-3` as the number it is (YAML 1.2), not as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Read one YAML value, as `--set key=value` gives it."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RequestError(f"'{text}' is not a YAML value: {_line(error)}") from None


def make_run(settings: Mapping[str, Any]) -> Run:
    """Validate nested settings into a `Run`.

    Raises:
        RequestError: a key is unknown (the nearest is suggested), missing, or of the wrong type.
    """
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise _explain(error) from None


def load_experiment(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment file, or a single run, and spell out its runs.

    Args:
        path: a YAML file: a run's settings and, beside them, `name`, `grid` and `when`.
        overrides: `dotted.key=value` settings that win over the file's, its grid and its `when`;
            a key that starts with `grid.` sets or adds an axis.

    Raises:
        RequestError: the file cannot be read, or any of its runs is not valid.
    """
    raw = _read_mapping(path)
    fixed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RequestError(f"--set {override}: expected dotted.key=value")
        if key.startswith("grid."):
            raw["grid"] = {**(raw.get("grid") or {}), key[5:]: parse_value(text)}
        else:
            fixed[key] = parse_value(text)

    name = raw.pop("name", path.stem)
    if not isinstance(name, str) or _slug(name) != name or not name.strip("."):
        raise RequestError(f"{path}: name: letters, digits and . _ = , - only, got {name!r}")
    try:
        return _spell_out(name, path.resolve().parent, raw, fixed)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def _spell_out(name: str, folder: Path, raw: dict[str, Any], fixed: dict[str, Any]) -> Experiment:
    grid, when = raw.pop("grid", None) or {}, raw.pop("when", None) or []
    _check_grid(grid)
    _check_when(when)
    axes = {key: values for key, values in grid.items() if key not in fixed}
    runs: dict[str, Run] = {}
    for combination in itertools.product(*axes.values()):
        settings = deepcopy(raw)
        arm = dict(zip(axes, combination, strict=True))
        _apply(settings, arm | fixed)
        for rule in when:
            run = make_run(settings)
            if all(get(run, key) == value for key, value in rule["match"].items()):
                _apply(settings, rule["set"] | fixed)
        label = _label(arm) or name
        _locate_weights(settings, folder)
        if label in runs:
            raise RequestError(f"grid: two runs are both {label}")
        runs[label] = make_run(settings)
    return Experiment(name=name, folder=folder, varied=list(axes), runs=runs)


def _label(arm: Mapping[str, Any]) -> str:
    """Name a run, and its folder, by the settings that vary; file systems bound the length."""
    label = ",".join(f"{key}={_slug(str(value))}" for key, value in arm.items())
    return label if len(label) <= LONGEST else f"{label[:LONGEST]}-{crc32(label.encode()):08x}"


def _locate_weights(settings: dict[str, Any], folder: Path) -> None:
    """Let a relative path to weights mean: beside the experiment file."""
    given = settings.get("initialization")
    if isinstance(given, str) and Path(given).suffix:
        settings["initialization"] = str(folder / given)


def get(run: Run, key: str) -> Any:
    """Return the setting that a dotted key names; lists for tuples, as a file would say it.

    Raises:
        RequestError: there is no such key.
    """
    value: Any = run.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if key.split(".", 1)[0] in _FREE_FORM:
                return None
            raise unknown("key", key, _dotted_keys())
        value = value[part]
    return value


def to_yaml(run: Run) -> str:
    """Return the run as a file that `load_experiment` reads back to the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _dotted_keys() -> list[str]:
    keys = []
    for name, field in Run.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        keys.append(name)
    return keys


def _apply(settings: dict[str, Any], dotted: Mapping[str, Any]) -> None:
    for key, value in dotted.items():
        *sections, last = key.split(".")
        if sections and sections[0] not in _FREE_FORM and key not in _dotted_keys():
            raise unknown("key", key, _dotted_keys())
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RequestError(f"{key}: {section} holds {inner!r}, not a mapping")
        inner[last] = deepcopy(value)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {_line(error)}") from None
    if not _is_settings(content):
        raise RequestError(f"{path}: expected `key: value` settings at the top level")
    return content


def _check_grid(grid: Any) -> None:
    if not _is_settings(grid):
        raise RequestError(f"grid: expected `dotted.key: [values]`, got {grid!r}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RequestError(f"grid: {key}: expected a list of values, got {values!r}")


def _check_when(when: Any) -> None:
    for rule in when if isinstance(when, list) else [when]:
        good = isinstance(rule, dict) and set(rule) == {"match", "set"}
        if not (isinstance(when, list) and good and all(_is_settings(x) for x in rule.values())):
            raise RequestError(
                "when: expected a list of {match: {dotted key: value}, set: {dotted key: value}}, "
                f"got {rule!r}"
            )


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _explain(error: ValidationError) -> RequestError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown("key", key, _dotted_keys())
    if first["type"] == "missing":
        return RequestError(f"{key}: required key is missing")
    return RequestError(f"{key}: {_line(first['msg'])}, got {first['input']!r}")


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=,-]+", "_", text)
