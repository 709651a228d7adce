"""A run that is broken off anywhere and taken up again ends as one that never was, bit for bit."""

import json
import os
import re
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load

from experiments.running import execute
from experiments.stopping import Stop, StoppedError
from experiments.wiring import Datasets, simulation
from fedinit.checkpoints import DamagedError, UnsavableError, decode, encode
from fedinit.config import make_run
from fedinit.errors import RequestError
from fedinit.results import DONE, RunFolder
from fedinit.simulation import RayGrid, Workers
from strategies.continuing import state_of

RUN = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:dropout_classifier",
    "client": {"lr": 0.1, "epochs": 2, "batch_size": 8},
    "server": {"optimizer": "adam", "lr": 0.1},
    "cohort": 3,
    "rounds": 5,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "measure": {"distance": True},
    "workers": 2,
}


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it, and nothing is written after it."""


@pytest.fixture(scope="module")
def carry_out(ray_started):
    """Carry out a run into a folder, on workers that are kept; return what was said."""
    here = [str(Path(__file__).parent)]
    datasets = Datasets()
    with pytest.MonkeyPatch.context() as patch, Workers(2, import_path=here) as workers:
        patch.syspath_prepend(here[0])

        def run(
            settings: dict, folder: Path, stop: Stop | None = None, make_app=None, on=workers
        ) -> str:
            prepared = simulation(make_run(settings), datasets)
            layout = prepared.problem.layout
            grid = prepared.grid(on, datasets)
            if make_app is not None:
                grid = RayGrid(on, make_app, prepared.clients, layout)
            said: list[str] = []
            execute(prepared, grid, RunFolder(folder), lambda _: None, said.append, stop)
            return "\n".join(said)

        yield run


def outcome(folder: Path) -> dict[str, object]:
    """All that a run leaves, but for the seconds it took."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    found: dict[str, object] = {"rounds": [line | {"wall_seconds": 0} for line in lines]}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "rounds.jsonl":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def stop_after(patch, server_round: int, error: type[BaseException] = Killed) -> None:
    """Let a run die when it has written a round's line."""
    append = RunFolder.append

    def appended(self, line):
        append(self, line)
        if line["round"] == server_round:
            raise error

    patch.setattr(RunFolder, "append", appended)


def die_at(patch, moment: int) -> None:
    """Let this process die, as it were, at its n-th call of the file system from now on."""
    calls = count()

    def counted(original):
        def call(*arguments, **named):
            if next(calls) == moment:
                raise Killed
            return original(*arguments, **named)

        return call

    for owner, name in ((os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "unlink")):
        patch.setattr(owner, name, counted(getattr(owner, name)))


def test_killed_at_every_write(carry_out, tmp_path, monkeypatch):
    """The run dies at its 1st, 2nd, ... call of the file system, until it lives to its end."""
    run = RUN | {"rounds": 2, "checkpoint_every": 1}
    carry_out(run, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert [line["round"] for line in expected["rounds"]] == [0, 1, 2]
    for moment in count():
        folder = tmp_path / str(moment)
        try:
            with monkeypatch.context() as patch:
                die_at(patch, moment)
                carry_out(run, folder)
            break
        except Killed:
            pass
        if RunFolder(folder).status != DONE:  # a run that is done is left as it is
            carry_out(run, folder)
            found = outcome(folder)
            assert found == expected, f"killed at call {moment}"
    print(f"killed at {moment} calls")
    assert moment > 40


FLOWERS = "flwr.serverapp.strategy"
STATES = {
    "mimelite": {"client": RUN["client"] | {"optimizer": "mimelite"}},
    "momentum, nova": {
        "server": {"optimizer": "momentum"},
        "client": {"optimizer": "nova"},
        "reduce": "client",
    },
    "yogi": {"server": {"optimizer": "yogi", "lr": 0.1}},
    "adagrad": {"server": {"optimizer": "adagrad", "lr": 0.1}, "stragglers": {"fraction": 0.5}},
    "Flower's FedAdam": {"strategy": f"{FLOWERS}:FedAdam"},
    "Flower's FedAvgM": {
        "strategy": f"{FLOWERS}:FedAvgM",
        "strategy_args": {"server_momentum": 0.9},
    },
    "a user's, that says itself": {"strategy": "plugged_in_strategies:Remembering"},
    "a user's, in Flower's config": {
        "strategy": "plugged_in_strategies:Decaying",
        "reduce": "worker",
    },
    "a user's, in an attribute": {"strategy": "plugged_in_strategies:HalfStep"},
}


@pytest.mark.parametrize("kind", STATES)
def test_every_kind_of_state_is_kept(kind, carry_out, tmp_path, monkeypatch):
    run = RUN | STATES[kind]
    carry_out(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            carry_out(run, tmp_path / "broken")
    assert "goes on after round 2" in carry_out(run, tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def remembering_app() -> ClientApp:
    """Clients that move further in each of their own rounds, which they count in their state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = int(context.state.config_records.get("seen", {"rounds": 0})["rounds"]) + 1
        context.state["seen"] = ConfigRecord({"rounds": seen})
        arrays = message.content.array_records["arrays"]
        past = context.state.array_records.get("past", arrays)
        moved = {
            name: FlowerArray(each.numpy() + seen * past[name].numpy() * np.float32(0.01))
            for name, each in arrays.items()
        }
        context.state["past"] = ArrayRecord(moved)
        metrics = MetricRecord({"num-examples": 1, "train-loss": float(seen)})
        reply = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
        return Message(reply, reply_to=message)

    @app.evaluate("test")
    def test(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def test_clients_keep_their_states(carry_out, tmp_path, monkeypatch):
    run = RUN | {"strategy": "flwr.serverapp.strategy:FedAvg"}
    carry_out(run, tmp_path / "whole", make_app=remembering_app)
    assert max(line.get("train_loss", 0) for line in outcome(tmp_path / "whole")["rounds"]) > 1
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            carry_out(run, tmp_path / "broken", make_app=remembering_app)
    carry_out(run, tmp_path / "broken", make_app=remembering_app)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_strategy_with_its_own_start_begins_again_and_says_so(carry_out, tmp_path, monkeypatch):
    run = RUN | {"strategy": "plugged_in_strategies:OwnStart"}
    assert "has a `start` of its own" in carry_out(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            carry_out(run, tmp_path / "broken")
    assert "begins again at round 0" in carry_out(run, tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.fixture
def broken(carry_out, tmp_path, monkeypatch):
    """A run broken off after round 5, with checkpoints of rounds 4 and 2; and how it should end."""
    carry_out(RUN, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            carry_out(RUN, tmp_path / "broken")
    names = [path.name for path in RunFolder(tmp_path / "broken").checkpoints]
    assert names == ["round-000004.safetensors", "round-000002.safetensors"]
    return tmp_path / "broken", outcome(tmp_path / "whole")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "truncated": lambda content: content[:-1],
    "empty": lambda _: b"",
    "a bit of a tensor": lambda content: flipped(content, len(content) - 20),
    "a bit of the record": lambda content: flipped(content, 200),
    "a header of 2^60 bytes": lambda content: (1 << 60).to_bytes(8, "little") + content[8:],
    "something else": lambda _: b"not a checkpoint at all",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, broken, carry_out):
    folder, expected = broken
    newest, _ = RunFolder(folder).checkpoints
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    said = carry_out(RUN, folder)
    assert "checkpoint round-000004.safetensors cannot be used" in said
    assert "goes on after round 2" in said
    assert outcome(folder) == expected


def test_another_models_checkpoints_are_not_thrown_away(broken, carry_out, tmp_path):
    """As where the code of a model of one's own was changed since."""
    folder, _ = broken
    before = outcome(folder)
    with pytest.raises(RequestError, match=re.escape("0.weight")):
        carry_out(RUN | {"model": "plugged_in:small_classifier"}, folder)
    assert outcome(folder) == before


def test_without_a_whole_checkpoint_it_begins_again(broken, carry_out):
    folder, expected = broken
    for path in RunFolder(folder).checkpoints:
        path.write_bytes(b"")
    assert "begins again at round 0" in carry_out(RUN, folder)
    assert outcome(folder) == expected


def test_another_number_of_workers_is_said_and_equal_up_to_rounding(broken, carry_out):
    folder, expected = broken
    with Workers(1, import_path=[str(Path(__file__).parent)]) as one:
        said = carry_out(RUN, folder, on=one)
    assert "workers: 1, were 2: the same up to rounding" in said
    assert [line.get("examples") for line in RunFolder(folder).rounds] == [
        line.get("examples") for line in expected["rounds"]
    ]
    for name, value in load(expected["final.safetensors"]).items():
        assert torch.allclose(RunFolder(folder).weights[name], value, atol=1e-5)


def test_lines_that_are_torn_or_lost(broken, carry_out):
    """A torn last line is no line; a checkpoint ahead of its lines is not used."""
    folder, expected = broken
    path = folder / "rounds.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + b'{"round": 4, "train_lo')
    assert [line["round"] for line in RunFolder(folder).rounds] == [0, 1, 2, 3]
    assert "does not hold rounds 0 to 4" in carry_out(RUN, folder)
    assert outcome(folder) == expected


def test_a_stop_keeps_the_round(carry_out, tmp_path):
    """Asked to stop before the first round ends, the run stops after it, and goes on from there."""
    carry_out(RUN, tmp_path / "whole")
    stop = Stop()
    stop.requested = True
    with pytest.raises(StoppedError):
        carry_out(RUN, tmp_path / "stopped", stop)
    assert [line["round"] for line in RunFolder(tmp_path / "stopped").rounds] == [0]
    assert "goes on after round 0" in carry_out(RUN, tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_what_a_checkpoint_gives_back_lies_as_new_tensors_do(tmp_path):
    """On whole cache lines: torch.dot's last digits depend on where a vector begins."""
    path = tmp_path / "odd.safetensors"
    path.write_bytes(encode({str(size): torch.ones(size) for size in (3, 5, 17, 83, 101)}))
    assert {each.data_ptr() % 64 for each in decode(path).values()} == {0}


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    content = {
        "numbers": [None, True, 3, 0.1, float("inf"), 1 << 80, "text \u2028 ü", b"\x00\xff"],
        7: (1, (2.5,)),
        "arrays": {"a/b": np.float32(0.5), "a": {"b": np.arange(6)[::-2].reshape(3, 1)}},
        "tensors": [torch.tensor(2.0, dtype=torch.bfloat16), torch.zeros(0), torch.eye(3).T[1:]],
        "config": ConfigRecord({"rate": 0.5, "name": "x", "raw": b"\x01", "many": [1, 2]}),
        "records": RecordDict({"metrics": MetricRecord({"loss": 1.5, "all": [1.0, 2.0]})}),
        "x": ArrayRecord({"w": FlowerArray(np.float64([1, 2]))}),
    }
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(encode(content))
    read = decode(path)
    assert read.keys() == content.keys()
    assert read["numbers"] == content["numbers"]
    assert read[7] == (1, (2.5,))
    assert type(read["arrays"]["a/b"]) is np.float32
    assert read["arrays"]["a"]["b"].tolist() == [[5], [3], [1]]
    for one, other in zip(read["tensors"], content["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert (read["config"], read["records"]) == (content["config"], content["records"])
    assert read["x"]["w"].numpy().tolist() == [1, 2]


@pytest.mark.parametrize("unsavable", [object(), {1, 2}, np.array(["text"]), {(1, 2): 3}, 1j])
def test_what_a_checkpoint_cannot_hold_is_named(unsavable):
    with pytest.raises(UnsavableError, match="strategy/memory"):
        encode({"strategy": {"memory": unsavable}})


def test_no_checkpoint_is_no_checkpoint(tmp_path):
    with pytest.raises(DamagedError, match="not readable"):
        decode(tmp_path / "missing.safetensors")


def test_a_strategy_that_keeps_what_cannot_be_saved_is_not_taken_for_saved():
    """A module that a server trains is part of its state, callable or not; functions are not."""
    strategy = FedAvg()
    strategy.weigh = max
    encode(state_of(strategy))
    strategy.generator = torch.nn.Linear(2, 2)
    with pytest.raises(UnsavableError, match="generator is a Linear"):
        encode(state_of(strategy))
