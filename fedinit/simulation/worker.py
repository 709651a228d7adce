"""A worker: one process that runs its share of the virtual clients, one by one or many as one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedinit.cohort import ARRAYS, METRICS, CohortSums, TrainGroup, array_records
from fedinit.errors import located
from fedinit.parameters import Layout
from fedinit.registry import add_to_path
from fedinit.simulation.flower_internals import RUN_ID, claim_identity

# A message's content: its records by name, large ones as references into Ray's object store.
Content = dict[str, Any]


class Mailing(NamedTuple):
    """Messages to virtual clients, alike but for their nodes.

    Attributes:
        content, message_type, group_id: what all of them have.
        nodes: where they go.
        states: by node, of those that have one.
    """

    content: Content
    message_type: str
    group_id: str
    nodes: list[int]
    states: dict[int, RecordDict]


class Assignment(NamedTuple):
    """A worker's share of the messages.

    Attributes:
        mailings: the messages.
        layout: sums over the updates of train messages are kept if it is given.
        reduce: leave the contents of train messages' replies out: the sums say their mean.
    """

    mailings: list[Mailing]
    layout: Layout | None
    reduce: bool


class Answer(NamedTuple):
    """What came of a message: the reply's content, or why there is none; a state that is kept."""

    node_id: int
    content: RecordDict | None
    failure: str | None
    state: RecordDict | None

    @property
    def reduced(self) -> bool:
        """Whether the content is in the sums alone."""
        return self.content is None and self.failure is None


class Share(NamedTuple):
    """What a worker made of its share.

    Attributes:
        answers: one for each message, but for those that left nothing beside what is in the sums.
        sums: over the updates of its train messages.
        reduced: the first node whose content is in the sums alone.
    """

    answers: list[Answer]
    sums: CohortSums | None
    reduced: int | None


@runtime_checkable
class TrainsGroups(Protocol):
    """A ClientApp that can be asked for its training without messages, many clients at once.

    Attributes:
        deal_training: deals the clients of a train message's content to groups; returns them, and
            a function that trains a group and returns what each of its clients makes of x.
    """

    deal_training: Callable[[RecordDict, Sequence[int]], tuple[list[list[int]], TrainGroup]]


class Worker:
    """Runs a ClientApp for many clients; made a Ray actor by `Workers`.

    Args:
        import_path: folders on the driver's import path, for the user's own modules.
    """

    def __init__(self, import_path: list[str]) -> None:
        add_to_path(import_path)
        torch.set_num_threads(1)  # two threads of one process contend; processes do not
        torch.set_flush_denormal(True)
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0)
        if 0 < share < 1 and torch.cuda.is_available():
            # What one worker measures alone must fit when all of them work.
            torch.cuda.set_per_process_memory_fraction(0.9 * share)
        claim_identity()
        self._app = ClientApp()
        self._num_clients = 0

    def load(self, make_app: Callable[[], ClientApp], num_clients: int) -> None:
        """Build the ClientApp of a run; it replaces the one before."""
        self._app = make_app()
        self._num_clients = num_clients

    def call(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns in this process."""
        return function()

    def run(self, assignment: Assignment) -> Share:
        """Answer each message."""
        mailings, layout, reduce = assignment
        answers: list[Answer] = []
        sums = None if layout is None else CohortSums(layout)
        for mailing in mailings:
            content, nodes = _fetched(mailing.content), mailing.nodes
            training = mailing.message_type.startswith(MessageType.TRAIN)
            if sums is None or not training or not isinstance(content.get(ARRAYS), ArrayRecord):
                answers += [self._answer(node, mailing, content) for node in nodes]
            elif isinstance(self._app, TrainsGroups):
                answers += _train(self._app, nodes, content, sums, reduce)
            else:
                answers += [self._summed(node, mailing, content, sums, reduce) for node in nodes]
        if sums is not None and not sums.clients:
            sums = None
        reduced = next((each.node_id for each in answers if each.reduced), None)
        telling = [each for each in answers if not each.reduced or each.state is not None]
        return Share(telling, sums, reduced)

    def _summed(
        self, node: int, mailing: Mailing, content: RecordDict, sums: CohortSums, reduce: bool
    ) -> Answer:
        answer = self._answer(node, mailing, content)
        if not _usual(answer.content):
            return answer
        try:
            sums.add(sums.layout.flatten(array_records(content)[ARRAYS]), answer.content)
        except Exception as error:  # a reply that does not fit is its client's failure
            return _failed(node, error)
        return answer._replace(content=None) if reduce else answer

    def _answer(self, node: int, mailing: Mailing, content: RecordDict) -> Answer:
        # A copy of each record: an app may change its message without changing the next client's.
        own = RecordDict({name: record.copy() for name, record in content.items()})
        message = Message(
            own,
            dst_node_id=node,
            message_type=mailing.message_type,
            group_id=mailing.group_id,
        )
        before = mailing.states.get(node)
        context = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={"partition-id": node, "num-partitions": self._num_clients},
            state=before or RecordDict(),
            run_config={},
        )
        try:
            reply = self._app(message, context)
        except Exception as error:  # whatever a ClientApp raises; the driver says which client
            return _failed(node, error)
        kept = len(context.state) or before is not None  # one that is emptied now, too
        state = context.state if kept else None
        if reply.has_error():
            return Answer(node, None, reply.error.reason or "no reason given", state)
        return Answer(node, reply.content, None, state)


def _train(
    app: TrainsGroups, nodes: Sequence[int], content: RecordDict, sums: CohortSums, reduce: bool
) -> Iterator[Answer]:
    """Train clients into the sums, without messages of their own."""
    received = array_records(content)[ARRAYS]
    start = sums.layout.flatten(received)
    try:
        groups, train_group = app.deal_training(content, nodes)
    except Exception as error:
        yield from (_failed(node, error) for node in nodes)
        return
    waiting = deque(groups)
    while waiting:
        group = waiting.popleft()
        try:
            made = train_group(group)
        except Exception as error:
            if len(group) == 1:
                yield _failed(group[0], error)
            else:  # one by one: whose failure is it?
                waiting.extendleft([node] for node in reversed(group))
            continue
        sums.add_trained(start, *made)
        for node, trained in zip(group, made, strict=True):
            reply = None if reduce else trained.content(sums.layout, received)
            yield Answer(node, reply, None, None)


def _failed(node: int, error: Exception) -> Answer:
    return Answer(node, None, located(error), None)


def _usual(reply: RecordDict | None) -> TypeGuard[RecordDict]:
    """Whether a reply keeps Flower's convention, so that its update can be measured."""
    return reply is not None and ARRAYS in reply and METRICS in reply


def _fetched(content: Content) -> RecordDict:
    """Resolve the references; what they refer to stays in shared memory. Nothing is decoded."""
    return RecordDict(
        {
            name: ray.get(record) if isinstance(record, ray.ObjectRef) else record
            for name, record in content.items()
        }
    )
