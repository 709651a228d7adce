"""The one place that touches what flwr calls internal (pinned to flwr 1.41 in pyproject.toml)."""

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
CLIENT_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def claim_identity() -> None:
    """Let this process make messages outside Flower's runtime, which sets the identity itself."""
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        TaskIdentity.task_id = RUN_ID


def number(message: Message, message_id: str) -> None:
    """Give a message its id, which Flower's own link would give."""
    message.metadata.__dict__["_message_id"] = message_id


def new_run() -> Run:
    """Return the description of the one run of a grid."""
    return Run.create_empty(RUN_ID)
