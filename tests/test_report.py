"""The report, from real results folders whose rounds hold known numbers."""

import csv
import html
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli import app
from experiments.studies import find
from fedinit.config import Run
from fedinit.drawing import PALETTE
from fedinit.errors import RequestError
from fedinit.experiment_file import load_experiment
from fedinit.report import compare_initializations, console_table, write_report
from fedinit.results import RunFolder, read_summary, summarize
from tests.recorded import ATTACK, Lines, record

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "hide-scrollbars",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)


def results(
    tmp_path: Path,
    grid: str,
    ends: Iterable[float | None],
    measure: str = "test_accuracy",
    name: str = "study",
) -> Path:
    """Write a results folder: each run of the grid ends at its number, or fails where it is None.

    A run's accuracy (or loss, with no accuracy) is half its end in round 0 and its end in round 2.
    """
    remaining = iter(ends)

    def lines(_run: Run) -> Lines | None:
        end = next(remaining)
        if end is None:
            return None
        return [
            {"round": 0, "test_loss": 1.5, "wall_seconds": 0.0, measure: end / 2},
            {"round": 1, "train_loss": 1.0, "gradient_diversity": 2.0},
            {"round": 2, "train_loss": 0.5, "gradient_diversity": 4.0, "test_loss": 1.5}
            | {measure: end},
        ]

    text = f"name: {name}\ndataset: toy\nmodel: tiny\ntarget_accuracy: 0.6\ngrid: {grid}"
    return record(tmp_path, text, lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_random_is_compared_with_pretrained_in_words_and_in_a_table(tmp_path: Path) -> None:
    """sgd: 70 - 50 = +20 points; adam: 65 - 60 = +5; on average +12.5.

    The two methods end 60 - 50 = 10 points apart from random, 70 - 65 = 5 apart from pretrained.
    """
    grid = "{server.optimizer: [sgd, adam], initialization: [random, pretrained]}"
    folder = results(tmp_path, grid, [0.5, 0.7, 0.6, 0.65])
    comparison = compare_initializations(read_summary(folder))
    assert comparison is not None
    assert comparison.title == "Random against pre-trained"
    assert comparison.rows == [
        ["sgd", "50.0%", "70.0%", "+20.0 points"],
        ["adam", "60.0%", "65.0%", "+5.0 points"],
    ]
    assert comparison.paragraphs == [
        "Started from pretrained, the final test accuracy is higher than from random in 2 of 2 "
        "settings. The difference is +12.5 points on average: "
        "from +5.0 points (adam) to +20.0 points (sgd). "
        "The 2 methods end within 10.0 points of each other from random, "
        "and within 5.0 points from pretrained.",
    ]
    page = write_report(folder).read_text(encoding="utf-8")
    assert comparison.paragraphs[0] in page


def test_a_pair_with_a_failed_run_is_not_compared(tmp_path: Path) -> None:
    folder = results(tmp_path, "{initialization: [pretrained, random]}", [None, 0.5])
    comparison = compare_initializations(read_summary(folder))
    assert comparison is not None
    assert comparison.rows == [["50.0%", "–", "–"]]  # noqa: RUF001
    assert comparison.paragraphs == [
        "No setting has finished both from random and from pretrained yet."
    ]


def test_figures_hold_the_recorded_numbers(tmp_path: Path) -> None:
    folder = results(tmp_path, "{dataset: [a, b]}", [0.5, 0.75])
    write_report(folder)
    accuracy = read_csv(folder / "figures" / "test_accuracy.csv")
    assert [(row["dataset"], row["round"], float(row["test_accuracy"])) for row in accuracy] == [
        ("a", "0", 0.25),
        ("a", "2", 0.5),
        ("b", "0", 0.375),
        ("b", "2", 0.75),
    ]
    train = read_csv(folder / "figures" / "train_loss.csv")
    assert [(row["round"], float(row["train_loss"])) for row in train[:2]] == [("1", 1), ("2", 0.5)]
    drawn = {path.name for path in (folder / "figures").glob("*.svg")}
    assert drawn == {"test_accuracy.svg", "train_loss.svg", "gradient_diversity.svg"}


def test_seeds_are_averaged(tmp_path: Path) -> None:
    """0.4, 0.5, 0.6: mean 0.5, deviation sqrt((0.01 + 0 + 0.01) / 2) = 0.1; halved in round 0."""
    folder = results(tmp_path, "{seed: [0, 1, 2]}", [0.4, 0.5, 0.6])
    page = write_report(folder).read_text(encoding="utf-8")
    start, end = read_csv(folder / "figures" / "test_accuracy.csv")
    assert float(start["test_accuracy"]) == pytest.approx(0.25)
    assert float(start["standard_deviation"]) == pytest.approx(0.05)
    assert float(end["test_accuracy"]) == pytest.approx(0.5)
    assert float(end["standard_deviation"]) == pytest.approx(0.1)
    assert end["seeds"] == "3"
    assert "the band is one standard deviation" in page


def test_loss_stands_in_for_a_missing_accuracy(tmp_path: Path) -> None:
    grid = "{initialization: [random, pretrained]}"
    folder = results(tmp_path, grid, [2.0, 0.5], measure="test_loss")
    comparison = compare_initializations(read_summary(folder))
    assert comparison is not None
    assert comparison.paragraphs == [
        "Started from pretrained, the final test loss is 0.500; "
        "from random it is 2.00: a difference of \N{MINUS SIGN}1.50."
    ]
    write_report(folder)
    assert (folder / "figures" / "test_loss.svg").exists()
    assert not (folder / "figures" / "test_accuracy.svg").exists()


def test_what_a_user_wrote_is_escaped(tmp_path: Path) -> None:
    """A setting reaches the page as a panel's title, in tables, run.yaml and alternative text."""
    grid = f"{{dataset: ['{ATTACK}', '\" onload=\"x'], dataset_args: [{{k: '{ATTACK}'}}]}}"
    folder = results(tmp_path, grid, [0.5, 0.6])
    summary = read_summary(folder)
    summary["name"] = ATTACK
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(ATTACK) in page
    figures = list((folder / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        root = ElementTree.fromstring(figure.read_text(encoding="utf-8"))  # noqa: S314
        assert not [element for element in root.iter() if element.tag.endswith("script")]
        assert "onload" not in root.attrib


def test_the_page_needs_no_network_and_its_figures_share_no_id(tmp_path: Path) -> None:
    folder = results(tmp_path, "{initialization: [random, pretrained]}", [0.5, 0.7])
    page = write_report(folder).read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//[^"')]*""", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert used
    assert set(used) <= set(ids)
    assert page.count('<svg role="img" aria-label="') == 3
    assert "Last values: random 50.0% at round 2; pretrained 70.0% at round 2." in page


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    folder = results(tmp_path, "{seed: [0, 1]}", [0.5, 0.7])
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_runs_that_failed_or_have_not_begun_are_shown(tmp_path: Path) -> None:
    folder = results(tmp_path, "{seed: [0, 1]}", [None, None])
    (folder / "seed=1" / "error.txt").unlink()
    experiment = load_experiment(tmp_path / "study.yaml")
    summarize(folder, experiment)
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"<pre>RuntimeError: {html.escape(ATTACK)}</pre>" in page
    assert "This run has not begun." in page
    assert "No round has been recorded yet." in page
    assert list((folder / "figures").iterdir()) == []


def test_a_run_section_holds_its_settings_and_what_was_loaded(tmp_path: Path) -> None:
    page = write_report(results(tmp_path, "{seed: [7]}", [0.5])).read_text(encoding="utf-8")
    assert "seed: 7" in page
    assert "<dt>loaded</dt><dd>2</dd>" in page
    assert re.search(r"<dt>fresh</dt><dd>\s*1: <code>head.weight</code>", page)
    assert re.search(r"<dt>unused</dt><dd>\s*1: <code>classifier.weight</code>", page)


def test_more_methods_than_colours_become_panels(tmp_path: Path) -> None:
    grid = "{client.optimizer: [a, b, c, d], server.optimizer: [e, f]}"
    folder = results(tmp_path, grid, [0.5] * 8)
    write_report(folder)
    svg = (folder / "figures" / "test_accuracy.svg").read_text(encoding="utf-8")
    assert "server.optimizer = e</text>" in svg
    assert "server.optimizer = f</text>" in svg


@pytest.mark.parametrize("methods", [1, 2])
def test_colours_tell_methods_or_where_there_is_one_initializations(methods, tmp_path: Path):
    """Of one method each initialization has its colour; of two, each method."""
    grid = f"{{server.lr: {[0.1, 0.2][:methods]}, initialization: [random, pretrained, proxy]}}"
    folder = results(tmp_path, grid, [0.5] * 3 * methods)
    write_report(folder)
    svg = (folder / "figures" / "test_accuracy.svg").read_text(encoding="utf-8").upper()
    assert [colour in svg for colour in PALETTE] == [
        index < (3 if methods == 1 else 2) for index in range(len(PALETTE))
    ]


def test_the_console_table_fits_100_columns(tmp_path: Path) -> None:
    grid = (
        "{dataset: [fashion-mnist], client.optimizer: [proximal], server.optimizer: [adam], "
        "initialization: [random, pretrained]}"
    )
    summary = read_summary(results(tmp_path, grid, [0.7, None]))
    console = Console(width=100, record=True)
    console.print(console_table(summary))
    printed = console.export_text().splitlines()
    rows = [" ".join(line.split()) for line in printed if line.startswith("fashion-mnist")]
    assert rows[0] == "fashion-mnist proximal adam random done 70.0% 70.0% 2 3.0"
    assert rows[1].startswith("fashion-mnist proximal adam pretrained failed")


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no results here"):
        write_report(tmp_path)


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
@pytest.mark.parametrize("study", [None, "ranking", "hessian"])
def test_a_page_in_a_real_browser(tmp_path: Path, study: str | None) -> None:
    """At 390 pixels the page scrolls in one direction only, though its tables and YAML are wider.

    Every figure is drawn within the page, every study's table is there, and the console is silent.
    """
    long = "a-very-long-name-without-a-break" * 3
    grid = f"{{client.optimizer: [sgd, {long}], initialization: [random, pretrained]}}"
    folder = results(tmp_path, grid, [0.5, 0.7, 0.4, None if study is None else 0.6])
    summary = read_summary(folder) | {"study": study}
    page = write_report(folder, find(folder, summary)).read_text(encoding="utf-8")
    page = page.replace("<details>", "<details open>")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<iframe style="width:390px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        "<p></p><script>onload = () => {"
        "const root = document.querySelector('iframe').contentDocument;"
        "const width = selector => root.querySelector(selector).scrollWidth;"
        "const drawn = [...root.querySelectorAll('figure svg')];"
        "const boxes = drawn.map(each => each.getBoundingClientRect());"
        "const seen = boxes.filter(b => b.width > 200 && b.height > 100 && b.right <= 390);"
        "document.querySelector('p').textContent ="
        "`page ${width('html')}, table ${width('.scroll')}, ${seen.length} of ${boxes.length}`;"
        "}</script>",
        encoding="utf-8",
    )
    options = [f"--{option}" for option in (*CHROMIUM_OPTIONS, "enable-logging=stderr")]
    profile = tmp_path / "profile"
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = re.search(r"<p>page (\d+), table (\d+), (\d+) of (\d+)</p>", done.stdout)
    assert measured, done.stdout[-500:]
    assert int(measured[1]) == 390
    assert int(measured[2]) > 390
    assert measured[3] == measured[4]
    assert int(measured[4]) == (4 if study == "ranking" else 3)
    assert ("largest eigenvalue" in done.stdout) == (study == "hessian")
    assert "CONSOLE" not in done.stderr


def test_a_line_cut_off_by_a_crash_is_not_a_round(tmp_path: Path) -> None:
    folder = results(tmp_path, "{seed: [0]}", [0.5]) / "seed=0"
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "test_l')
    assert [line["round"] for line in RunFolder(folder).rounds] == [0, 1, 2]


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    out = results(tmp_path, "{seed: [0, 1]}", [0.5, 0.5])
    with (out / "seed=1" / "run.yaml").open("a", encoding="utf-8") as file:
        file.write("foo: 1\n")
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert f"{out / 'seed=1' / 'run.yaml'}: unknown key 'foo'" in line


def test_figures_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    out = results(tmp_path, "{seed: [0]}", [0.5])
    (out / "figures").write_text("no folder")
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert f"cannot write {out / 'figures'}: File exists" in line


def test_a_report_knows_what_a_killed_run_had_done(tmp_path: Path) -> None:
    """The summary is of the beginning; two rounds were recorded since."""
    out = tmp_path / "out"
    (tmp_path / "run.yaml").write_text("{dataset: toy, model: tiny, target_accuracy: 0.5}")
    experiment = load_experiment(tmp_path / "run.yaml")
    ((label, run),) = experiment.runs.items()
    out.mkdir()
    summarize(out, experiment)
    folder = RunFolder(out / label)
    folder.begin(run, {})
    for number, accuracy in enumerate((0.25, 0.75)):
        measured = {"test_loss": 1.0 - accuracy, "test_accuracy": accuracy, "wall_seconds": 2.0}
        folder.append({"round": number, **measured})
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    (row,) = read_summary(out)["runs"]
    assert (row["status"], row["rounds_done"], row["wall_seconds"]) == ("unfinished", 1, 4.0)
    assert (row["initial_test_accuracy"], row["best_test_accuracy"]) == (0.25, 0.75)
    assert (row["final_test_accuracy"], row["rounds_to_target"]) == (None, 1)
    (line,) = csv.DictReader((out / "summary.csv").read_text().splitlines())
    assert line["rounds_done"] == "1"
