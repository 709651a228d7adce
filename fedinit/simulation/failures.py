"""Clients that fail: named, and either the end of the run or skipped and counted."""

from collections.abc import Sequence

from flwr.app import ConfigRecord, Error, Message, MessageType

from fedinit.simulation.flower_internals import CLIENT_RAISED


class ClientError(RuntimeError):
    """A client raised; the text names the client, the kind of message, the round and the cause."""


class Failures:
    """What becomes of a client's exception.

    Args:
        skip: answer for the client with an error reply, as Flower's runtime does; otherwise raise.
        names: the clients' ids by node.
    """

    def __init__(self, skip: bool = False, names: Sequence[str] = ()) -> None:
        self._skip = skip
        self._names = names
        self._skipped: list[str] = []

    def reply(self, message: Message, reason: str) -> Message:
        """Return the error reply to a message that a client failed on.

        Raises:
            ClientError: clients are not to be skipped.
        """
        text = self._told(message, reason)
        if not self._skip:
            raise ClientError(text)
        if message.metadata.message_type.startswith(MessageType.TRAIN):
            self._skipped.append(text)
        return Message(Error(CLIENT_RAISED, text), reply_to=message)

    def take(self) -> list[str]:
        """Return what has been skipped in training since the last call, a line for each client."""
        taken, self._skipped = self._skipped, []
        return taken

    def name(self, node: int) -> str:
        """Return a client's number and, where it is known, its id in the data set."""
        return f"{node} '{self._names[node]}'" if node < len(self._names) else str(node)

    def _told(self, message: Message, reason: str) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        config = message.content.get("config")
        server_round = config.get("server-round") if isinstance(config, ConfigRecord) else None
        when = f" in round {server_round}" if isinstance(server_round, int) else ""
        return f"client {self.name(node)} failed to {kind}{when}: {reason}"
