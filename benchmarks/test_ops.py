"""The op cases under pytest-benchmark, one test per case and per implementation row or peer that runs here.

pytest benchmarks/test_ops.py --benchmark-enable --benchmark-group-by=group --benchmark-json=ops.json
"""

import pytest
import torch

from benchmarks import cases, peers
from fastmon.ops import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = [case for case in cases.CASES if DEVICE.type in case.devices]


def _pairs():
    for case in HERE:
        names = [*cases.row_names(OPS[case.op]), *(peer.name for peer in peers.PEERS if case.op in peer.ops)]
        for name in names:
            yield pytest.param(case, name, id=f"{case.id}-{name.replace(' ', '_')}")


@pytest.mark.parametrize(("case", "name"), _pairs())
def test_op(benchmark, case, name):
    one = cases.inputs(case, DEVICE)
    found, refused = cases.rows(OPS[case.op], case, [one], only=name)
    if name in refused:
        pytest.skip(refused[name])
    found = found or peers.variants(case, [one], only=name)
    if not found:
        pytest.skip("too large for this peer, or it needs a case with compile=True")
    variant = found[0]
    work = cases.traffic(OPS[case.op], one)
    benchmark.group = case.id
    benchmark.extra_info |= {
        "bytes": work.bytes,
        "flops": work.flops,
        "kind": variant.kind,
        "device": str(DEVICE),
    }

    def call():
        variant.function(*variant.args[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
