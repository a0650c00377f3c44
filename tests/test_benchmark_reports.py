"""README tables and the GPU report: generated from results, checked, partial results kept, failures named."""

import subprocess
import sys

import pytest
import torch

from benchmarks import bars, gpu_checks, gpu_report, record, stamp, tables
from fastmon.ops import OPS

CPU = torch.device("cpu")


# -- tables ----------------------------------------------------------------------------------------------------------

BARS_ROW = {
    "bar": "spectral",
    "value": "1.21",
    "low": "1.19",
    "high": "1.24",
    "unit": "x",
    "limit": "<= 1.3",
    "met": "yes",
}
STAMP = {"device": "a CPU", "threads": "2", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01"}


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    sink = record.Csv(tmp_path / "bars_cpu.csv", bars.COLUMNS)
    sink.add(BARS_ROW | STAMP)
    sink.close()
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table:bars -->\nstale\n<!-- /table:bars -->\nafter\n")
    return path


def test_tables_are_written_checked_and_stable(readme, capsys):
    words = ["--readme", str(readme)]
    assert tables.main([*words, "--check"]) == 1
    assert "stale" in readme.read_text()  # checking writes nothing
    assert "out of date" in capsys.readouterr().err
    assert tables.main(words) == 0
    text = readme.read_text()
    assert "| spectral | 1.21 x (1.19 to 1.24) | <= 1.3 | yes |" in text
    assert "a CPU, 2 threads, torch 2.13.0, 2026-01-01, commit abc" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert tables.main([*words, "--check"]) == 0
    assert tables.main(words) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table:nothing -->\n<!-- /table:nothing -->", "no table is called 'nothing'"),
        ("<!-- table:bars -->\nno end", "has no counterpart"),
        ("<!-- table:overhead -->\n<!-- /table:overhead -->", "overhead.csv is missing"),
    ],
)
def test_bad_markers_and_missing_results_are_named(readme, capsys, text, said):
    readme.write_text(text)
    assert tables.main(["--readme", str(readme)]) == 2
    assert said in capsys.readouterr().err
    assert readme.read_text() == text


def test_ops_and_metrics_tables_have_a_row_each():
    from fastmon.metrics import METRICS

    made = tables.ops_table()
    assert all(f"| `{name}` |" in made for name in OPS)
    assert "cpp" in made
    assert all(f"`{name}`" in tables.metrics_table() for name in METRICS)


def test_overhead_is_shown_in_percent(readme):
    columns = (
        "variant",
        "mode",
        "steps",
        "off_ms",
        "ratio",
        "low",
        "high",
        "total_ratio",
        "total_low",
        "total_high",
        *STAMP,
    )
    sink = record.Csv(record.RESULTS / "overhead.csv", columns)
    measured = {"ratio": "1.0062", "low": "1.0041", "high": "1.0080"}
    measured |= {"total_ratio": "1.0075", "total_low": "1.0050", "total_high": "1.0100"}
    sink.add({"variant": "usual", "mode": "nano", "steps": "400", "off_ms": "81.20", **measured, **STAMP})
    sink.close()
    assert (
        "| `usual` | +0.62 % (+0.41 to +0.80) | +0.75 % (+0.50 to +1.00) | 400 |" in tables.overhead_table()
    )


# -- the GPU report --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_gpu_report_without_a_gpu_says_so_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=stamp.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_gpu_report_keeps_partial_results_and_goes_on(tmp_path):
    out = tmp_path / "out"
    lines = ",".join(gpu_checks.COLUMNS) + "\nsync,moments,triton,odd,float32,ok,\n"
    writing = f"open({str(out / 'checks.csv')!r}, 'w').write({lines!r})"
    code = f"import time; {writing}; print('half', flush=True); time.sleep(60)"
    plan = (
        gpu_report.Stage("cut", (sys.executable, "-c", code), 6),
        gpu_report.Stage("bad", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 30),
        gpu_report.Stage("absent", ("x",), 30, needs="no-such-program"),
        gpu_report.Stage("fine", (sys.executable, "-c", "print('done')"), 30),
        gpu_report.Stage("late", (sys.executable, "-c", ""), 30, reserve=1000),
    )
    assert not gpu_report.run(out, plan, {"device": "a GPU"}, cwd=tmp_path, total_s=60)
    text = (out / "report.md").read_text()
    for line in (
        "| cut | cut off after 6 s |",
        "| bad | failed (exit code 3) |",
        "| absent | skipped: no-such-program",
    ):
        assert line in text
    assert "| fine | ok |" in text
    assert "| late | skipped: no time left |" in text
    assert "| sync | moments | triton | 1/1 |" in text
    assert "why" in text
    assert "half" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 8


def test_gpu_report_plans_at_most_eight_files(tmp_path):
    named = {word for stage in gpu_report.stages(tmp_path) for word in stage.command if word.endswith(".csv")}
    assert len(named | {"ops_cuda.csv", "bars_cuda.csv", "report.md", "log.txt"}) <= 8
    assert sum(min(stage.budget, 150) for stage in gpu_report.stages(tmp_path)) > gpu_report.TOTAL_S / 2
    assert gpu_report.TOTAL_S < 9 * 60


def test_device_checks_pass_here_and_catch_a_wrong_row(monkeypatch):
    monkeypatch.setattr(gpu_checks, "SHAPES", ("tiny",))
    outcomes = list(gpu_checks.run_rows(gpu_checks.agreement, "agreement", CPU))
    assert {outcome.op for outcome in outcomes} == set(OPS)
    assert [outcome for outcome in outcomes if outcome.result != "ok"] == []
    op = OPS["moments"]
    monkeypatch.setattr(op, "reference", lambda *args: tuple(x * 1.5 for x in op.impls[-1].function()(*args)))
    bad = [o for o in gpu_checks.run_rows(gpu_checks.agreement, "agreement", CPU) if o.op == "moments"]
    assert bad
    assert {outcome.result for outcome in bad} == {"failed"}
