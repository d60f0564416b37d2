"""What a GPU has to show, part by part: `python -m benchmarks.gpu [PART …]`, or `make gpu`.

On CUDA the sizes are those of one 80 GB card, and each part writes its own sections of RESULTS.md,
whose titles begin with "GPU: ". Elsewhere every part runs on sizes that a CPU is through with in
seconds, and its tables are printed only: that tries the code, and its figures mean nothing.
"""
