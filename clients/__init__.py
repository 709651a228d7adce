"""Local training: what a virtual client does with the weights it receives."""

from clients.client_app import make_client_app
from clients.client_optimizers import CLIENT_OPTIMIZERS
from clients.local_training import local_epochs

__all__ = ["CLIENT_OPTIMIZERS", "local_epochs", "make_client_app"]
