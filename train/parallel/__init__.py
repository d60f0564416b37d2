"""Several processes on one model: FSDP2, sequences that are shared, what goes together."""
