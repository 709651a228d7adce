"""Files that would run code or claim what they do not hold are refused; text is only ever text."""

import csv
import io
import json
import pickle
import resource
import struct
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save

from experiments.progress import Progress
from fedinit.checkpoints import DamagedError, decode, encode
from fedinit.data.cifar10 import cifar10
from fedinit.errors import RequestError
from fedinit.experiment_file import load_experiment, parse_value
from fedinit.initialization import read_weights
from fedinit.report import write_report
from fedinit.results import RunFolder, read_summary, summarize

ATTACK = "<script>alert(1)</script>"
FORMULA = '=HYPERLINK("http://nowhere","x")'
ENOUGH = 200 << 20  # bytes that a refusal may take, far below what the files claim


class Touch:
    """What a pickle makes of it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def untouched(tmp_path):
    """A path that nothing in a test may create."""
    yield tmp_path / "was-run"
    assert not (tmp_path / "was-run").exists()


def test_pickles_that_would_run_code_are_refused_unread(untouched, tmp_path):
    torch.save({"w": Touch(untouched)}, tmp_path / "zip.pt")
    torch.save({"w": Touch(untouched)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Touch(untouched)))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Touch(untouched)))
    for name in ("zip.pt", "old.pt", "plain.pt", "named.safetensors"):
        with pytest.raises(RequestError, match="not readable weights"):
            read_weights(tmp_path / name)
    with pytest.raises(DamagedError):
        decode(tmp_path / "named.safetensors")


def test_cifars_own_pickles_hold_arrays_or_are_refused_unread(untouched, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": Touch(untouched), b"labels": [0]}))
    with pytest.raises(RequestError, match="it names"):
        cifar10(data_dir=str(folder))


def test_yaml_that_would_run_code_is_refused_unread(untouched):
    with pytest.raises(RequestError, match="not a YAML value"):
        parse_value(f"!!python/object/apply:pathlib.Path.touch [{untouched}]")


def header(claimed: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", claimed) + text


def tensor_header(elements: int) -> bytes:
    about = {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}
    text = json.dumps({"w": about}).encode()
    return header(len(text), text) + bytes(16)


def packed(path: Path) -> None:
    """A checkpoint of torch's whose 64 MB of zeros are packed into a hundredth."""
    plain = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 24)}, plain)
    with (
        zipfile.ZipFile(plain) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for each in archive.infolist():
            small.writestr(each.filename, archive.read(each))


CLAIMS = {
    "a header of 2^63 bytes": header(1 << 63),
    "a header of 2^40 bytes": header(1 << 40),
    "a header of 99 MB": header(99_000_000),
    "a tensor of 2^42 bytes": tensor_header(1 << 40),
    "a tensor of 2^66 bytes": tensor_header(1 << 64),
    "nested brackets": header(100_000, b"[" * 100_000),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_sizes_in_headers_are_checked_before_memory_is_taken(claim, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(CLAIMS[claim])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match="not readable weights"):
        read_weights(path)
    with pytest.raises(DamagedError):
        decode(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < ENOUGH


def test_packed_checkpoints_are_refused(tmp_path):
    packed(tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 1 << 20
    with pytest.raises(RequestError, match="it claims 671"):
        read_weights(tmp_path / "w.pt")


def test_yaml_aliases_of_aliases_are_refused(tmp_path):
    """Nine levels of ten aliases each stand for a thousand million values."""
    file = tmp_path / "laughs.yaml"
    file.write_text(
        "a0: &a0 [x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    )
    with pytest.raises(RequestError, match="stands for over 1000000 values"):
        load_experiment(file)


def test_a_checkpoint_with_a_record_of_another_is_refused(tmp_path):
    """Record and checksum are of the file's own tensors, or it is no checkpoint."""
    path = tmp_path / "mixed.safetensors"
    path.write_bytes(encode({"x": torch.ones(3)}))
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        metadata = json.loads(file.read(size))["__metadata__"]
    path.write_bytes(save({"x": torch.zeros(3)}, metadata))
    with pytest.raises(DamagedError, match="checksum"):
        decode(path)
    path.write_bytes(save({"x": torch.zeros(3)}))
    with pytest.raises(DamagedError):
        decode(path)


class Tags(HTMLParser):
    """The tags of a page, and the attributes that would run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A results folder in which every text that a user or a data set gives is an attack."""
    file = tmp_path / "study.yaml"
    names = [ATTACK, f'"><img src=x onerror={ATTACK}>', "]]>&lt;\x1b[2J\u202e", FORMULA]
    settings = {
        "model": '"><svg onload=alert(1)>',
        "strategy": ATTACK,
        "dataset_args": {"of": ATTACK},
        "grid": {"dataset": names},
    }
    file.write_text(json.dumps(settings))
    experiment = load_experiment(file)
    folder = tmp_path / "out"
    initialization = {"source": ATTACK, "loaded": [], "fresh": [ATTACK], "unused": [ATTACK] * 9}
    for number, (label, run) in enumerate(experiment.runs.items()):
        at = RunFolder(folder / label)
        at.begin(run, initialization)
        at.append({"round": 0, "test_loss": 1.0, "test_accuracy": 0.5, "wall_seconds": 1.0})
        if number == 0:
            at.fail(FORMULA)
        elif number == 1:
            at.diverge(0, f"client 3 '{ATTACK}' is not finite in round 0")
        else:
            at.finish({"w": torch.zeros(1)})
    summarize(folder, experiment)
    return folder


def test_no_text_becomes_a_part_of_the_page(hostile):
    page = write_report(hostile).read_text(encoding="utf-8")
    found = Tags()
    found.feed(page)
    assert not found.tags & {"script", "img", "iframe", "object"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert ATTACK not in page
    assert page.count("&lt;script&gt;") > 10
    paths = list((hostile / "figures").glob("*.svg"))
    assert paths
    for path in paths:
        drawn = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314 - our own
        assert not [each for each in drawn.iter() if each.tag.endswith(("script", "img"))]


def test_no_cell_of_a_table_is_a_formula(hostile):
    write_report(hostile)
    tables = [hostile / "summary.csv", *(hostile / "figures").glob("*.csv")]
    assert len(tables) > 1
    for path in tables:
        with path.open(encoding="utf-8", newline="") as text:
            cells = [cell for row in csv.reader(text) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "-"))]
        assert f"'{FORMULA}" in cells


def test_no_text_is_markup_on_the_console(hostile):
    console = Console(file=io.StringIO(), width=400)
    Progress(console, 1).ended("[bold]label[/]", "failed", f"[link=x]{ATTACK}[/link]")
    written = console.file.getvalue()
    assert written == f"failed [bold]label[/]: [link=x]{ATTACK}[/link]\n"


def test_an_error_is_one_line_that_moves_no_cursor(fedinit, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text('{dataset: "a\\n\\x1b[2Jb\\u2028\\ud800", model: cnn}')
    result = fedinit("run", file)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.rstrip("\n").isprintable()


@pytest.mark.parametrize("summary", ["[]", "{}", '{"varied": [], "runs": [{}], "name": 1}', "\x00"])
def test_a_summary_that_is_none_is_refused_in_one_line(summary, fedinit, tmp_path):
    (tmp_path / "summary.json").write_text(summary)
    result = fedinit("report", tmp_path)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_lines_that_are_no_rounds_are_named(hostile, fedinit):
    label = read_summary(hostile)["runs"][0]["run"]
    path = hostile / label / "rounds.jsonl"
    for damage in (b"[]\n", b"\xff\xfe\n", b'{"round": "0"}\n', np.arange(9).tobytes() + b"\n"):
        path.write_bytes(b'{"round": 0, "test_loss": 1.0, "wall_seconds": 1}\n' + damage)
        result = fedinit("report", hostile)
        assert result.exit_code == 2
        assert f"{path}, line 2" in result.stderr
