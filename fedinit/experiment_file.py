"""An experiment file: a run's settings and, beside them, what varies from run to run.

name      what the experiment is called
study     the figure or table that its results are shown as (see `fedinit list`)
grid      dotted key -> list of values: every combination is a run; or a list of such mappings;
          here and below a section's mapping stands for the keys in it
when      a list of rules {match: {dotted key: value}, set: {dotted key: value}}, applied in order
rules     files beside this one with further rules under `when`, applied before its own
presets   name -> settings, grid, when ... laid over the file's; the first one is the default
tune      what `fedinit tune` searches
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from zlib import crc32

from pydantic import BaseModel, ConfigDict

from fedinit.config import Run, dotted_keys, get, is_argument, make_run, unknown_key
from fedinit.errors import RequestError, one_line, unknown
from fedinit.yaml_settings import is_settings, parse_value, read_settings

_BESIDE_A_RUN = ("name", "study", "grid", "when", "rules", "presets", "tune")
LONGEST = 150  # bytes of a run's name


class Experiment(BaseModel):
    """The runs that one file asks for, and the settings in which they differ.

    Attributes:
        notes: what may be a mistake: rules of its own `when` that match none of its runs. Presets
            and overrides choose among runs: then nothing is told.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    folder: Path
    varied: list[str]
    runs: dict[str, Run]
    study: str | None = None
    tune: dict[str, Any] | None = None
    notes: list[str] = []

    def as_written(self, run: Run) -> Run:
        """Return a run with weights beside the file as they are named there."""
        name = run.initialization.removeprefix(f"{self.folder}/")
        return run.model_copy(update={"initialization": name})

    def arm(self, run: Run) -> dict[str, Any]:
        """Return what tells a run from others."""
        written = self.as_written(run)
        return {key: get(written, key) for key in self.varied}


def override(text: str) -> tuple[str, Any]:
    """Read `dotted.key=value`, as --set gives it.

    Raises:
        RequestError: it is something else.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: expected dotted.key=value")
    if key in _BESIDE_A_RUN:
        told = "sets what a run has, and axes (grid.KEY), and keys of the search (tune.KEY)"
        raise RequestError(f"--set {text}: {key} is for the file; --set {told}")
    return key, parse_value(value)


def load_experiment(
    path: Path, overrides: Iterable[str] = (), preset: str | None = None
) -> Experiment:
    """Read an experiment file, or a single run, and spell out its runs.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` settings that win over the file's, its grid and its rules;
            a key that starts with `grid.` sets or adds an axis, one with `tune.` is the search's.
        preset: which of the file's presets; by default the first one.

    Raises:
        RequestError: the file cannot be read, or any of its runs is not valid.
    """
    raw, overrides = read_settings(path), list(overrides)
    whole = not overrides and "presets" not in raw
    try:
        raw = _lay_preset_over(raw, preset)
        grids = _grids(raw.pop("grid", None))
        fixed: dict[str, Any] = {}
        for key, value in map(override, overrides):
            if key.startswith("grid."):
                grids = _grids([grid | {key[5:]: value} for grid in grids])
            elif key.startswith("tune."):
                raw = _merge(raw, {"tune": {key[5:]: value}})
            else:
                fixed |= _dotted({key: value})
        shared = [rule for file in _files(raw) for rule in _rules_of(path.parent / file)]
        own = check_rules("when", raw.pop("when", None) or [])
        beside = {key: raw.pop(key, None) for key in ("name", "study", "tune")}
        _check_keys(raw)
        name = path.stem if beside["name"] is None else beside["name"]
        if not isinstance(name, str) or _slug(name) != name or not name.strip("."):
            raise RequestError(f"name: letters, digits and . _ = , - only, got {name!r}")
        study, tune = beside["study"], beside["tune"]
        if not isinstance(study, str | None):
            raise RequestError(f"study: expected a str, got {study!r}")
        if tune is not None and not is_settings(tune):
            raise RequestError(f"tune: expected a dict of keys and values, got {tune!r}")
        folder = path.resolve().parent
        axes = [_axes(grid, fixed) for grid in grids]
        runs, used = _spell_out(name, folder, raw, axes, [*shared, *own], fixed)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    varied = dict.fromkeys(
        key for grid in axes for options in grid for option in options for key in option
    )
    return Experiment(
        name=name,
        folder=folder,
        varied=list(varied),
        runs=runs,
        study=study,
        tune=tune,
        notes=[
            one_line(f"when: {rule['match']} matches no run")
            for at, rule in enumerate(own, len(shared))
            if whole and at not in used
        ],
    )


def check_rules(key: str, rules: Any) -> list[dict[str, Any]]:
    """Return a list of {match, set} rules, each with an optional `note`, as it was given.

    Raises:
        RequestError: it is something else.
    """
    for rule in rules if isinstance(rules, list) else [rules]:
        good = isinstance(rule, dict) and {"match", "set"} <= set(rule) <= {"match", "set", "note"}
        if not isinstance(rules, list) or not (
            good and is_settings(rule["match"]) and is_settings(rule["set"])
        ):
            raise RequestError(
                f"{key}: expected a list of {{match: {{dotted key: value}}, "
                f"set: {{dotted key: value}}}}, got {rule!r}"
            )
    return rules


def matches(run: Run, rule: Mapping[str, Any]) -> bool:
    """Whether a run has every value that a rule's `match` names."""
    return all(get(run, key) == value for key, value in _dotted(rule["match"]).items())


def with_settings(run: Run, dotted: Mapping[str, Any]) -> Run:
    """Return a run with some settings, named by dotted keys, replaced.

    Raises:
        RequestError: a key is unknown, or a value is not valid.
    """
    settings = run.model_dump(mode="json")
    _apply(settings, dotted)
    return make_run(settings)


def _check_keys(settings: Mapping[str, Any]) -> None:
    """Check the names at the top of a file, of which what is beside a run has been taken."""
    for key in settings:
        section, _, inner = key.partition(".")
        if inner and key in dotted_keys():
            raise RequestError(f"{key}: write it as `{section}: {{{inner}: ...}}`")
        if key not in Run.model_fields:
            raise unknown_key(key, {*dotted_keys(), *_BESIDE_A_RUN} - {key})


def _lay_preset_over(raw: dict[str, Any], preset: str | None) -> dict[str, Any]:
    presets = raw.pop("presets", None) or {}
    if not is_settings(presets) or not all(is_settings(each) for each in presets.values()):
        raise RequestError("presets: expected `name: {key: value}`")
    if not presets and preset is None:
        return raw
    chosen = next(iter(presets)) if preset is None else preset
    if chosen not in presets:
        raise unknown("--preset", chosen, presets)
    over = presets[chosen]
    rules = {
        key: _list(raw, key) + _list(over, key)
        for key in ("rules", "when")
        if key in raw or key in over
    }
    return _merge(raw, over) | rules


def _list(settings: dict[str, Any], key: str) -> list[Any]:
    value = settings.get(key) or []
    if not isinstance(value, list):
        raise RequestError(f"{key}: expected a list, got {value!r}")
    return value


def _merge(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return below | {
        key: _merge(below[key], value)
        if key != "grid" and isinstance(value, dict) and isinstance(below.get(key), dict)
        else value
        for key, value in over.items()
    }


def _files(raw: dict[str, Any]) -> list[str]:
    files = _list(raw, "rules")
    raw.pop("rules", None)
    if not all(isinstance(file, str) for file in files):
        raise RequestError(f"rules: expected a list of files, got {files!r}")
    return files


def _rules_of(path: Path) -> list[dict[str, Any]]:
    content = read_settings(path)
    return check_rules(f"{path}: when", content.get("when"))


def _grids(given: Any) -> list[dict[str, list[Any]]]:
    grids = given if isinstance(given, list) and given else [given or {}]
    for grid in grids:
        if not is_settings(grid):
            raise RequestError(f"grid: expected `dotted.key: [values]`, got {grid!r}")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise RequestError(f"grid: {key}: expected a list of values, got {values!r}")
    return grids


def _axes(grid: Mapping[str, list[Any]], fixed: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Return each axis of a grid as the settings of its values, but for those that are fixed."""
    axes: list[list[dict[str, Any]]] = []
    keys: set[str] = set()
    for key, values in grid.items():
        options = [_dotted({key: value}) for value in values]
        left = [
            {name: value for name, value in option.items() if not _met(name, fixed)}
            for option in options
        ]
        if left != options:  # what is fixed told them apart
            left = [option for at, option in enumerate(left) if option not in left[:at]]
        here = {name for option in left for name in option}
        for name in sorted(here):
            if _met(name, keys) or any(_met(each, [name]) for each in keys):
                raise RequestError(f"grid: {name} is on two axes")
        keys |= here
        axes.append(left)
    return axes


def _met(key: str, others: Iterable[str]) -> bool:
    """Whether a dotted key is one of others, or inside one."""
    return any(key == each or key.startswith(f"{each}.") for each in others)


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key: a section's mapping stands for the keys that it names."""
    dotted: dict[str, Any] = {}
    for key, value in settings.items():
        section = isinstance(value, dict) and any(
            each.startswith(f"{key}.") for each in dotted_keys()
        )
        dotted |= (
            {f"{key}.{inner}": each for inner, each in value.items()} if section else {key: value}
        )
    return dotted


def _spell_out(
    name: str,
    folder: Path,
    raw: dict[str, Any],
    grids: list[list[list[dict[str, Any]]]],
    rules: list[dict[str, Any]],
    fixed: dict[str, Any],
) -> tuple[dict[str, Run], set[int]]:
    """Return the runs by label, and the places of the rules that matched one."""
    runs: dict[str, Run] = {}
    used: set[int] = set()
    for axes in grids:
        labels = set()
        for combination in itertools.product(*axes):
            arm = dict(itertools.chain(*(option.items() for option in combination)))
            settings = deepcopy(raw)
            _apply(settings, arm | fixed)
            run = make_run(settings)
            chosen = {key: get(run, key) for key in arm}
            for at, rule in enumerate(rules):
                if matches(run, rule):
                    used.add(at)
                    _apply(settings, _dotted(rule["set"]) | fixed)
                    run = make_run(settings)
            label = _label(arm) or name
            for key, value in chosen.items():
                if get(run, key) != value:
                    raise RequestError(
                        f"grid: {key}: a rule changes what the grid varies ({label})"
                    )
            run = with_weights_beside(run, folder)
            # Grids may meet where --set has fixed what told them apart; a grid's own runs differ.
            if label in labels or runs.setdefault(label, run) != run:
                raise RequestError(f"grid: two runs are both {label}")
            labels.add(label)
    return runs, used


def _label(arm: Mapping[str, Any]) -> str:
    """Name a run, and its folder, by the settings that vary; file systems bound the length."""
    label = ",".join(f"{key}={_slug(str(value))}" for key, value in arm.items())
    encoded = label.encode()
    if len(encoded) <= LONGEST:
        return label
    return f"{encoded[:LONGEST].decode(errors='ignore')}-{crc32(encoded):08x}"


def with_weights_beside(run: Run, folder: Path) -> Run:
    """Let a relative path to weights mean: beside the experiment file."""
    if not Path(run.initialization).suffix:
        return run
    return run.model_copy(update={"initialization": str(folder / run.initialization)})


def _apply(settings: dict[str, Any], dotted: Mapping[str, Any]) -> None:
    for key, value in _dotted(dotted).items():
        *sections, last = key.split(".")
        if sections and not is_argument(key) and key not in dotted_keys():
            raise unknown_key(key, dotted_keys())
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RequestError(f"{key}: {section} holds {inner!r}, not a mapping")
        inner[last] = deepcopy(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=,-]+", "_", text)
