"""Checkpoints in the hands of servers: one of our own, and what other engines need."""
