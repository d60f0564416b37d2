"""Causal attention with a linear bias: one rule, and an implementation for each device."""
