"""Intervals, paired tests, effective length and LongPPL."""
