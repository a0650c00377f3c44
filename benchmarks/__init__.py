"""Benchmarks as data: named shapes, cases from the op tables, peers in the same run, committed CSVs.

    python -m benchmarks.run --ops         every row of every op and its peers ->
    benchmarks/results/ops_cpu.csv python -m benchmarks.run --bars        the promises, measured ->
    benchmarks/results/bars_cpu.csv python -m benchmarks.overhead          what the monitor costs in the
    default run -> overhead.csv python -m benchmarks.tables [--check]  README tables from the committed CSVs
    pytest benchmarks --benchmark-enable   the same cases under pytest-benchmark

Variants are interleaved in one process and compared as ratios of medians: on a shared machine an absolute
time says little, a ratio to `torch.sum` over the same bytes in the same seconds says a lot.
"""
