"""Decodings compared: what models and decodings do to text that is written on."""
