"""Every Triton kernel compiles for GPUs that are not here, without spills, within shared memory, with wide loads."""

import csv
import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; the interpreter cannot", allow_module_level=True)

from benchmarks import aot  # noqa: E402

# (kernel, variant, dtype, target): bytes or registers a thread that go to local memory, and why that is accepted.
# ptxas stays at 80 registers and keeps two words on the stack, before and after the main loop (read in the SASS).
SPILLS: dict[tuple[str, str, str, str], int] = {
    ("pair_chunks", "", "fp32", "sm_100"): 8,
    ("symmetric", "256x1024 add", "bf16", "sm_100"): 8,
    ("symmetric", "256x1024 add", "fp16", "sm_100"): 8,
}
if triton.__version__.startswith("3.6."):  # 3.9 keeps all in registers
    SPILLS["top_eigenpair", "20 steps", "any", "sm_90"] = 8
STREAMING = (
    "moments_chunks",
    "pair_chunks",
    "gram_narrow",
    "gram_wide",
)  # they read their input once, in loops


def is_aligned(variant: str) -> bool:
    return "unaligned" not in variant and not variant.startswith("250x333")


def loops(ptx: str) -> list[str]:
    """The text of every innermost loop: from a label to a branch back to it, without another such pair inside."""
    lines = ptx.splitlines()
    at = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if target and at.get(target[1], len(lines)) < i:
            spans.append((at[target[1]], i))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]


def check(row: aot.Row, asm: dict[str, str]) -> None:
    what = f"{row.kernel} ({row.variant}) {row.dtype} on {row.target}"
    allowed = SPILLS.get((row.kernel, row.variant, row.dtype, row.target), 0)
    assert row.spills <= allowed, f"{what}: {row.spills} spilled, {allowed} listed"
    limit = aot.SHARED_LIMIT[row.target]
    assert row.shared_bytes <= limit, f"{what}: {row.shared_bytes} bytes of shared memory, {limit} available"
    if row.kernel in ("symmetric", "update") and row.dtype != "fp32":
        expected = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
        default = "v_mfma" if row.target.startswith("gfx") else "mma.sync"
        assert row.mma == expected.get(row.target, default), f"{what}: {row.mma!r}"
    if row.dtype not in ("bf16", "fp16") or not is_aligned(row.variant):
        return
    if row.kernel in STREAMING and row.target.startswith("sm"):
        wide = [
            body for body in loops(asm["ptx"]) if re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64|b128)", body)
        ]
        assert wide, f"{what}: no loop with 16-byte loads"
        for body in wide:
            assert not re.search(r"ld\.global\S*\.b16", body), f"{what}: 16-bit loads in the main loop"
    elif row.kernel in STREAMING:
        assert re.search(r"(global|buffer)_load_dwordx[24]", asm["amdgcn"]), f"{what}: no wide loads"
    elif row.kernel in ("symmetric", "update") and row.target.startswith("sm"):
        assert "cp.async.cg.shared.global" in asm["ptx"], f"{what}: operands do not arrive in 16-byte copies"
        for body in loops(asm["ptx"]):
            assert not re.search(r"ld\.global\S*\.b16", body), f"{what}: 16-bit loads in the main loop"


def committed() -> dict[tuple[str, str, str, str], aot.Row]:
    integers = {"warps", "stages", "regs", "spills", "shared_bytes"}
    with aot.RESULTS.open() as file:
        rows = [
            aot.Row(**{k: int(v) if k in integers else v for k, v in line.items()})
            for line in csv.DictReader(file)
        ]
    return {(r.kernel, r.variant, r.dtype, r.target): r for r in rows}


def check_target(target: str, dtypes: tuple[torch.dtype, ...]) -> None:
    table = committed()
    for launch in aot.launches(target, dtypes):
        row, asm = aot.compile_launch(launch, target)
        check(row, asm)
        key = (row.kernel, row.variant, row.dtype, row.target)
        assert key in table, f"{key} is not in {aot.RESULTS.name}: run python benchmarks/aot.py"
        if table[key].triton == row.triton:
            assert row == table[key], "the table is out of date: run python benchmarks/aot.py"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_bf16_kernels_compile(target):
    check_target(target, (torch.bfloat16,))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_all_kernels_compile(target):
    check_target(target, aot.DTYPES)


def test_partial_sums_are_read_by_the_thread_that_wrote_them():
    """gram_wide adds to a partial in global memory: load and store must share one tensor of pointers."""
    for launch in aot.launches("sm_90", (torch.float32,)):
        if launch.kernel.fn.__name__ == "gram_wide":
            ir = aot.compile_launch(launch, "sm_90")[1]["ttgir"]
            stores = re.findall(r"tt\.store (%\w+), .*tensor<\d+x!tt\.ptr<f32>", ir)
            assert len(stores) == 2, "the main loop's and the tail's"
            for pointer in stores:
                assert re.search(rf"tt\.load {pointer},", ir), f"{pointer} is stored to and not loaded from"


def test_the_recorder_keeps_the_launchers_own_attributes():
    """What is compiled is what is launched: 16-byte alignment of tables, warps and stages as given."""
    with aot.recording("sm_90") as taken:
        from fastmon.kernels import moments

        moments.launch([torch.zeros(4096)], 2)
    kernel, args, kwargs = taken[0]
    options, signature, constants, attributes = aot.specialise(kernel, args, kwargs, aot.TARGETS["sm_90"])
    assert options.num_warps == moments.CHUNK_LAUNCH["num_warps"]
    assert options.num_stages == moments.CHUNK_LAUNCH["num_stages"]
    assert options.enable_fp_fusion
    assert signature["table"] == "*i64"
    assert ["tt.divisibility", 16] in attributes[(0,)]
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    assert named["ALIGNED"] is True
    assert named["CHUNK"] == moments.CHUNK
