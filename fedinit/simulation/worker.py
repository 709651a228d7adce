"""A worker: one process that runs its share of the virtual clients, one after another."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedinit.cohort import ARRAYS, METRICS, CohortSums
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
    """A worker's answers, and the sums over the updates of its train messages."""

    answers: list[Answer]
    sums: CohortSums | None


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
        reduce: torch.dtype | None,
    ) -> Share:
        """Answer each message.

        Args:
            tasks: this worker's share.
            contents: the distinct contents that the tasks refer to.
            layout: sums over the updates of train messages are kept if it is given.
            reduce: if given, the train messages of the share are answered by one reply, their mean
                in this dtype.
        """
        received = _fetch(contents)
        answers: list[Answer] = []
        sums = None if layout is None else CohortSums(layout)
        reduced: ArrayRecord | None = None  # the weights that the reduced answers started from
        for task in tasks:
            content = received[task.content]
            answer = self._answer(task, content)
            start, reply = content.get(ARRAYS), answer.content
            training = task.message_type.startswith(MessageType.TRAIN)
            if sums is not None and training and isinstance(start, ArrayRecord) and _usual(reply):
                sums.add(sums.layout.flatten(start), reply)
                if reduce is not None:
                    answer, reduced = answer._replace(content=None), start
            answers.append(answer)
        if sums is None or not sums.clients:
            return Share(answers, None)
        if reduced is not None and reduce is not None:
            place = next(
                k for k, each in enumerate(answers) if each.failure is None and each.content is None
            )
            answers[place] = answers[place]._replace(content=sums.reply(reduced, reduce))
        sums.rest, sums.extra = {}, {}  # the replies carry these already
        return Share(answers, sums)

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
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{named(error)} ({where.filename}:{where.lineno})"
            return Answer(task.node_id, None, reason, None)
        state = context.state if len(context.state) else None
        if reply.has_error():
            return Answer(task.node_id, None, reply.error.reason or "no reason given", state)
        return Answer(task.node_id, reply.content, None, state)


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
