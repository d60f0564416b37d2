"""Checkpoints in the engines that serve them: exported, started, and held against our numbers."""
