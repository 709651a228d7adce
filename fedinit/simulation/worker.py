"""A worker: one process that runs its share of the virtual clients, one after another."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedinit.cohort import ARRAYS, METRICS, CohortSums, Trained
from fedinit.errors import named
from fedinit.parameters import Layout
from fedinit.registry import add_to_path
from fedinit.simulation.flower_internals import RUN_ID, claim_identity

# A message's content: its records by name, ArrayRecords as references into Ray's object store.
Content = dict[str, Any]


class Task(NamedTuple):
    """One message to one virtual client."""

    node_id: int
    message_type: str
    group_id: str
    content: int
    state: RecordDict | None


class Answer(NamedTuple):
    """What came of a task: the reply's content, or why there is none; and a state that is kept."""

    node_id: int
    content: RecordDict | None
    failure: str | None
    state: RecordDict | None


class Share(NamedTuple):
    """What a worker made of its share.

    Attributes:
        answers: one for each task.
        sums: over the updates of its train messages.
        reduced: the first node whose content is in the sums alone.
    """

    answers: list[Answer]
    sums: CohortSums | None
    reduced: int | None


class Worker:
    """Runs a ClientApp for many clients; made a Ray actor by `Workers`.

    Args:
        import_path: folders on the driver's import path, for the user's own modules.
    """

    def __init__(self, import_path: list[str]) -> None:
        add_to_path(import_path)
        torch.set_num_threads(1)  # two threads of one process contend; processes do not
        torch.set_flush_denormal(True)
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

    def run(
        self,
        tasks: list[Task],
        contents: Mapping[int, Content],
        layout: Layout | None,
        reduce: bool,
    ) -> Share:
        """Answer each message.

        Args:
            tasks: this worker's share.
            contents: the distinct contents that the tasks refer to.
            layout: sums over the updates of train messages are kept if it is given.
            reduce: leave the contents of train messages' replies out: the sums say their mean.
        """
        received = _fetch(contents)
        answers: list[Answer] = []
        sums = None if layout is None else CohortSums(layout)
        train_client = getattr(self._app, "train_client", None) if reduce else None
        reduced: int | None = None
        for task in tasks:
            content = received[task.content]
            start = content.get(ARRAYS)
            training = task.message_type.startswith(MessageType.TRAIN)
            if sums is None or not training or not isinstance(start, ArrayRecord):
                answers.append(self._answer(task, content))
            elif train_client is not None:
                answer = _train(train_client, task, content, start, sums)
                answers.append(answer)
                if reduced is None and answer.failure is None:
                    reduced = task.node_id
            else:
                answer = _measured(self._answer(task, content), task, start, sums)
                if reduce and _usual(answer.content):
                    answer = answer._replace(content=None)
                    reduced = task.node_id if reduced is None else reduced
                answers.append(answer)
        if sums is not None and not sums.clients:
            sums = None
        return Share(answers, sums, reduced)

    def _answer(self, task: Task, content: RecordDict) -> Answer:
        # A copy of each record: an app may change its message without changing the next client's.
        own = RecordDict({name: record.copy() for name, record in content.items()})
        message = Message(
            own,
            dst_node_id=task.node_id,
            message_type=task.message_type,
            group_id=task.group_id,
        )
        context = Context(
            run_id=RUN_ID,
            node_id=task.node_id,
            node_config={"partition-id": task.node_id, "num-partitions": self._num_clients},
            state=task.state or RecordDict(),
            run_config={},
        )
        try:
            reply = self._app(message, context)
        except Exception as error:  # whatever a ClientApp raises; the driver says which client
            return _failed(task, error)
        state = context.state if len(context.state) else None
        if reply.has_error():
            return Answer(task.node_id, None, reply.error.reason or "no reason given", state)
        return Answer(task.node_id, reply.content, None, state)


def _train(
    train_client: Callable[[RecordDict, int], Trained],
    task: Task,
    content: RecordDict,
    start: ArrayRecord,
    sums: CohortSums,
) -> Answer:
    """Train a client into the sums, without a message of its own."""
    try:
        trained = train_client(content, task.node_id)
        sums.add_trained(sums.layout.flatten(start), trained)
    except Exception as error:
        return _failed(task, error)
    return Answer(task.node_id, None, None, None)


def _measured(answer: Answer, task: Task, start: ArrayRecord, sums: CohortSums) -> Answer:
    """Add an answer's update to the sums; a reply that does not fit is its client's failure."""
    if _usual(answer.content):
        try:
            sums.add(sums.layout.flatten(start), answer.content)
        except Exception as error:
            return _failed(task, error)
    return answer


def _failed(task: Task, error: Exception) -> Answer:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Answer(task.node_id, None, f"{named(error)} ({where.filename}:{where.lineno})", None)


def _usual(reply: RecordDict | None) -> TypeGuard[RecordDict]:
    """Whether a reply keeps Flower's convention, so that its update can be measured."""
    return reply is not None and ARRAYS in reply and METRICS in reply


def _fetch(contents: Mapping[int, Content]) -> dict[int, RecordDict]:
    """Resolve the references; arrays stay in shared memory and are decoded by nobody."""
    return {
        key: RecordDict(
            {
                name: ray.get(record) if isinstance(record, ray.ObjectRef) else record
                for name, record in content.items()
            }
        )
        for key, content in contents.items()
    }
