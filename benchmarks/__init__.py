"""Speed and memory, each against a baseline that is interleaved in the same run."""
