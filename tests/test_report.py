"""The run summary: numbers in the Markdown are those of the log, trouble is named, plots appear where
matplotlib is."""

import json
import math
import subprocess
import sys

import pytest

from fastmon.report import read_run, write_summary
from fastmon.report.plots import PANELS, _limits, _running
from fastmon.report.runlog import Series, nonfinite_name

HEADER = {
    "fastmon": 1,
    "config": {
        "workload": "gpt",
        "mode": "nano",
        "optimizer": "muon",
        "lr": 0.002,
        "width": None,
        "monitor": "usual",
    },
    "device": "a CPU",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567-dirty",
}


def row(step, **values):
    return {"step": step, "time": 1e9 + step, "rank": 0} | values


def losses(count):
    return [
        row(step, **{"Loss/train_loss": 9.0 - step / 10, "Time/step_ms": 50.0})
        for step in range(1, count + 1)
    ]


@pytest.fixture
def write_run(tmp_path):
    def write(rows, *, header=HEADER, params=None, torn=""):
        folder = tmp_path / "speedrun_test"
        folder.mkdir()
        lines = [json.dumps(header), *map(json.dumps, rows)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)
        if params is not None:
            (folder / "params.jsonl").write_text("\n".join(map(json.dumps, [header, *params])) + "\n")
        return folder

    return write


def test_rows_numbers_and_nonfinite_strings(write_run):
    rows = [
        row(1, **{"Loss/train_loss": 3}),
        row(2, **{"Loss/train_loss": "NaN"}),
        row(3, **{"a": "-Infinity"}),
    ]
    log = read_run(write_run(rows) / "metrics.jsonl")
    assert log.header["device"] == "a CPU"
    assert log.series("Loss/train_loss") == Series([1], [3.0])
    (first, second) = log.nonfinite
    assert first[:2] == (2, "Loss/train_loss")
    assert math.isnan(first[2])
    assert second == (3, "a", -math.inf)
    assert [nonfinite_name(x) for x in (math.nan, math.inf, -math.inf)] == ["NaN", "Infinity", "-Infinity"]


def test_broken_lines_are_counted_and_named(write_run):
    torn = '[1, 2]\n{"step": "x"}\n{"step": 4, "Loss/tra'
    folder = write_run(losses(3), torn=torn)
    log = read_run(folder / "metrics.jsonl")
    assert [number for number, _ in log.broken] == [5, 6, 7]
    assert len(log.rows) == 3
    text = write_summary(folder).read_text()
    assert (
        "3 unreadable in `metrics.jsonl`: line 5: expected an object, found list; line 6: step is 'x'" in text
    )


def test_events_are_no_rows_and_are_told(write_run):
    event = row(2, event="monitor switched off", monitor="spectral", error="ValueError: bad")
    folder = write_run([*losses(2), event])
    log = read_run(folder / "metrics.jsonl")
    assert len(log.rows) == 2
    assert (
        "- monitor switched off at step 2 (monitor spectral, error ValueError: bad)"
        in write_summary(folder).read_text()
    )


def test_loss_table_has_first_best_and_last(write_run):
    values = [5.0, 2.5, 3.25]
    rows = [row(10 * i, **{"Loss/train_loss": value}) for i, value in enumerate(values, start=1)]
    rows.append(row(30, **{"Loss/val_loss": 4.5}))
    text = write_summary(write_run(rows)).read_text()
    assert "| train_loss | 5.0000 (step 10) | 2.5000 (step 20) | 3.2500 (step 30) |" in text
    assert "| val_loss | 4.5000 (step 30) | 4.5000 (step 30) | 4.5000 (step 30) |" in text
    assert text.index("train_loss") < text.index("val_loss")


def test_figures_skip_the_first_step_and_absent_metrics(write_run):
    rows = [row(1, **{"Time/step_ms": 900.0, "Time/monitor_ms": 90.0, "Time/tokens_per_s": 1.0})]
    for step in (2, 3):
        timing = {"Time/step_ms": 100.0, "Time/monitor_ms": 0.5, "Time/tokens_per_s": 10_240.0}
        rows.append(row(step, **timing, **{"Time/training_time_ms": 1000.0 + 100 * (step - 1)}))
    text = write_summary(write_run(rows)).read_text()
    assert "| the monitor's own cost | 0.500 ms a step, 0.50 % of the step |" in text
    assert "| tokens per second | 10,240 |" in text
    assert "| training time | 1.2 s |" in text
    assert "| steps | 3 |" in text
    assert "utilisation" not in text
    assert "memory" not in text


def test_what_ran_leaves_out_what_is_not_set(write_run):
    text = write_summary(write_run(losses(2))).read_text()
    assert "workload gpt, mode nano, optimizer muon, lr 0.002, monitor usual." in text
    assert "width" not in text
    assert "device a CPU; torch 2.13.0, python 3.11.7; commit 0123456789-dirty." in text


def test_matrices_from_the_parameter_log(write_run):
    def sigma(name):
        return f"Model/spectral_norm/{name}"

    params = [
        row(1, **{sigma("a"): 2.0, sigma("b"): 0.5, "Model/stable_rank/a": 30.0, "Model/stable_rank/b": 9.0}),
        row(
            9, **{sigma("a"): 3.0, sigma("b"): 2.0, "Model/stable_rank/a": 20.0, "Model/stable_rank/b": 25.0}
        ),
    ]
    text = write_summary(write_run(losses(9), params=params)).read_text()
    assert "- largest spectral norm: `a` 3" in text
    assert "- largest growth: `b` x4 (0.5 at step 1, 2 at step 9)" in text
    assert "- lowest stable rank: `a` 20" in text
    assert "update ratio" not in text


def test_trouble_names_metric_step_and_count(write_run):
    rows = [
        *losses(3),
        row(4, **{"Loss/train_loss": "NaN", "Gradients/nonfinite": 7}),
        row(5, **{"Loss/train_loss": "NaN"}),
    ]
    text = write_summary(write_run(rows)).read_text()
    assert "- `Loss/train_loss` was not finite 2 times, first NaN at step 4" in text
    assert "- non-finite gradients in 1 steps, first at step 4 (7 elements)" in text


def test_clean_run_says_so(write_run):
    assert "None. Every logged value is finite" in write_summary(write_run(losses(3))).read_text()


def test_empty_log_has_a_summary_without_plots(write_run):
    folder = write_run([])
    text = write_summary(folder).read_text()
    assert "The log holds no rows." in text
    assert "summary.png" not in text
    assert not (folder / "summary.png").exists()


def test_missing_log_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_summary(tmp_path)


def test_the_picture_is_a_png_with_panels_for_what_was_logged(write_run):
    pytest.importorskip("matplotlib")
    rows = losses(60)
    rows[30]["Loss/train_loss"] = "NaN"
    folder = write_run(rows)
    assert "![" in write_summary(folder).read_text()
    few = (folder / "summary.png").read_bytes()
    assert few[:8] == b"\x89PNG\r\n\x1a\n"
    for entry in rows:
        entry |= {"Optimization/lr": 1e-3, "Optimization/grad_norm": 2.0, "Model/spectral_norm_max": 3.0}
    folder.joinpath("metrics.jsonl").write_text("\n".join(map(json.dumps, [HEADER, *rows])))
    write_summary(folder)
    width, height = (
        int.from_bytes((folder / "summary.png").read_bytes()[at : at + 4], "big") for at in (16, 20)
    )
    assert height > int.from_bytes(few[20:24], "big")  # five panels need more rows than two
    assert width == int.from_bytes(few[16:20], "big")


def test_without_matplotlib_the_summary_says_how_to_get_it(write_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_run(losses(5))
    text = write_summary(folder).read_text()
    assert "pip install 'fastmon[plots]'" in text
    assert "train_loss" in text
    assert not (folder / "summary.png").exists()


def test_axis_limits_cut_a_start_up_spike_and_nothing_else():
    steady = [100.0 + i % 3 for i in range(99)]
    low, high = _limits([5000.0, *steady], log=False)
    assert 102 < high < 200
    assert low < 100
    assert _limits(steady, log=False)[1] < 103
    assert _limits([0.01, 10.0], log=True) == pytest.approx((0.01 / 1.3, 13.0))


def test_running_median_ignores_an_outlier_and_keeps_the_length():
    values = [1.0] * 20
    values[7] = 50.0
    smooth = _running(values, 5, lambda part: sorted(part)[len(part) // 2])
    assert smooth == [1.0] * 20


def test_every_plotted_metric_exists():
    from fastmon.metrics import METRICS

    plotted = {line.metric for panel in PANELS for line in panel.lines}
    assert plotted <= set(METRICS)


def test_reading_a_report_needs_no_torch():
    code = "import sys, fastmon.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
