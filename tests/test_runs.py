"""The folder of a run: claimed whole, its record true, its logs repaired and cut."""

import datetime
import json
import os
import signal

import pytest

from fastmon import checkpoint, runs


def test_the_default_name_tells_time_and_width():
    now = datetime.datetime(2026, 3, 4, 5, 6, 7)
    assert runs.default_name(now, width=None) == "speedrun_20260304_050607"
    assert runs.default_name(now, width=256) == "speedrun_20260304_050607_w256"


def test_a_new_run_has_its_configuration_and_nothing_else(tmp_path):
    folder = tmp_path / "runs" / "demo"
    runs.check_free(folder)
    assert not folder.parent.exists()  # checking touches nothing
    runs.create(folder, {"lr": 0.1})
    assert json.loads((folder / "config.json").read_text()) == {"lr": 0.1}
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        runs.check_free(folder)


def test_a_run_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder"):
        runs.check_free(tmp_path / "file" / "demo")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="is not writable"):
        runs.check_free(tmp_path / "runs" / "demo")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_config", full)
    with pytest.raises(OSError, match="No space"):
        runs.create(tmp_path / "demo", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_provenance_names_versions_and_commit():
    facts = runs.provenance()
    assert facts["versions"].keys() >= {"python", "torch", "numpy"}
    if "git_commit" in facts:
        assert len(facts["git_commit"].removesuffix("-dirty")) == 40


def test_the_console_is_kept_in_the_folder(tmp_path, capsys):
    for word in ("one", "two"):
        with runs.console(tmp_path) as streams:
            runs.say(streams, word)
    with runs.console(tmp_path, speaks=False) as streams:
        assert streams == []
    assert capsys.readouterr().out == (tmp_path / "console.log").read_text() == "one\ntwo\n"


def test_an_interruption_is_a_wish_and_the_second_one_an_order(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with runs.Interruption() as interruption:
        assert not interruption.came
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # another kind of the same wish
        assert interruption.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo
    assert signal.getsignal(signal.SIGINT) is before


def test_rewinding_cuts_rows_and_sets_later_checkpoints_aside(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoints", step, {"progress": {"step": step}})
    (tmp_path / "metrics.jsonl").write_text('{"schema": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "Lo')
    said = runs.rewind(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"schema": 1}\n{"step": 2}\n'
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [1, 2]
    assert (tmp_path / "checkpoints" / "step_3.superseded" / "manifest.json").is_file()
    assert len(said) == 3
    assert "repaired a torn last line (15 bytes cut)" in said[0]
    assert "cut 1 rows after step 2" in said[1]
    assert "step_3 is later than step 2" in said[2]


@pytest.mark.parametrize(
    ("tail", "gone"),
    [("", 0), ('{"step": 3, "Loss/tr', 20), ('{"step": 3}', 11), ("\x00\x00\n", 3), ('{"step": 3, "a\n', 15)],
)
def test_a_torn_tail_is_cut(tmp_path, tail, gone):
    log = tmp_path / "metrics.jsonl"
    sound = '{"schema": 1}\n{"step": 1}\n{"step": 2}\n'
    log.write_text(sound + tail)
    assert runs.repair_tail(log) == gone
    assert log.read_text() == sound
    assert runs.repair_tail(tmp_path / "absent") == 0


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"schema": 1}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "Loss/val_loss": 1.0}\n'
    )
    assert runs.cut_rows(log, after=2) == 1
    assert log.read_text() == '{"schema": 1}\n{"step": 1}\n{"step": 2}\n{"step": 2, "Loss/val_loss": 1.0}\n'
    assert runs.cut_rows(log, after=0) == 3
    assert log.read_text() == '{"schema": 1}\n'
