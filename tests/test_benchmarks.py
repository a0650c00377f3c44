"""The benchmark machinery: cases refer to what exists, shapes count right, ratios and tables say what they
should."""

import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bars,
    cases,
    frozen_ns5_power,
    peers,
    record,
    roofline,
    run,
    shapes,
    stamp,
    timing,
)
from fastmon import ops
from fastmon.backend import Traffic
from fastmon.ops import OPS

CPU = torch.device("cpu")
SMALL = {"elements": 600_000}


# -- shapes and cases ------------------------------------------------------------------------------------------------


def test_gpt2_has_48_hidden_matrices_and_124m_parameters():
    assert len(shapes.SHAPES["gpt2-124m-hidden"]) == 48
    assert shapes.elements("gpt2-124m-hidden") == 84_934_656 == shapes.elements("flat-85m")
    assert len(shapes.SHAPES["gpt2-124m"]) == 148
    assert shapes.elements("gpt2-124m") == 124_439_808
    assert len(shapes.SHAPES["many-small"]) == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tensors_share_one_buffer_on_64_byte_lines(dtype):
    flat, views = shapes.packed("odd", dtype=dtype, seed=3)
    assert [tuple(view.shape) for view in views] == list(shapes.SHAPES["odd"])
    assert all((view.data_ptr() - flat.data_ptr()) % 64 == 0 for view in views)
    assert flat.view(torch.float32).numel() * 4 == flat.numel() * flat.element_size()
    total = sum(view.double().square().sum() for view in views)
    torch.testing.assert_close(flat.double().square().sum(), total)  # the padding is zero
    big = shapes.packed("odd", dtype=dtype, seed=3, scale=2.0)[1][3].double()
    assert big.std() == pytest.approx(2.0, rel=0.1)


def test_packing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    shapes.packed("tiny", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_every_op_has_arguments_and_a_case():
    assert set(cases.ARGUMENTS) == set(OPS)
    assert {case.op for case in cases.CASES} == set(OPS)


def test_cases_name_what_exists():
    ids = [case.id for case in cases.CASES]
    assert len(set(ids)) == len(ids)
    for case in cases.CASES:
        assert case.shape in shapes.SHAPES
        assert set(case.devices) <= {"cpu", "cuda"}
    for peer in peers.PEERS:
        assert set(peer.ops) <= set(OPS)


@pytest.mark.parametrize("name", sorted(cases.ARGUMENTS))
def test_arguments_fit_the_schema_and_the_traffic_is_counted(name):
    one = cases.inputs(cases.Case(name, "tiny", torch.float32), CPU)
    OPS[name](*one.args)
    work = cases.traffic(OPS[name], one)
    assert work.bytes > 0
    assert work.flops >= 0


def test_variants_cover_all_rows_and_give_the_ops_result():
    case = cases.Case("pair_moments", "odd", torch.float32)
    one = cases.inputs(case, CPU)
    found, refused = cases.rows(OPS["pair_moments"], case, [one])
    assert {variant.name for variant in found} | set(refused) == set(cases.row_names(OPS["pair_moments"]))
    assert "compile" in refused  # the case did not ask for it
    truth = ops.pair_moments(*one.args).dot
    for variant in found:
        torch.testing.assert_close(variant.function(*variant.args[0])[0], truth, rtol=1e-4, atol=1e-6)
    assert [v.name for v in cases.rows(OPS["pair_moments"], case, [one], only="eager")[0]] == ["eager"]


def test_a_state_is_not_shared_between_rows():
    case = cases.Case("spectral_norm", "tiny", torch.float32)
    one = cases.inputs(case, CPU)
    before = one.args[1].clone()
    found, _ = cases.rows(OPS["spectral_norm"], case, [one])
    for variant in found:
        variant.function(*variant.args[0])
        assert not torch.equal(variant.args[0][1], before)
    assert torch.equal(one.args[1], before)


def test_a_cold_op_starts_cold_at_every_call():
    one = cases.inputs(cases.Case("lanczos", "tiny", torch.float32), CPU)
    found, _ = cases.rows(OPS["lanczos"], cases.Case("lanczos", "tiny", torch.float32), [one])
    for variant in found:
        variant.function(*variant.args[0])
        assert torch.equal(variant.args[0][1], one.args[1])


def test_peers_compute_what_they_stand_for():
    case = cases.Case("pair_moments", "odd", torch.float32)
    one = cases.inputs(case, CPU)
    bound = {variant.name: variant for variant in peers.variants(case, [one])}
    results = {name: variant.function(*variant.args[0]) for name, variant in bound.items()}
    truth = ops.pair_moments(*one.args)
    torch.testing.assert_close(
        torch.stack(results["F.cosine_similarity"]), truth.cosine, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(torch.stack(results["_foreach_norm"][1]), truth.y_l2)
    torch.testing.assert_close(results["torch.sum"][0], one.flats[0].sum())
    assert "compiled sums" not in bound
    big = cases.Case("spectral_norm", "gpt2-124m-hidden", torch.float32)
    peer = next(peer for peer in peers.PEERS if peer.name == "matrix_norm(ord=2)")
    assert shapes.elements(big.shape) > peer.most  # 48 full SVDs would take minutes


def test_the_frozen_baseline_is_near_and_above_nothing_it_should_not_be():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(96, 64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    w = 3 * u * torch.arange(1, 65) ** -1.0 @ v.T
    (sigma,) = frozen_ns5_power.spectral_norms([w])
    assert 0.7 * 3 < sigma < 1.02 * 3
    factor = torch.linalg.svdvals(frozen_ns5_power.polar_factor(torch.randn(64, 128, generator=generator)))
    assert 0.5 < factor.min() < factor.max() < 1.3


# -- timing ----------------------------------------------------------------------------------------------------------


def test_timing_summary():
    t = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (t.median, t.p20, t.p80, t.n) == (3.5, 2.0, 5.0, 6)
    assert t.samples == (5.0, 1.0, 2.0, 4.0, 3.0, 100.0)


def test_interleave_runs_every_variant_each_round_in_rotated_order():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timed = timing.interleave(variants, seconds=0, min_rounds=4)
    assert {t.n for t in timed.values()} == {4}
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"  # two warm-ups, four rounds


def test_slow_variants_run_few_rounds():
    count = {"slow": 0, "fast": 0}

    def slow():
        count["slow"] += 1
        time.sleep(0.02)

    def fast():
        count["fast"] += 1

    timed = timing.interleave(
        {"slow": slow, "fast": fast}, seconds=0, min_rounds=10, slow_ms=10, slow_rounds=2
    )
    assert (count["slow"], timed["slow"].n, timed["fast"].n) == (3, 2, 10)
    assert timed["slow"].median >= 20
    assert timing.ratio(timed["slow"], timed["fast"]).n == 2
    once = timing.interleave({"slow": slow, "fast": fast}, seconds=0, min_rounds=10, once_ms=10)
    assert (count["slow"], once["slow"].n, once["fast"].n) == (4, 1, 10)


def test_ratio_is_paired_so_common_noise_cancels():
    noise = [1.0, 3.0, 10.0, 1.5, 2.0, 40.0, 1.0]
    found = timing.paired_ratio([1.02 * x for x in noise], noise)
    assert found.median == pytest.approx(1.02)
    assert found.low == pytest.approx(1.02)
    assert found.high == pytest.approx(1.02)
    spread = timing.paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0] * 4, [1.0] * 20)
    assert spread.low < spread.median == 3.0 < spread.high


def test_rotation_walks_through_the_input_sets():
    seen = []
    call = timing.rotate(seen.append, [("a",), ("b",), ("c",)])
    for _ in range(4):
        call()
    assert sorted(seen[:3]) == ["a", "b", "c"]
    assert seen[3] == seen[0]


def test_one_input_set_on_the_cpu():
    assert timing.input_sets(1000, 1, CPU) == 1


def test_a_cold_rotation_passes_three_times_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 50 << 20)
    gpu = torch.device("cuda")
    for size in (1 << 20, 10 << 20, 100 << 20, 1 << 30):
        count = timing.input_sets(size, 4, gpu)
        assert 2 <= count <= 32
        assert count == 32 or count * size > 3 * (50 << 20)
    assert timing.input_sets(4 << 20, 2000, gpu) == 1


def test_roofline_share():
    ceiling = roofline.Roofline(read=40e9, copy=20e9, flops={torch.float32: 1e12})
    assert ceiling.share(Traffic(40_000_000, 1), 2.0, torch.float32) == pytest.approx(0.5)
    assert ceiling.share(Traffic(1000, 10**9), 2.0, torch.float32) == pytest.approx(
        0.5
    )  # bound by arithmetic


# -- records, bars, runner -------------------------------------------------------------------------------------------


def test_numbers_have_no_exponent():
    assert [record.number(x) for x in (0, 0.0123456, 12.345, 1234567.0)] == ["0", "0.0123", "12.3", "1230000"]
    assert record.number(math.nan) == "nan"


def test_csv_leaves_the_old_file_until_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "x.csv"
    path.parent.mkdir()
    path.write_text("old\n")
    sink = record.Csv(path, ("a", "b"))
    sink.add({"a": "1", "b": "x,y"})
    assert path.read_text() == "old\n"
    sink.close()
    assert record.read(path) == [{"a": "1", "b": "x,y"}]
    assert [entry.name for entry in path.parent.iterdir()] == ["x.csv"]
    partial = record.Csv(path, ("a",), partial=True)
    partial.add({"a": "2"})
    assert record.read(path) == [{"a": "2"}]
    with pytest.raises(ValueError, match="fields not in"):
        partial.add({"z": "3"})
    partial.close()


def test_a_bar_is_met_or_not_and_nan_never_meets_one():
    def bar(value, at_most):
        return bars.Bar("x", value, 1.0, at_most, "x", "")

    assert bar(0.9, True).met
    assert not bar(1.1, True).met
    assert bar(1.1, False).met
    assert not bar(0.9, False).met
    assert not bar(math.nan, True).met
    assert not bar(math.nan, False).met
    assert set(bar(0.9, True).row()) <= set(bars.COLUMNS)


def test_cold_accuracy_sees_a_nan(monkeypatch):
    real = ops.lanczos_norm
    calls = []

    def broken(w, *, seed=0):
        calls.append(seed)
        result = real(w, iters=2, seed=seed)
        return result._replace(sigma=result.sigma * math.nan) if len(calls) == 2 else result

    monkeypatch.setattr(bars.ops, "lanczos_norm", broken)
    w = torch.randn(8, 8, dtype=torch.float64)
    monkeypatch.setattr(bars, "_spectra", lambda: iter([("one", w)]))
    (bar,) = bars.cold_accuracy(CPU)
    assert not bar.met
    assert math.isnan(bar.value)


def test_runner_measures_a_case_and_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", (cases.Case("moments", "tiny", torch.float32),))
    ceiling = roofline.Roofline(1e10, 1e10, {})
    monkeypatch.setattr(roofline, "measure", lambda device: ceiling)
    found = run.run_ops(CPU, seconds=0.01, out=tmp_path / "ops.csv")
    rows = record.read(tmp_path / "ops.csv")
    assert rows == found
    assert {"torch.sum", "eager", "_foreach_norm"} <= {row["variant"] for row in rows}
    elements = shapes.elements("tiny")
    one = next(row for row in rows if row["variant"] == "eager")
    assert float(one["gb_per_s"]) == pytest.approx(4 * elements / float(one["ms"]) / 1e6, rel=0.02)
    assert (one["torch"], one["threads"]) == (torch.__version__, str(torch.get_num_threads()))
    assert "moments-tiny-float32" in capsys.readouterr().out


def test_stamp_names_device_versions_and_commit():
    facts = stamp.stamp(CPU)
    assert set(facts) <= set(run.COLUMNS)
    assert set(facts) <= set(bars.COLUMNS)
    assert facts["threads"] == str(torch.get_num_threads())


# -- the monitored loop ----------------------------------------------------------------------------------------------


def test_every_metric_belongs_to_one_part_of_the_overhead_benchmark():
    from benchmarks import loop

    assert loop.uncovered() == []


def test_monitored_and_unmonitored_copies_of_the_run_compute_the_same(tmp_path):
    from benchmarks import loop, overhead

    data = loop.random_shards(tmp_path, vocab=8192, tokens=50_000)
    cfg = loop.default_config("nano", seq_len=16, batch_size=2, **data)
    jobs = {name: loop.Loop(name, cfg, CPU) for name in ("off", "usual")}
    times = overhead.measure(jobs, seconds=0, stretch=1, warmup=1)
    assert {len(values) for values in times.values()} == {5}
    weights = [[p.detach().clone() for p in job.job.bare.parameters()] for job in jobs.values()]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    logged = (jobs["usual"]._folder.name, jobs["off"]._folder.name)
    usual, off = (Path(name, "metrics.jsonl").read_text() for name in logged)
    assert '"Model/spectral_norm_max": ' in usual.partition("\n")[2]
    assert '"Model/spectral_norm_max": ' not in off.partition("\n")[2]
    for job in jobs.values():
        job.close()
    (row,) = overhead.rows({"off": [10.0, 20.0, 10.0], "usual": [10.1, 20.2, 13.1]}, mode="nano", stretch=2)
    assert (row["variant"], row["ratio"], row["steps"]) == ("usual", "1.0100", "6")
    assert float(row["total_ratio"]) == pytest.approx(43.4 / 40, abs=1e-4)
