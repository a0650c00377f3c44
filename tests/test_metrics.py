"""The table of names, presets, schedules and lookups."""

import subprocess
import sys

import pytest

from fastmon import metrics
from fastmon.metrics import METRICS, PRESETS, Calendar, Metric, Schedule, lookup, plan_schedules
from fastmon.monitors import observer_classes

GIVEN = "given to Monitor.step"


def test_every_name_is_filled_by_exactly_one_observer_or_given():
    filled = [name for kind in observer_classes() for name in kind.FILLS]
    assert len(filled) == len(set(filled)), "two observers fill one name"
    given = {metric.name for metric in METRICS.values() if metric.source == GIVEN}
    assert set(filled) | given == set(METRICS)
    assert not set(filled) & given


def test_importing_the_table_leaves_torch_and_numpy_out():
    code = "import sys, fastmon.metrics; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


def test_presets_nest_and_off_is_empty():
    plans = [set(plan_schedules(preset)) for preset in PRESETS]
    assert plans[0] == set()
    assert plans[0] < plans[1] < plans[2] < plans[3] == set(METRICS)
    assert "Optimization/grad_norm" in plans[1]
    assert "Model/spectral_norm/<param>" not in plans[1]
    assert "Model/spectral_norm/<param>" in plans[2]
    assert "Activations/<module>_kurtosis" not in plans[2]
    assert all(schedule == Schedule(1) for schedule in plan_schedules("full").values())


@pytest.mark.parametrize(
    "broken",
    [
        {"name": "nogroup"},
        {"name": "Nowhere/x"},
        {"name": "Time/Bad name"},
        {"unit": ""},
        {"meaning": ""},
        {"source": ""},
        {"preset": "off"},
        {"reduction": "sum"},
    ],
)
def test_a_row_is_checked_at_birth(broken):
    good = {"name": "Time/x_ms", "unit": "ms", "meaning": "m", "source": "s", "preset": "cheap"}
    assert Metric(**good).per_parameter is False
    with pytest.raises(ValueError, match=r"Metric|metric|preset|reduction|unit"):
        Metric(**{**good, **broken})


def test_lookup_takes_exact_names_and_patterns_and_names_the_nearest():
    assert lookup("Loss/train_loss").reduction == "mean"
    assert lookup("Gradients/norm/blocks.0.attn.qkv.weight.q").name == "Gradients/norm/<param>"
    assert lookup("Activations/blocks.0.mlp_l2_norm").name == "Activations/<module>_l2_norm"
    assert lookup("Loss/loss_cross_ref").name == "Loss/loss_<task>"
    assert lookup("Optimization/lr/muon").unit == "1"
    with pytest.raises(KeyError, match="nearest: Loss/train_loss"):
        lookup("Loss/trian_loss")


def test_register_adds_a_name_once():
    metric = Metric("Loss/loss_like/<param>", "nats", "a test", "a test", "cheap")
    try:
        metrics.register(metric)
        assert lookup("Loss/loss_like/w") is metric
        with pytest.raises(ValueError, match="exists already"):
            metrics.register(metric)
    finally:
        METRICS.pop(metric.name)
        metrics._TEMPLATES.pop(0)


def test_schedules():
    def fired(schedule: Schedule, until: int = 12) -> list[int]:
        return [step for step in range(1, until + 1) if schedule.fires(step)]

    assert fired(Schedule(1)) == list(range(1, 13))
    assert fired(Schedule(5)) == [1, 5, 10]
    assert fired(Schedule(0)) == fired(Schedule(-1)) == []
    assert fired(Schedule(3, start=4, end=9)) == [6, 9]
    assert fired(Schedule(4, end=5)) == [1, 4]
    for wrong in ({"every": -2}, {"every": 1, "start": 9, "end": 3}):
        with pytest.raises(ValueError, match="schedule"):
            Schedule(**wrong)


def test_every_changes_adds_removes_and_the_last_key_wins():
    plan = plan_schedules("cheap", {"Model/spectral*": 100, "Time/*": 0, "Time/step_ms": 7})
    assert plan["Model/spectral_norm/<param>"] == Schedule(100)
    assert plan["Time/step_ms"] == Schedule(7)
    assert [name for name in plan if name.startswith("Time/")] == ["Time/step_ms"]
    assert plan_schedules("usual", {"Activations/*": -1}).keys() == {
        name for name in plan_schedules("usual") if not name.startswith("Activations/")
    }
    assert plan_schedules("cheap", {"Loss/train_loss": Schedule(2, 5, 9)})["Loss/train_loss"].end == 9


def test_wrong_presets_and_keys_say_what_was_wanted():
    with pytest.raises(ValueError, match=r"off, cheap, usual, full, got 'medium'"):
        plan_schedules("medium")
    with pytest.raises(
        ValueError, match=r"'Model/spectral_norm_maxx' matches no metric; nearest: Model/spectral_norm_max"
    ):
        plan_schedules("usual", {"Model/spectral_norm_maxx": 5})


def test_calendar_builds_each_set_once():
    calendar = Calendar({"a": Schedule(1), "b": Schedule(3), "c": Schedule(3), "d": Schedule(2, start=4)})
    assert [sorted(calendar.due(step)) for step in range(1, 7)] == [
        ["a", "b", "c"],
        ["a"],
        ["a", "b", "c"],
        ["a", "d"],
        ["a"],
        ["a", "b", "c", "d"],
    ]
    assert calendar.due(2) is calendar.due(5)
    assert Calendar({}).due(1) == frozenset()
