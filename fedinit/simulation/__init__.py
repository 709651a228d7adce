"""Flower simulations on Ray, without the costs of Flower's own runtime."""

from fedinit.simulation.failures import ClientError, Failures
from fedinit.simulation.ray_grid import RayGrid, WorkerError, assign
from fedinit.simulation.workers import ENVIRONMENT, Workers, environment

__all__ = [
    "ENVIRONMENT",
    "ClientError",
    "Failures",
    "RayGrid",
    "WorkerError",
    "Workers",
    "assign",
    "environment",
]
