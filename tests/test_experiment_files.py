"""Every mutation of a valid experiment file either runs or ends in one line and exit status 2."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.cli import app
from experiments.unread import notes
from fedinit.errors import RequestError
from fedinit.experiment_file import load_experiment

VALID = {
    "name": "mutated",
    "study": "convergence",
    "dataset": "plugged_in:quadratics",
    "dataset_args": {"curvature": [[1.0], [2.0]], "optimum": [[0.0], [1.0]], "examples": [1, 2]},
    "partition": {"kind": "natural"},
    "model": "plugged_in:Point",
    "model_args": {"size": 1},
    "loss": "plugged_in:half_squared_error",
    "loss_args": {},
    "initialization": "random",
    "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 2, "shuffle": True},
    "server": {"optimizer": "sgd", "lr": 1.0, "betas": [0.9, 0.99]},
    "stragglers": {"fraction": 0.5, "epochs": [1, 2]},
    "strategy": "fedopt",
    "strategy_args": {},
    "measure": {"hessian": 0, "distance": False},
    "rounds": 1,
    "cohort": 2,
    "seed": 0,
    "checkpoint_every": 3,
    "on_client_error": "skip",
    "target_accuracy": 0.5,
    "validation": 0.0,
    "workers": 1,
    "memory_format": "contiguous",
    "grid": {"server.optimizer": ["sgd", "adam"], "seed": [0, 1]},
    "when": [{"match": {"server.optimizer": "adam"}, "set": {"server.lr": 0.1}}],
    "presets": {"one": {"rounds": 2}, "two": {"grid": {"seed": [3]}}},
    "tune": {"trials": 2, "search": [{"match": {}, "set": {"client.lr": [0.1]}}]},
}
# Whose values are a user's own function's to read: a huge number there is a huge model.
OWN = ("dataset_args", "model_args")

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "a" * 300,
            "../up",
            "x.safetensors",
            "x.pt",
            "plugged_in:nothing",
            "os:sep",
            ":",
            "a:",
        ]
    ),
    st.dates(),
    st.binary(max_size=4),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.integers(-2, 2) | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Every place in nested settings."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def bounded(value: object) -> bool:
    """Whether no number in a value asks for much memory."""
    if isinstance(value, dict | list):
        return all(map(bounded, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) < 100


@st.composite
def mutated(draw) -> str:
    """The valid file with one to three of its places changed, deleted or added to."""
    content = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(content)))
        node = content
        for key in above:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "delete", "add", "rename"]))
        value = draw(JUNK.filter(bounded) if {*above, last} & {*OWN} else JUNK)
        if kind == "delete":
            del node[last]
        elif kind == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=6))] = value
        elif kind == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from([f"{last}x", f"{last}.lr", str(last).upper()]))] = node.pop(
                last
            )
        else:
            node[last] = value
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


@st.composite
def garbled(draw) -> str:
    """The valid file's text with a piece cut out, doubled, or replaced by anything."""
    text = yaml.safe_dump(VALID, sort_keys=False)
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    last = min(last, first + 40)
    middle = draw(
        st.sampled_from(["", text[first:last] * 2, "\t", "&a [*a]", "!!python/object:os.system x"])
        | st.text(max_size=10)
    )
    return text[:first] + middle + text[last:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copy(Path(__file__).parent / "plugged_in.py", folder)
    return folder


def judge(folder: Path, text: str, *arguments: str) -> str:
    """Call `fedinit run` on a file up to where Ray would start; return what it says on stderr."""

    def here(*_args, **_named):
        raise RequestError("everything is right")

    file, out = folder / "experiment.yaml", folder / "out"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.running.Workers", here)
        result = CliRunner().invoke(app, ["run", str(file), "--out", str(out), *arguments])
    told = f"{result.exception!r} of {text[:2000]!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code == (0 if "--dry-run" in arguments and not result.stderr else 2), told
    assert len(result.stderr.splitlines()) <= 1, result.stderr
    assert not out.exists()
    return result.stderr


FREELY = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_the_file_is_valid(folder):
    assert judge(folder, yaml.safe_dump(VALID)) == "fedinit: everything is right\n"


@FREELY
@given(text=mutated())
@example(text='"\\x1e": 1')  # a separator that ends a line
@example(text="{dataset: x, model: y, tune: {0: 1}}")
def test_mutations_end_in_one_line(text, folder):
    assert judge(folder, text).startswith("fedinit: ")


@FREELY
@given(text=mutated())
def test_mutations_are_listed_or_end_in_one_line(text, folder):
    judge(folder, text, "--dry-run")


@FREELY
@given(text=garbled())
@example(text="")
@example(text="\x00")
@example(text="\ud800")
@example(text="a: &a [*a]")
@example(text="[" * 5000)
@example(text="{a: " * 5000)
@example(text="seed: " + "9" * 5000)
@example(text="? {a: b}\n: c")
@example(text="<<: [1]")
@example(text="!!python/object/apply:os.abort []")
@example(text="a: &x {b: 1}\n" + "".join(f"c{n}: *x\n" for n in range(9)))
def test_garbled_text_ends_in_one_line(text, folder):
    assert judge(folder, text).startswith("fedinit: ")


def test_a_rule_of_ones_own_that_matches_no_run_is_told(folder):
    """It may be a misspelt value; one that sets what it matched has matched."""
    rules = [
        {"match": {"server.optimizer": "adm"}, "set": {"server.lr": 0.1}},
        {"match": {"client.lr": 0.1}, "set": {"client.lr": 0.2}},
    ]
    file = folder / "rules.yaml"
    content = {key: value for key, value in VALID.items() if key not in ("presets", "study")}
    file.write_text(yaml.safe_dump(content | {"when": rules, "stragglers": {}}))
    for last in (["--dry-run"], ["--out", str(folder / "rules")]):
        result = CliRunner().invoke(app, ["run", str(file), *last])
        assert result.exit_code == 0, result.output
        (told,) = [line for line in result.stdout.splitlines() if "matches no run" in line]
        assert told == "when: {'server.optimizer': 'adm'} matches no run"
    chosen = ["run", str(file), "--dry-run", "--set", "server.optimizer=sgd"]
    assert "matches no run" not in CliRunner().invoke(app, chosen).stdout


def test_an_overridden_section_takes_its_keys_out_of_the_grid(folder):
    """Runs that are alike would be told apart by what is not so. Arguments may be anywhere."""
    file = folder / "sections.yaml"
    run = {"dataset": "mine:data", "model": "mine:net", "initialization": "proxy"}
    grid = {"client.lr": [0.1, 0.2], "seed": [0, 1]}
    file.write_text(yaml.safe_dump(run | {"grid": grid}))
    settings = ["client={lr: 0.5}", "proxy.dataset_args.clients=3"]
    experiment = load_experiment(file, settings)
    assert experiment.varied == ["seed"]
    assert list(experiment.runs) == ["seed=0", "seed=1"]
    for each in experiment.runs.values():
        assert each.client.lr == 0.5
        assert each.proxy.dataset_args == {"clients": 3}


def test_a_mapping_on_an_axis_stands_for_its_keys(folder):
    """The file's other settings of the section stay, and each key is a column of its own."""
    file = folder / "mappings.yaml"
    methods = [{"optimizer": "proximal", "mu": 0.1}, {"optimizer": "sgd"}]
    run = {"dataset": "mine:data", "model": "mine:net", "client": {"lr": 0.3}}
    file.write_text(yaml.safe_dump(run | {"grid": {"client": methods}}, sort_keys=False))
    experiment = load_experiment(file)
    assert experiment.varied == ["client.optimizer", "client.mu"]
    assert list(experiment.runs) == [
        "client.optimizer=proximal,client.mu=0.1",
        "client.optimizer=sgd",
    ]
    found = [(each.client.lr, each.client.mu) for each in experiment.runs.values()]
    assert found == [(0.3, 0.1), (0.3, 0.0)]
    (only,) = load_experiment(file, ["client.optimizer=nova", "client.mu=0"]).runs.values()
    assert (only.client.optimizer, only.client.mu) == ("nova", 0)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"grid": {"partition.alpha": [0.1, 1.0]}}, ["partition.alpha"]),
        ({"grid": {"server.momentum": [0.1, 0.9], "server.lr": [0.1, 1]}}, ["server.momentum"]),
        ({"grid": {"server.eps": [1, 2], "server.optimizer": ["sgd", "adam"]}}, []),
        (
            {"strategy": "flwr.serverapp.strategy:FedAdam", "grid": {"server.lr": [0.1, 1]}},
            ["server.lr"],
        ),
        ({"grid": {"client.mu": [0.1, 1], "client.optimizer": ["sgd", "gd"]}}, ["client.mu"]),
        ({"client": {"optimizer": "nova"}, "grid": {"client.mu": [0.1, 1]}}, []),
        (
            {
                "client": {"optimizer": "mimelite"},
                "grid": {"client.momentum": [0, 0.9], "client.epochs": [1, 2]},
            },
            ["client.momentum"],
        ),
        ({"grid": {"proxy.lr": [0.1, 1], "normalization": ["loaded", "fresh"]}}, None),
    ],
)
def test_an_axis_that_no_run_reads_is_told(settings, unread, folder):
    file = folder / "axes.yaml"
    file.write_text(yaml.safe_dump({"dataset": "mine:data", "model": "mine:net"} | settings))
    experiment = load_experiment(file)
    keys = list(experiment.varied) if unread is None else unread
    assert notes(experiment) == [f"grid: no run reads {key}: it changes nothing" for key in keys]


def test_the_search_may_be_overridden(folder):
    file = folder / "tune.yaml"
    run = {"dataset": "mine:data", "model": "mine:net", "tune": {"trials": 5, "search": []}}
    file.write_text(yaml.safe_dump(run))
    assert load_experiment(file, ["tune.trials=2"]).tune == {"trials": 2, "search": []}


def test_arguments_are_overridden_and_meet_as_sections_do(folder):
    file = folder / "arguments.yaml"
    run = {"dataset": "mine:data", "model": "mine:net"}
    file.write_text(yaml.safe_dump(run | {"grid": {"dataset_args.alpha": [1, 2]}}))
    (only,) = load_experiment(file, ["dataset_args={alpha: 3}"]).runs.values()
    assert only.dataset_args == {"alpha": 3}
    with pytest.raises(RequestError, match=r"grid: dataset_args is on two axes"):
        load_experiment(file, ["grid.dataset_args=[{beta: 1}]"])


def test_a_name_fits_a_file_system_in_any_script(folder):
    """These have 255 bytes for a name; a character of these takes three."""
    file = folder / "long.yaml"
    values = ["\u6f22" * 120 + end for end in "ab"]
    run = {"dataset": "mine:data", "model": "mine:net"}
    file.write_text(yaml.safe_dump(run | {"grid": {"dataset_args.text": values}}))
    labels = list(load_experiment(file).runs)
    assert len(labels) == 2
    for label in labels:
        (folder / label).mkdir()


def test_a_rule_matches_a_section_by_its_keys(folder):
    file = folder / "sections.yaml"
    rule = {"match": {"client": {"lr": 0.2}}, "set": {"client": {"mu": 1.0}}}
    run = {"dataset": "mine:data", "model": "mine:net", "client": {"optimizer": "proximal"}}
    file.write_text(yaml.safe_dump(run | {"grid": {"client.lr": [0.1, 0.2]}, "when": [rule]}))
    found = [(each.client.lr, each.client.mu) for each in load_experiment(file).runs.values()]
    assert found == [(0.1, 0.0), (0.2, 1.0)]
