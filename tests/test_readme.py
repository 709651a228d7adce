"""What the README shows is run as it stands."""

import json
import re
from pathlib import Path

import pytest

from fedinit.config import make_run
from fedinit.experiment_file import parse_value

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
YAML = [text for language, text in BLOCKS if language == "yaml"]


def test_the_settings_shown_are_the_defaults():
    """The first block spells out every key of a run, with the default where it has one."""
    shown = parse_value(YAML[0])
    defaults = make_run({"dataset": "x", "model": "y"}).model_dump(mode="json")
    chosen = {"dataset", "model", "partition", "initialization"}
    free = {"dataset_args", "model_args", "loss", "loss_args", "strategy_args"}
    assert set(shown) == set(defaults) - free
    for key in set(shown) - chosen:
        assert shown[key] == defaults[key], key
    make_run(shown)


@pytest.mark.slow
def test_the_users_own_study(fedinit, ray_started, tmp_path):
    (tmp_path / "mylab.py").write_text(PYTHON[0])
    (tmp_path / "study.yaml").write_text(
        next(text for text in YAML if text.startswith("name: study"))
    )
    result = fedinit("run", tmp_path / "study.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["runs"]] == ["done"] * 3
    assert all(row["final_test_accuracy"] > 0.6 for row in summary["runs"])


def test_the_commands_are_ours(fedinit):
    """Every subcommand that the README names exists, and its help says what it does."""
    named = set(re.findall(r"fedinit (run|tune|report|list)\b", README))
    assert named == {"run", "tune", "report", "list"}
    for command in named:
        shown = fedinit(command, "--help")
        assert shown.exit_code == 0
        assert "Usage" in shown.output
        assert "\\" not in shown.output  # [required], and not \[required]
    listed = fedinit("list")
    assert listed.exit_code == 0
    for name in ("fashion-mnist", "charrnn", "mimelite", "yogi", "dirichlet", "quickstart"):
        assert name in listed.output
    assert "skewed" in listed.output  # which bench times
