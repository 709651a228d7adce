"""A Flower Grid on Ray actors: to a strategy it looks like any grid with one node per client.

Flower's own runtime pickles, stores and polls for each client's message. Here each worker gets its
share of the messages in one call, with each distinct content once (what is large goes into Ray's
object store, once for all workers), and, for a strategy whose reduction is a weighted mean, answers
with one reply.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedinit.cohort import ARRAYS, CohortSums, array_records
from fedinit.parameters import Layout, size_in_bytes
from fedinit.simulation.failures import Failures
from fedinit.simulation.flower_internals import Run, claim_identity, new_run, number
from fedinit.simulation.worker import Answer, Assignment, Content, Mailing, Share
from fedinit.simulation.workers import DIED, Workers, why_died

_DEATHS = 3  # of workers, on the same share, that end a run


class WorkerError(RuntimeError):
    """Workers died on the same share, one after another; the text names the clients."""


@dataclass
class _Sent:
    """A share that is under way.

    Attributes:
        worker: whose it is.
        place: among all shares ever sent: the order in which their sums are merged.
        messages: by node.
        assignment: what the worker got, for another to get.
        deaths: workers that died of it, or with it.
    """

    worker: int
    place: int
    messages: dict[int, Message]
    assignment: Assignment
    deaths: int = 0


class RayGrid(Grid):
    """A grid whose node k is the k-th virtual client, run by Ray workers.

    Args:
        workers: the processes to run on.
        make_app: builds the ClientApp, once in each worker.
        num_clients: number of virtual clients.
        layout: the model's; if given, updates are measured in the workers (see `take_sums`).
        reduce: let each worker answer train messages with one reply, the weighted mean over its
            clients in this dtype, `num-examples` summed. Needs a strategy that takes weighted
            means only. None: one reply for each client.
        expected_work: expected work of a message, to balance the shares; default: all alike.
        failures: what becomes of a client's exception; default: ClientError.
    """

    def __init__(
        self,
        workers: Workers,
        make_app: Callable[[], ClientApp],
        num_clients: int,
        layout: Layout | None = None,
        reduce: torch.dtype | None = None,
        expected_work: Callable[[Message], float] = lambda _: 1.0,
        failures: Failures | None = None,
    ) -> None:
        if reduce is not None and layout is None:
            raise ValueError("reduce needs the model's layout")
        claim_identity()
        self._workers = workers
        self._num_clients = num_clients
        self._layout = layout
        self._reduce = reduce
        self._expected_work = expected_work
        self.failures = failures or Failures()
        self._run = new_run()
        self._message_ids = count(1)
        self._places = count()
        self._under_way: dict[ray.ObjectRef, _Sent] = {}
        self._replies: dict[str, Message] = {}  # arrived, not yet pulled
        self._states: dict[int, RecordDict] = {}
        self._sums: dict[int, CohortSums] = {}  # by the share's place
        workers.load(make_app, num_clients)

    def set_run(self, run: Run) -> None:
        """Set the run's description; it decides nothing here."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as the Message constructor does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The virtual clients' positions in the sorted client ids, from 0."""
        return list(range(self._num_clients))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start the messages' work, balanced over the workers; return their ids.

        Raises:
            ValueError: two messages go to one node, or a node does not exist.
        """
        sent = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        nodes = [message.metadata.dst_node_id for message in sent]
        if len(set(nodes)) < len(nodes) or not set(nodes) <= set(range(self._num_clients)):
            raise ValueError(f"messages must go to distinct nodes of 0..{self._num_clients - 1}")
        for message in sent:
            number(message, str(next(self._message_ids)))
        contents = self._store(sent)
        starts = {id(message.content.get(ARRAYS)) for message in sent}
        reduce = self._reduce is not None and len(starts) == 1
        work = [self._expected_work(message) for message in sent]
        for worker, share in enumerate(assign(work, self._workers.number)):
            chosen = {sent[index].metadata.dst_node_id: sent[index] for index in share}
            if chosen:
                mailings = self._mailings(chosen, contents)
                assignment = Assignment(mailings, self._layout, reduce)
                self._start(_Sent(worker, next(self._places), chosen, assignment))
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, sorted by node; each is returned once.

        Raises:
            ClientError: a client raised, and is not to be skipped.
        """
        self._collect(timeout=0)
        found = [self._replies.pop(each) for each in message_ids if each in self._replies]
        return sorted(found, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait and pull; after `timeout` seconds only the replies that are there.

        Raises:
            ClientError: a client raised, and is not to be skipped.
        """
        message_ids = self.push_messages(messages)
        self._collect(timeout)
        return self.pull_messages(message_ids)

    @property
    def num_workers(self) -> int:
        """Number of worker processes."""
        return self._workers.number

    @property
    def states(self) -> dict[int, RecordDict]:
        """The clients' states by node, to be saved and, before the first message, set back."""
        return self._states

    def take_sums(self) -> CohortSums | None:
        """Return the sums over the updates trained since the last call, in the workers' order."""
        parts = [part for _, part in sorted(self._sums.items())]
        self._sums = {}
        if not parts:
            return None
        sums = CohortSums(parts[0].layout)
        for part in parts:
            sums.merge(part)
        return sums

    def _store(self, messages: Iterable[Message]) -> dict[int, Content]:
        """Put each distinct ArrayRecord that is large into the object store, once.

        Returns:
            The contents by id.
        """
        most = self._workers.inline_bytes
        values: dict[int, Any] = {}  # of ArrayRecords, by id
        contents: dict[int, Content] = {}
        for message in messages:
            key = id(message.content)
            if key in contents:
                continue
            contents[key] = dict(message.content)
            for name, record in array_records(message.content).items():
                if id(record) not in values:
                    large = size_in_bytes(record) > most
                    values[id(record)] = ray.put(record) if large else record
                contents[key][name] = values[id(record)]
        return contents

    def _mailings(
        self, messages: Mapping[int, Message], contents: Mapping[int, Content]
    ) -> list[Mailing]:
        """Return messages, given by node, with those together that are alike."""
        alike: dict[tuple[int, str, str], list[int]] = {}
        for node, message in messages.items():
            to = message.metadata
            key = id(message.content), to.message_type, to.group_id
            alike.setdefault(key, []).append(node)
        return [
            Mailing(
                contents[content],
                message_type,
                group_id,
                nodes,
                {node: self._states[node] for node in nodes if node in self._states},
            )
            for (content, message_type, group_id), nodes in alike.items()
        ]

    def _start(self, sent: _Sent) -> None:
        self._under_way[self._workers.run(sent.worker, sent.assignment)] = sent

    def _collect(self, timeout: float | None) -> None:
        """Turn finished shares into replies; wait for all, or for `timeout` seconds.

        They are taken in the order in which they were sent, whoever is first. A share whose worker
        died is done again by another, with the same result, when nothing else is under way.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self._under_way:
            for sent, share in sorted(self._arrivals(end), key=lambda each: each[0].place):
                if isinstance(share, Share):
                    self._take(share, sent)
                else:
                    self._start_again(sent, share)
            if time.monotonic() >= end:
                return

    def _arrivals(self, end: float) -> Iterator[tuple[_Sent, Share | Exception]]:
        """Yield what came of each share, or how its worker died, until all are there or the end.

        Each is read while the others train.
        """
        while waiting := list(self._under_way):
            left = None if end == math.inf else max(0.0, end - time.monotonic())
            done, _ = ray.wait(waiting, timeout=left)
            if not done:
                return
            sent = self._under_way.pop(done[0])
            try:
                share: Share = self._workers.result(done[0])
            except DIED as error:
                yield sent, error
            else:
                yield sent, share

    def _take(self, share: Share, sent: _Sent) -> None:
        if share.sums is not None:
            self._sums[sent.place] = share.sums
        for answer in share.answers:
            self._receive(sent.messages[answer.node_id], answer)
        if share.reduced is not None:
            self._receive_mean(sent.messages[share.reduced], share.sums)

    def _start_again(self, sent: _Sent, error: Exception) -> None:
        sent.deaths += 1
        if sent.deaths == _DEATHS:
            clients = ", ".join(map(self.failures.name, sent.messages))
            raise WorkerError(
                f"{_DEATHS} workers died on the same share, of clients {clients}: {why_died(error)}"
            )
        self._workers.replace(sent.worker)
        self._start(sent)

    def _receive(self, message: Message, answer: Answer) -> None:
        if answer.failure is not None:
            reply = self.failures.reply(message, answer.failure)
            self._replies[message.metadata.message_id] = reply
        if answer.state is not None:
            self._states[answer.node_id] = answer.state
        if answer.content is not None:
            self._reply(message, answer.content)

    def _receive_mean(self, message: Message, sums: CohortSums | None) -> None:
        """Let one reply stand for all that a worker summed."""
        if sums is not None and self._reduce is not None:
            start = array_records(message.content)[ARRAYS]
            self._reply(message, sums.reply(start, self._reduce))

    def _reply(self, message: Message, content: RecordDict) -> None:
        self._replies[message.metadata.message_id] = Message(content, reply_to=message)


def assign(work: Sequence[float], workers: int) -> list[list[int]]:
    """Deal tasks to workers, the longest first, each to the worker with the least work so far.

    Args:
        work: expected work of each task, in any unit.
        workers: number of workers.

    Returns:
        The tasks' positions for each worker, ascending; a function of the arguments alone.
    """
    loads = [0.0] * workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    for index in sorted(range(len(work)), key=lambda each: (-work[each], each)):
        worker = loads.index(min(loads))
        shares[worker].append(index)
        loads[worker] += work[index]
    return [sorted(share) for share in shares]
