"""Flower simulations on Ray, without the costs of Flower's own runtime."""

from fedinit.simulation.ray_grid import ClientError, RayGrid, Workers

__all__ = ["ClientError", "RayGrid", "Workers"]
