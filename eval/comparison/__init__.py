"""Sweeps side by side, on the same inputs."""
