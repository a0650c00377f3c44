"""Benchmarks as data: named shapes, cases from the op tables, peers in the same run, committed CSVs.

    python -m benchmarks.run [--ops|--bars]  every row of every op and its peers; the promises, measured
    python -m benchmarks.overhead            what the monitor costs in the default run
    python -m benchmarks.tables [--check]    README tables from the committed CSVs
    python -m benchmarks.gpu_report --out D  everything a machine with a GPU can say, in one command
    pytest benchmarks --benchmark-enable     the same cases under pytest-benchmark

`--keep` writes the committed files in benchmarks/results/; without it results are printed, or go to `--out`.

Variants are interleaved in one process and compared as ratios of medians: on a shared machine an absolute
time says little, a ratio to `torch.sum` over the same bytes in the same seconds says a lot.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "20000"
)  # as train.py does, before torch is loaded (docs/measured.md)
