"""Writing text with a model: one call, decodings as files, and a guard against loops."""
