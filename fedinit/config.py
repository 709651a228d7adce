"""A run, fully specified and validated."""

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from fedinit.errors import RequestError, one_line, unknown

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _plain(value: Any) -> Any:
    """Check that a user's arguments are what run.yaml can say again."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    elif value is None or isinstance(value, bool | int | float | str | date):
        return value
    else:
        raise ValueError(f"expected numbers, text, lists and mappings, found {value!r}")
    try:
        for each in inner:
            _plain(each)
    except RecursionError:  # a YAML alias to what holds it
        raise ValueError("nested too deeply") from None
    return value


Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]


class Strict(BaseModel):
    """Settings: unknown keys and values of another type are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Partition(Strict):
    """How rows are dealt to clients: dirichlet reads `alpha`, iid and dirichlet `clients`."""

    kind: Literal["iid", "dirichlet", "natural"] = "natural"
    alpha: PositiveFloat = 0.1
    clients: PositiveInt = 100


class Client(Strict):
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


class Server(Strict):
    """The server optimizer; each reads the settings that it knows and no other."""

    optimizer: str = "sgd"
    lr: PositiveFloat = 1.0
    momentum: Decay = 0.9
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.99)
    eps: PositiveFloat = 1e-3
    initial_accumulator: NonNegativeFloat = 0.0


class Stragglers(Strict):
    """Each round a client does E ~ U{epochs[0]..epochs[1]} local epochs with this probability."""

    fraction: Fraction = 0.0
    epochs: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (1, 5)


class Measure(Strict):
    """Measurements that cost more than a round's own: only where they are asked for.

    Attributes:
        hessian: number of examples, a fixed sample of the training rows, over which the top Hessian
            eigenvalues of the initialization are measured; 0: they are not.
        distance: whether to keep x at evaluated rounds and measure its distance to the final x.
    """

    hessian: NonNegativeInt = 0
    distance: bool = False


class Proxy(Strict):
    """Supervised pre-training of a run's model, by SGD on rows of another data set, shuffled.

    Attributes:
        dataset, dataset_args: the proxy data; needed with `initialization: proxy`.
        max_examples: at most so many of its rows, drawn by the seed.
        schedule: of the rate over all steps: `cosine` goes down to zero.
        seed: of the weights to begin with, and of the shuffles; the same for every run's seed.
    """

    dataset: str | None = None
    dataset_args: Arguments = {}
    max_examples: PositiveInt | None = None
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 0.05
    momentum: Decay = 0.9
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: PositiveFloat | None = None
    seed: NonNegativeInt = 0


class Run(Strict):
    """One run, fully specified. Names are resolved, and sizes checked, before any work starts."""

    dataset: str
    dataset_args: Arguments = {}
    partition: Partition = Partition()
    model: str
    model_args: Arguments = {}
    loss: str = "cross-entropy"
    loss_args: Arguments = {}
    initialization: str = "random"
    proxy: Proxy = Proxy()
    normalization: Literal["loaded", "fresh"] = "loaded"
    trainable: Literal["all", "head"] = "all"
    strategy: str = "fedopt"
    strategy_args: Arguments = {}
    reduce: Literal["auto", "worker", "client"] = "auto"
    client: Client = Client()
    server: Server = Server()
    stragglers: Stragglers = Stragglers()
    rounds: NonNegativeInt = 100
    cohort: PositiveInt = 10
    seed: NonNegativeInt = 0
    evaluate_every: PositiveInt = 5
    target_accuracy: Fraction | None = None
    validation: Decay = 0.0
    measure: Measure = Measure()
    checkpoint_every: PositiveInt = 10
    on_client_error: Literal["abort", "skip"] = "abort"
    workers: PositiveInt | Literal["auto"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    together: PositiveInt | Literal["auto"] = "auto"

    @property
    def trains_own_code(self) -> bool:
        """Whether a client's steps go through the user's code: a model or a loss of their own."""
        return ":" in self.model or ":" in self.loss


# How a run is carried out, not what it is: --resume may change these.
CARRYING_OUT = ("checkpoint_every", "workers")
_FREE_FORM = ("dataset_args", "model_args", "loss_args", "strategy_args", "proxy.dataset_args")


def make_run(settings: Mapping[str, Any]) -> Run:
    """Validate nested settings into a `Run`.

    Raises:
        RequestError: a key is unknown (the nearest is suggested), missing, or of the wrong type.
    """
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise explain(error, dotted_keys()) from None


def get(run: Run, key: str) -> Any:
    """Return the setting that a dotted key names; lists for tuples, as a file would say it.

    Raises:
        RequestError: there is no such key.
    """
    value: Any = run.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if is_argument(key):
                return None
            raise unknown_key(key, dotted_keys())
        value = value[part]
    return value


def is_argument(key: str) -> bool:
    """Whether a dotted key names an argument, whose name is the user's own."""
    return key.startswith(tuple(f"{each}." for each in _FREE_FORM))


def difference(earlier: Run, now: Run) -> str | None:
    """Say the first setting, by its dotted key, in which two runs are not the same run."""
    for key in dotted_keys():
        if key not in CARRYING_OUT and (before := get(earlier, key)) != (after := get(now, key)):
            return f"{key} was {before!r}, now {after!r}"
    return None


def to_yaml(run: Run) -> str:
    """Return the run as YAML, every setting spelled out."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def dotted_keys() -> list[str]:
    """Return every key of a run, those of its sections dotted."""
    keys = []
    for name, field in Run.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        keys.append(name)
    return keys


def unknown_key(key: str, known: Iterable[str]) -> RequestError:
    """Build the error for a key that is not there: the nearest of all, and those of its section."""
    known, section = list(known), key.rpartition(".")[0]
    beside = [each for each in known if each.rpartition(".")[0] == section]
    return unknown("key", key, known, beside or [each for each in known if "." not in each])


def explain(error: ValidationError, known: Iterable[str], section: str = "") -> RequestError:
    """Return the request's error that is the first of a validation's: one line, with the key.

    Args:
        error: what pydantic found.
        known: the keys that there are.
        section: the key above the validated settings, if they are not a whole run's.
    """
    first = error.errors()[0]
    above = f"{section}." if section else ""
    known = [above + each for each in known]
    key = above + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(key, known)
    *place, last = first["loc"] or ("",)
    if first["type"] == "missing" and isinstance(last, str):
        return RequestError(f"{key}: required key is missing")
    reasons = ["a value is missing" if first["type"] == "missing" else first["msg"]]
    if key not in known and isinstance(last, str) and first["type"] != "invalid_key":
        reasons += [  # `last` is one of the key's types; the errors of the others follow
            each["msg"].removeprefix("Input should be ")
            for each in error.errors()[1:]
            if [*each["loc"][:-1]] == place
        ]
    while key not in known and "." in key:  # a type's name, or a place in a list
        key = key.rpartition(".")[0]
    one = first["type"] in ("int_type", "float_type", "string_type", "bool_type")
    listed = one and not section and isinstance(first["input"], list)
    several = f"; several values: grid: {{{key}: [...]}}" if listed else ""
    expected = one_line(" or ".join(reasons))
    return RequestError(f"{key}: {expected}, got {first['input']!r}{several}")
