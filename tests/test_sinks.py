"""Console lines, JSONL files, and sinks that fail."""

import io
import json
import logging
import math
import sys
import warnings
from unittest import mock

import pytest

import fastmon
from fastmon import sinks
from fastmon.sinks import Console, Fanout, Jsonl, Null, Row


def row(step, **values):
    return Row(step, time=100.0 + step, values={k.replace("__", "/"): v for k, v in values.items()})


def train(step, total=1750):
    return row(step, Loss__train_loss=3.41231, Time__training_time_ms=180420.0, Time__step_avg_ms=180.42)


def test_console_prints_the_established_lines():
    text = io.StringIO()
    console = Console(log_interval=10, total_steps=1750, stream=text)
    console.write(train(1000))
    both = train(1000)
    both.values["Loss/val_loss"] = 3.2847
    console.write(both)
    assert text.getvalue().splitlines() == [
        "step:1000/1750 train_loss:3.4123 train_time:180420.0ms step_avg:180.42ms",
        "step:1000/1750 val_loss:3.2847 train_time:180420.0ms step_avg:180.42ms",
    ]


def test_console_prints_the_first_the_last_the_validated_and_every_nth_step():
    text = io.StringIO()
    console = Console(log_interval=4, total_steps=10, stream=text)
    for step in range(1, 11):
        one = train(step)
        if step == 6:
            one.values["Loss/val_loss"] = 1.0
        console.write(one)
    console.close()
    assert [line.split("/")[0] for line in text.getvalue().splitlines()] == [
        f"step:{step}" for step in (1, 4, 6, 8, 10)
    ]
    assert "\x1b" not in text.getvalue()
    assert "\r" not in text.getvalue()


def test_console_shows_a_bar_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = Terminal()
    console = Console(log_interval=100, total_steps=4, stream=text)
    moving = train(2)
    moving.values["Time/eta_s"] = 3725.0
    console.write(moving)
    assert text.getvalue() == "\r[###############...............] 2/4 ETA 1:02:05"


def test_console_leaves_out_what_is_absent():
    text = io.StringIO()
    Console(stream=text).write(row(1))
    assert text.getvalue() == "step:1\n"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_a_header_flat_rows_and_spelled_out_nonfinite_values(tmp_path):
    sink = Jsonl(tmp_path / "run", header={"config": {"lr": math.inf}, "git_commit": "abc"})
    one = row(
        1, Loss__train_loss=3.4, Model__param_norm=math.nan, Time__eta_s=-math.inf, Time__step_ms=math.inf
    )
    one.event("nonfinite_gradient", parameter="w", count=3)
    one.params = {"Gradients/norm/w": 0.125, "Gradients/norm/b": math.nan}
    sink.write(one)
    header, first, event = lines(tmp_path / "run" / "metrics.jsonl")  # written before close
    assert header["fastmon"] == 1
    assert header["config"] == {"lr": "Infinity"}
    assert header["git_commit"] == "abc"
    assert header["units"]["Time/step_ms"] == "ms"
    assert first == {
        "step": 1,
        "time": 101.0,
        "rank": 0,
        "Loss/train_loss": 3.4,
        "Model/param_norm": "NaN",
        "Time/eta_s": "-Infinity",
        "Time/step_ms": "Infinity",
    }
    assert event == {
        "step": 1,
        "time": 101.0,
        "rank": 0,
        "event": "nonfinite_gradient",
        "parameter": "w",
        "count": 3,
    }
    params = lines(tmp_path / "run" / "params.jsonl")
    assert params[0]["units"]
    assert params[1] == {
        "step": 1,
        "time": 101.0,
        "rank": 0,
        "Gradients/norm/w": 0.125,
        "Gradients/norm/b": "NaN",
    }
    sink.close()


def test_jsonl_keeps_older_runs_and_appends_when_told(tmp_path):
    for value in (1.0, 2.0):
        sink = Jsonl(tmp_path)
        sink.write(row(1, Loss__train_loss=value))
        sink.close()
    assert lines(tmp_path / "metrics.1.jsonl")[1]["Loss/train_loss"] == 1.0
    sink = Jsonl(tmp_path, append=True)
    sink.write(row(2, Loss__train_loss=3.0))
    sink.close()
    assert [entry.get("Loss/train_loss") for entry in lines(tmp_path / "metrics.jsonl")] == [None, 2.0, 3.0]
    assert not (tmp_path / "metrics.2.jsonl").exists()


def test_jsonl_refuses_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Jsonl(tmp_path / "file")


def test_params_are_thinned_past_their_size_and_it_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sinks, "PARAMS_BYTES", 20_000)
    monkeypatch.setattr(sinks, "PARAMS_STEPS", 100)
    caplog.set_level(logging.WARNING, "fastmon")
    sink = Jsonl(tmp_path)
    for step in range(1, 1001):
        one = row(step)
        one.params = {f"Gradients/norm/layer{i}": 1.0 for i in range(40)}
        sink.write(one)
    sink.close()
    kept = [entry["step"] for entry in lines(tmp_path / "params.jsonl")[1:]]
    assert kept[:5] == [1, 2, 3, 4, 5], "nothing is thinned before the size is reached"
    strides = {b - a for a, b in zip(kept[-6:], kept[-5:], strict=False)}
    assert len(strides) == 1
    assert strides.pop() > 1
    assert (tmp_path / "params.jsonl").stat().st_size < 1.5 * 20_000 * 10
    assert len([r for r in caplog.records if "params.jsonl" in r.message]) == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 1001, "metrics.jsonl keeps every row"


def test_a_resumed_run_thins_by_the_size_of_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "PARAMS_BYTES", 20_000)
    monkeypatch.setattr(sinks, "PARAMS_STEPS", 100)

    def write(steps):
        sink = Jsonl(tmp_path, append=True)
        for step in steps:
            one = row(step)
            one.params = {f"Gradients/norm/layer{i}": 1.0 for i in range(40)}
            sink.write(one)
        sink.close()
        return sink._stride

    assert write(range(1, 301)) == write(range(301, 601)), "rows of the same size"


def test_simple_logger_prints_and_keeps_what_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = fastmon.SimpleLogger(False, "demo", "first", {"lr": 0.1})
    logger.log_step(10, 100, val_loss=3.28471, train_time_ms=1804.2)
    logger.log({"my/number": 7})
    logger.close()
    assert capsys.readouterr().out == "step:10/100 val_loss:3.2847 train_time:1804.2ms step_avg:180.42ms\n"
    header, first, second = lines(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert header["config"] == {"lr": 0.1}
    assert (first["step"], first["Loss/val_loss"]) == (10, 3.28471)
    assert first["Time/step_avg_ms"] == pytest.approx(180.42)
    assert (second["step"], second["my/number"]) == (10, 7.0)


def test_simple_logger_hands_on_to_wandb_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"use_wandb=True wants wandb: pip install 'fastmon\[wandb\]'"):
        fastmon.SimpleLogger(True, "demo")
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = fastmon.SimpleLogger(True, "demo", config={"lr": 0.1})
    logger.log_step(3, train_loss=2.0)
    logger.close()
    wandb.init.assert_called_once_with(project="demo", name=None, config={"lr": 0.1})
    wandb.init().log.assert_called_once_with({"Loss/train_loss": 2.0}, step=3)
    wandb.init().finish.assert_called_once_with()


class Broken(Null):
    def __init__(self):
        self.calls = 0

    def write(self, row):
        self.calls += 1
        raise RuntimeError("disk on fire")


def test_a_sink_that_raises_is_switched_off_with_one_warning_and_the_others_go_on(tmp_path):
    broken, good = Broken(), Jsonl(tmp_path)
    both = Fanout([broken, good])
    with pytest.warns(RuntimeWarning, match="Broken is switched off: RuntimeError: disk on fire"):
        both.write(row(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both.write(row(2))
        both.write(row(3))
    assert broken.calls == 1
    assert [entry.get("step") for entry in lines(tmp_path / "metrics.jsonl")] == [None, 1, 2, 3]
    both.close()
