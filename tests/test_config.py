"""The configuration: every field documented and settable, every wrong wish answered in one sentence."""

import dataclasses
import json

import pytest

from fastmon import config
from fastmon.config import FIELDS, MODE_DEFAULTS, Config, ConfigError, apply_mode_defaults, dashed, parse

CHANGED = {  # a value of each field that is not its default: a new field needs a row here
    "workload": "gpt", "mode": "gpt2-124m", "width": 64, "device": "cpu", "text": "a/*.txt",
    "train_files": "t*.bin", "val_files": "v*.bin", "seq_len": 33, "optimizer": "sgd", "lr": 0.25,
    "weight_decay": 0.5, "batch_size": 3, "grad_accum": 7, "steps": 11, "schedule": "wsd", "warmup": 5,
    "min_lr_ratio": 0.75, "grad_clip": 2.5, "grad_checkpointing": True, "compile": True, "precision": "bf16",
    "seed": 99, "run_name": "demo", "run_dir": "elsewhere", "save_interval": 13, "log_interval": 17,
    "val_interval": 19, "val_batches": 23, "keep_checkpoints": 2, "resume": "", "eval_only": True,
    "monitor": "cheap", "monitor_spectral_every": 29, "monitor_activations": True,
    "monitor_activations_every": 31,
}  # fmt: skip
WITH = {
    "train_files": ["--val-files", "v"],
    "val_files": ["--train-files", "t"],
    "resume": ["--run-name", "new"],
}


def words(name: str) -> tuple[str, str]:
    value = CHANGED[name]
    return dashed(name), str(value).lower() if isinstance(value, bool) else str(value)


def read(*argv: str, **environment: str) -> Config:
    return parse([*argv], environment)


def sentence(*argv: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*argv, **environment)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_fields_are_frozen():
    """The command line is an interface: a change of it is made here too, on purpose."""
    assert list(FIELDS) == list(CHANGED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_set_by_flag_and_word_and_file(name, tmp_path):
    flag, text = words(name)
    more = WITH.get(name, [])
    assert getattr(read(flag, text, *more), name) == CHANGED[name]
    assert getattr(read(f"{flag}={text}", *more), name) == CHANGED[name]
    assert getattr(read(f"{name}={text}", *more), name) == CHANGED[name]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({name: CHANGED[name]}))
    assert getattr(read("--config", str(file), *more), name) == CHANGED[name]
    if name != "workload":  # there is one
        assert getattr(read(), name) != CHANGED[name]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_help_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{dashed(name)} " in shown
    text = config.help_of(name).replace("%%", "%")
    assert text in shown
    assert len(FIELDS[name].help) > 10
    default = FIELDS[name].default
    assert f"[default {'none' if default is None else str(default).replace('False', 'false')}" in text


def test_where_nano_differs_the_help_says_so():
    for name, value in MODE_DEFAULTS["nano"].items():
        assert value != FIELDS[name].default
        assert f"; nano {value}" in config.help_of(name)


def test_mode_defaults_stand_between_the_fields_and_what_is_given():
    nano, other = apply_mode_defaults({}), apply_mode_defaults({"mode": "gpt2-124m"})
    assert nano["seq_len"] == MODE_DEFAULTS["nano"]["seq_len"]
    assert (other["seq_len"], other["lr"], other["batch_size"], other["grad_accum"]) == (512, 2e-4, 4, 4)
    assert apply_mode_defaults({"seq_len": 7})["seq_len"] == 7
    assert read("--mode", "gpt2-124m").steps == FIELDS["steps"].default


def test_unknown_flags_name_the_nearest():
    assert sentence("--batchsize", "3") == "unknown flag --batchsize, the nearest is --batch-size"
    assert sentence("--stesp=3") == "unknown flag --stesp, the nearest is --steps"
    assert sentence("stesp=3") == "unknown flag --stesp, the nearest is --steps"
    assert sentence("--confg", "x") == "unknown flag --confg, the nearest is --config"
    assert sentence("--zzzzqqq") == "unknown flag --zzzzqqq"
    assert sentence("--step", "3") == "unknown flag --step, the nearest is --steps"  # no abbreviation
    assert "unexpected word 'train'" in sentence("train")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "many"], "--steps wants a whole number, got 'many'"),
        (["--steps", "1.5"], "--steps wants a whole number, got '1.5'"),
        (["--lr", "nan"], "--lr wants a finite number, got nan"),
        (["--lr", "inf"], "--lr wants a finite number, got inf"),
        (["--seed", "9223372036854775808"], "--seed must be at most 9223372036854775807, got 92233720368"),
        (
            ["--monitor", "off", "--monitor-activations"],
            "--monitor-activations has no effect with --monitor off",
        ),
        (["--compile", "perhaps"], "--compile wants true or false, got 'perhaps'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--min-lr-ratio", "1.5"], "--min-lr-ratio must be at most 1, got 1.5"),
        (["--lr"], "--lr: expected one argument"),
        (["--mode", "nanno"], "the nearest is nano"),
        (["--workload", "gtp"], "--workload 'gtp' does not exist: choose one of gpt"),
        (["--precision", "int8"], "--precision 'int8' does not exist: choose one of fp32, bf16, fp16"),
        (["--monitor", "loud"], "choose one of off, cheap, usual, full"),
        (["--text", "a", "--train-files", "b"], "two sources of data"),
        (["--train-files", "b"], "--train-files needs --val-files beside it"),
        (["--val-files", "b"], "--val-files needs --train-files beside it"),
        (["--run-name", "a/b"], "--run-name is a folder's name"),
        (["--run-name", ".."], "--run-name is a folder's name"),
        (["--run-name", ""], "--run-name is a folder's name"),
        (["--config", "absent.toml"], "cannot read the configuration absent.toml: No such file"),
        (["--resume", "absent"], "there is no run in absent"),
    ],
)
def test_wrong_values_get_one_sentence(argv, message):
    assert message in sentence(*argv)


def test_words_that_are_values_stay_values():
    assert read("--text", "a=b/*.txt").text == "a=b/*.txt"
    assert read("--compile", "steps=3").steps == 3
    assert read("--compile", "steps=3").compile is True
    assert read("--monitor-activations", "false").monitor_activations is False
    assert read("--monitor-spectral-every", "-1").monitor_spectral_every == -1
    assert read("batch-size=9", "batch_size=8").batch_size == 8


def test_files_are_read_strictly(tmp_path):
    toml = tmp_path / "c.toml"
    toml.write_text('lr = 0.5\ngrad-accum = 8\nmode = "gpt2-124m"\n')
    got = read("--config", str(toml), "--lr", "0.25")
    assert (got.lr, got.grad_accum, got.mode, got.seq_len) == (0.25, 8, "gpt2-124m", 512)
    toml.write_text("stesp = 3\n")
    assert "unknown field stesp, the nearest is steps" in sentence("--config", str(toml))
    toml.write_text("steps = true\n")
    assert "--steps wants a whole number, got True" in sentence("--config", str(toml))
    toml.write_text("steps = \n")
    assert "is no TOML" in sentence("--config", str(toml))
    (tmp_path / "c.json").write_text("[1]")
    assert "must be a table of fields, got list" in sentence("--config", str(tmp_path / "c.json"))
    (tmp_path / "c.json").write_text('{"steps": null}')
    assert "--steps needs a value" in sentence("--config", str(tmp_path / "c.json"))


def test_environment_variables_are_read_and_flags_beat_them(tmp_path):
    def three(got: Config):
        return got.monitor_spectral_every, got.monitor_activations, got.monitor_activations_every

    names = {"MONITOR_SPECTRAL_EVERY": "100", "MONITOR_ACTIVATIONS": "no", "MONITOR_ACTIVATIONS_EVERY": "7"}
    assert three(read(**names)) == (100, False, 7)
    assert three(read("--monitor-spectral-every", "3", "--monitor-activations", **names)) == (3, True, 7)
    file = tmp_path / "c.toml"
    file.write_text("monitor_spectral_every = 5\n")
    assert read("--config", str(file), **names).monitor_spectral_every == 100
    assert read(MONITOR_ACTIVATIONS="").monitor_activations is None
    assert sentence(MONITOR_ACTIVATIONS="perhaps") == "MONITOR_ACTIVATIONS wants true or false, got 'perhaps'"


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    before = read("steps=50", "seq_len=64", "lr=0.5", "run_name=old", "eval_only=true")
    (folder / "config.json").write_text(json.dumps(before.to_dict()))
    return folder


def test_off_leaves_out_what_others_ask(old_run):
    """A flag that asks for nothing fits; a variable or a file that asks for more is named, not refused."""
    assert read("--monitor", "off", "--monitor-spectral-every", "0").unheard() == {}
    assert read("--monitor-spectral-every", "3").unheard() == {}
    got = read("--monitor", "off", MONITOR_SPECTRAL_EVERY="3", MONITOR_ACTIVATIONS="no")
    assert list(got.unheard()) == ["monitor_spectral_every"]


def test_resuming_takes_the_configuration_of_the_run(old_run):
    base = ["--run-dir", str(old_run.parent)]
    ways = ([*base, "--resume"], [*base, "--resume", "--run-name", "old"], ["--resume", str(old_run)])
    for way in (*ways, ["--resume", str(old_run / "checkpoints" / "step_10")]):
        got = read(*way, "--steps", "80")
        assert (got.steps, got.seq_len, got.lr, got.run_name) == (80, 64, 0.5, "old")
        assert got.run_dir == str(old_run.parent)
        assert not got.eval_only


def test_resuming_refuses_to_change_what_a_run_is(old_run):
    message = sentence("--resume", str(old_run), "--seq-len", "32")
    assert "--seq-len 32 does not fit the run" in message
    assert "which has 64" in message


def test_resuming_a_run_that_is_not_there_yet(tmp_path):
    base = ["--run-dir", str(tmp_path / "none")]
    assert read(*base, "--resume", "--run-name", "new").resume == ""  # starts at 0; train.py says so
    assert "there is no run in" in sentence(*base, "--resume")
