"""Any Flower grid, with the cohort's updates measured as their replies come in."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedinit.cohort import ARRAYS, CohortSums
from fedinit.parameters import Layout
from fedinit.simulation.failures import Failures
from fedinit.simulation.flower_internals import Run


class ObservedGrid(Grid):
    """Hands everything on to another grid, Flower's own runtime, say, and sums what it sees.

    RayGrid does this in its workers.

    Args:
        grid: the grid that does the work.
        layout: the model's.
        failures: what becomes of a client's exception; default: ClientError.
    """

    def __init__(self, grid: Grid, layout: Layout, failures: Failures | None = None) -> None:
        self._grid = grid
        self._layout = layout
        self._sums = CohortSums(layout)
        self.failures = failures or Failures()

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid.create_message`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid.get_node_ids`."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid.push_messages`; nothing is measured of messages that are pushed."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid.pull_messages`."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid.send_and_receive`; updates are measured, in the order of the nodes.

        Raises:
            ClientError: a client raised, and is not to be skipped.
            ValueError: two messages go to one node.
        """
        messages = list(messages)
        if len({each.metadata.dst_node_id for each in messages}) < len(messages):
            raise ValueError("messages must go to distinct nodes")
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        # By what is answered: of a node that has left it is the SuperLink that says so.
        answers = {each.metadata.reply_to_message_id: each for each in replies}
        for message in sorted(messages, key=lambda each: each.metadata.dst_node_id):
            reply = answers.get(message.metadata.message_id)
            if reply is None:
                continue
            if reply.has_error():
                self.failures.reply(message, reply.error.reason or "no reason given")
                continue
            start = message.content.get(ARRAYS)
            training = reply.metadata.message_type.startswith(MessageType.TRAIN)
            if training and isinstance(start, ArrayRecord):
                self._sums.add(self._layout.flatten(start), reply.content)
        return replies

    def take_sums(self) -> CohortSums | None:
        """Return the sums over the updates trained since the last call."""
        sums, self._sums = self._sums, CohortSums(self._layout)
        return sums if sums.clients else None
