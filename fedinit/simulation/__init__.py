"""Flower simulations on Ray, without the costs of Flower's own runtime."""

from fedinit.simulation.failures import ClientError, Failures
from fedinit.simulation.ray_grid import ENVIRONMENT, RayGrid, Workers, assign

__all__ = ["ENVIRONMENT", "ClientError", "Failures", "RayGrid", "Workers", "assign"]
