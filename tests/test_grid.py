"""RayGrid with a ClientApp that is not ours."""

import gc
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from fedinit.parameters import Array, Layout, size_in_bytes
from fedinit.simulation import ClientError, RayGrid, Workers
from fedinit.simulation.failures import Failures
from fedinit.simulation.observed_grid import ObservedGrid
from fedinit.simulation.ray_grid import assign
from strategies.fedopt import FedOpt


def counting_app() -> ClientApp:
    """Adds the client's number to w, and counts its own rounds in its state, or forgets them."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.content["config"].get("fail-at") == client:
            raise ValueError("out of luck")
        seen = int(context.state.metric_records.get("seen", {"rounds": 0})["rounds"]) + 1
        context.state["seen"] = MetricRecord({"rounds": seen})
        if message.content["config"].get("forget"):
            del context.state["seen"]
        arrays = message.content.array_records["arrays"]
        w = arrays.pop("w").numpy() + client  # consumes its message: the next client's is whole
        reply = ArrayRecord()
        reply["w"] = Array(w)
        metrics = MetricRecord({"num-examples": client + 1, "seen": seen})
        return Message(RecordDict({"arrays": reply, "metrics": metrics}), reply_to=message)

    return app


def layout() -> Layout:
    return Layout({"w": (3,)}, ("w",))


@pytest.fixture(scope="module")
def workers(ray_started):
    with Workers(3, import_path=[str(Path(__file__).parent)]) as started:
        yield started


def train_messages(nodes: list[int], first: float = 1.0, **config: int) -> list[Message]:
    arrays = ArrayRecord()
    arrays["w"] = Array(first + np.arange(3.0))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def test_one_reply_for_each_client_and_states_that_persist(workers):
    grid = RayGrid(workers, counting_app, num_clients=5)
    assert list(grid.get_node_ids()) == [0, 1, 2, 3, 4]
    for nodes, seen in (([4, 0, 2], [1, 1, 1]), ([2, 3], [2, 1]), ([2, 0], [2, 3])):
        replies = list(grid.send_and_receive(train_messages(nodes)))
        assert [reply.metadata.src_node_id for reply in replies] == sorted(nodes)
        for reply, count in zip(replies, seen, strict=True):
            node = reply.metadata.src_node_id
            assert reply.content["metrics"]["seen"] == count
            assert reply.content["arrays"]["w"].numpy().tolist() == [1 + node, 2 + node, 3 + node]
    assert grid.take_sums() is None  # nothing is measured without a layout


@pytest.mark.parametrize("reduce", [torch.float64, None])
def test_contents_that_alternate_on_a_worker_reach_their_nodes(workers, reduce):
    """Node k adds k with weight k + 1, to 1 if it is even and to 11 if it is odd."""
    grid = RayGrid(workers, counting_app, num_clients=12, layout=layout(), reduce=reduce)
    even, odd = range(0, 12, 2), range(1, 12, 2)
    messages = [*train_messages([*even]), *train_messages([*odd], first=11.0)]
    replies = list(grid.send_and_receive(messages))
    for node, reply in enumerate(replies):
        first = node + (11 if node % 2 else 1)
        assert reply.metadata.src_node_id == node
        assert reply.content["arrays"]["w"].numpy().tolist() == [first, first + 1, first + 2]
    assert len(replies) == 12  # from two contents no mean is formed
    mean = -sum(k * (k + 1) for k in range(12)) / sum(range(1, 13))
    assert grid.take_sums().mean_update().tolist() == pytest.approx([mean] * 3)


def test_a_node_gets_one_message_at_a_time(workers):
    grid = RayGrid(workers, counting_app, num_clients=5, layout=layout())
    for each in (grid, ObservedGrid(grid, layout())):
        with pytest.raises(ValueError, match="distinct nodes"):
            each.send_and_receive(train_messages([0, 1, 1]))


class Leaving(RayGrid):
    """A grid whose node 1 has left: Flower's SuperLink itself answers, in its own words."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        left = next(each.metadata for each in messages if each.metadata.dst_node_id == 1)
        told = create_message_error_unavailable_res_message(left, "node_unavail")
        return [told, *(each for each in replies if each.metadata.src_node_id != 1)]


def test_a_node_that_has_left_is_a_client_that_failed(workers):
    """Clients 0 and 3 add their number with weights 1 and 4: the mean update is -12/5."""
    leaving = Leaving(workers, counting_app, num_clients=5)
    grid = ObservedGrid(leaving, layout(), Failures(skip=True))
    replies = list(grid.send_and_receive(train_messages([3, 1, 0])))
    assert [reply.has_error() for reply in replies] == [True, False, False]
    assert [text.partition(":")[0] for text in grid.failures.take()] == ["client 1 failed to train"]
    sums = grid.take_sums()
    assert sums.clients == 2
    assert sums.mean_update().tolist() == pytest.approx([-12 / 5] * 3)
    with pytest.raises(ClientError, match="client 1 failed to train"):
        ObservedGrid(leaving, layout()).send_and_receive(train_messages([0, 1]))


def test_states_persist_where_workers_reduce_and_may_be_emptied(workers):
    grid = RayGrid(workers, counting_app, num_clients=5, layout=layout(), reduce=torch.float64)
    for nodes, forget in (([0, 1, 3, 4], 0), ([1, 3], 0), ([0, 3], 1), ([3, 4], 0)):
        assert grid.send_and_receive(train_messages(nodes, forget=forget))
    seen = {node: dict(state.metric_records) for node, state in grid.states.items()}
    assert seen == {0: {}, 1: {"seen": {"rounds": 2}}, 3: {"seen": {"rounds": 1}}, 4: seen[1]}


def test_workers_reduce_to_the_weighted_mean(workers):
    """Clients 0, 1, 3 add their number with weights 1, 2, 4: the mean update is -14/7 = -2.

    S = -4 (1, 1, 1), Q = 3 (0 + 1 + 9) = 30, so diversity 30 / 48; client 0 does not move; the two
    others point the same way.
    """
    grid = RayGrid(workers, counting_app, num_clients=5, layout=layout(), reduce=torch.float64)
    replies = list(grid.send_and_receive(train_messages([0, 1, 3])))
    assert len(replies) == 3  # three workers, one client each
    examples = [reply.content["metrics"]["num-examples"] for reply in replies]
    assert sum(examples) == 7
    sums = grid.take_sums()
    assert sums.clients == 3
    assert sums.mean_update().tolist() == pytest.approx([-2, -2, -2])
    assert sums.gradient_diversity() == pytest.approx(30 / 48)
    assert sums.mean_pairwise_cosine() == pytest.approx(1)
    assert grid.take_sums() is None
    many = list(grid.send_and_receive(train_messages([0, 1, 2, 3, 4])))
    assert len(many) == 3
    total = sum(each.content["metrics"]["num-examples"] for each in many)
    mean = sum(
        each.content["arrays"]["w"].numpy() * each.content["metrics"]["num-examples"]
        for each in many
    )
    assert (mean / total).tolist() == pytest.approx([1 + 40 / 15, 2 + 40 / 15, 3 + 40 / 15])


@pytest.mark.parametrize(("inline", "puts"), [(0, 2), (1 << 20, 0)])
def test_contents_go_along_or_by_the_store(workers, monkeypatch, inline, puts):
    """Once each, of two that five messages share; an array that says no dtype has its bytes' size.

    Clients 0 to 4 add their number: their replies are those of any other way.
    """
    stored = []

    def put(value: ArrayRecord) -> ray.ObjectRef:
        stored.append(value)
        return store(value)

    store = ray.put
    monkeypatch.setattr(workers, "inline_bytes", inline)
    monkeypatch.setattr(ray, "put", put)
    grid = RayGrid(workers, counting_app, num_clients=5)
    messages = train_messages([0, 1, 2, 3, 4])
    unknown = ArrayRecord({"own": FlowerArray(dtype="", shape=(), stype="own", data=b"1234")})
    messages[0].content["further"] = unknown
    assert size_in_bytes(unknown) == 4
    replies = grid.send_and_receive(messages)
    assert [reply.content["arrays"]["w"].numpy()[0] for reply in replies] == [1, 2, 3, 4, 5]
    assert len(stored) == puts


def test_a_failing_client_is_named(workers):
    grid = RayGrid(workers, counting_app, num_clients=5)
    with pytest.raises(ClientError, match=r"client 3 failed to train: ValueError: out of luck"):
        grid.send_and_receive(train_messages([1, 3], **{"fail-at": 3}))


def luckless_app() -> ClientApp:
    """Every client fails, one of them late."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if message.content["config"]["late"] == context.node_config["partition-id"]:
            time.sleep(0.5)
        raise ValueError("out of luck")

    return app


@pytest.mark.parametrize("late", [0, 1, 2])
def test_who_fails_first_is_told_by_the_shares_and_not_by_the_clock(workers, late):
    """Three workers, one client each."""
    skipping = RayGrid(workers, luckless_app, num_clients=3, failures=Failures(skip=True))
    assert len(list(skipping.send_and_receive(train_messages([0, 1, 2], late=late)))) == 3
    told = [text.split(" failed")[0] for text in skipping.failures.take()]
    assert told == ["client 0", "client 1", "client 2"]
    ending = RayGrid(workers, luckless_app, num_clients=3)
    with pytest.raises(ClientError, match="client 0 failed to train"):
        ending.send_and_receive(train_messages([0, 1, 2], late=late))


def test_push_and_pull(workers):
    grid = RayGrid(workers, counting_app, num_clients=5)
    ids = list(grid.push_messages(train_messages([1, 4])))
    replies: list[Message] = []
    deadline = time.monotonic() + 30
    while len(replies) < 2 and time.monotonic() < deadline:
        replies += grid.pull_messages(ids)
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
    assert list(grid.pull_messages(ids)) == []
    with pytest.raises(ValueError, match=r"distinct nodes of 0\.\.4"):
        grid.push_messages(train_messages([5]))


def test_shares_are_balanced_longest_first():
    assert assign([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert assign([1, 9, 1, 4, 4], 2) == [[1, 2], [0, 3, 4]]  # 9 + 1 and 4 + 4 + 1
    assert assign([5], 3) == [[0], [], []]
    assert assign([], 2) == [[], []]


def in_float64() -> ClientApp:
    """Adds the client's number to w, in NumPy's own dtype."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        w = message.content.array_records["arrays"]["w"].numpy().astype(np.float64)
        arrays = ArrayRecord()
        arrays["w"] = Array(w + int(context.node_config["partition-id"]))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_x_keeps_its_dtype_whatever_clients_reply_in(workers, optimizer):
    """Clients 0 and 1 add 0 and 1: D = -1/2; SGD with rate 1 adds 1/2, Adam's first step 1."""
    grid = RayGrid(workers, in_float64, num_clients=2, layout=layout())
    strategy = FedOpt(partial(optimizer, lr=1.0), layout(), cohort=2, clients=2)
    x = layout().record(torch.tensor([1.0, 2.0, 3.0]), {})
    replies = grid.send_and_receive(strategy.configure_train(1, x, ConfigRecord(), grid))
    arrays, _ = strategy.aggregate_train(1, replies)
    step = 0.5 if optimizer is torch.optim.SGD else 1.0
    assert arrays["w"].numpy().dtype == np.float32
    assert arrays["w"].numpy().tolist() == pytest.approx([1 + step, 2 + step, 3 + step])


@pytest.mark.parametrize("reduce", [torch.float64, None])
def test_a_rounds_arrays_are_let_go_though_flowers_loop_keeps_the_replies(workers, reduce):
    """What was sent, too; at once, and not when Python looks for cycles next."""
    grid = RayGrid(workers, in_float64, num_clients=2, layout=layout(), reduce=reduce)
    strategy = FedOpt(partial(torch.optim.SGD, lr=1.0), layout(), cohort=2, clients=2)
    x = layout().record(torch.tensor([1.0, 2.0, 3.0]), {})
    gc.disable()
    try:
        messages = list(strategy.configure_train(1, x, ConfigRecord(), grid))
        sent = weakref.ref(messages[0].content)
        replies = grid.send_and_receive(messages)
        del messages
        assert sent() is None
        arrays = [each.content["arrays"] for each in replies]
        summed = [part for each in arrays if reduce for part in each.sums._parts]
        kept = [weakref.ref(each) for each in (*arrays, *summed)]
        assert len(kept) == (4 if reduce else 2)
        del arrays, summed
        strategy.aggregate_train(1, replies)
        grid.take_sums()
        assert not any(each() for each in kept)
    finally:
        gc.enable()
    assert [each.content["metrics"]["num-examples"] for each in replies] == [1, 1]
