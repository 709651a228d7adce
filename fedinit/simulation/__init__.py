"""Flower simulations on Ray, without the costs of Flower's own runtime."""

from fedinit.simulation.ray_grid import ENVIRONMENT, ClientError, RayGrid, Workers, assign

__all__ = ["ENVIRONMENT", "ClientError", "RayGrid", "Workers", "assign"]
