"""`fedinit bench`: RayGrid beside a bare PyTorch loop, in turn, on fixed or on a user's work."""
