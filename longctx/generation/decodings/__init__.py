"""Decodings, one to a file: each assigns its dataclass to `DECODING`."""
