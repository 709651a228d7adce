"""Flower strategies: what the server does with the replies."""

from strategies.fedopt import FedOpt
from strategies.server_optimizers import SERVER_OPTIMIZERS

__all__ = ["SERVER_OPTIMIZERS", "FedOpt"]
