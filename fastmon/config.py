"""What a run is told: one frozen dataclass, from which the command line, the file format and the help derive.

A value is looked for in this order, the first that speaks wins: a flag (`--steps 300`) or a `key=value` word
(`steps=300`), an environment variable (`ENVIRONMENT` below), the file of `--config`, the configuration of the
run that `--resume` continues, the defaults of the mode (`MODE_DEFAULTS`), the field's own default. The field
defaults are the established training guide's; where a mode differs, its help says so.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmon import flags
from fastmon.flags import ConfigError, dashed, flag
from fastmon.schedules import SHAPES

model = functools.partial(flag, group="Model and data")
optimization = functools.partial(flag, group="Optimization")
run = functools.partial(flag, group="Run")
observation = functools.partial(flag, group="Observation")


def _workloads() -> Sequence[str]:
    from fastmon.workloads import WORKLOADS

    return tuple(WORKLOADS)


def _modes() -> Sequence[str]:
    from fastmon.workloads import MODES

    return tuple(MODES)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run can be told. `None` means: chosen by the machine, by the preset, or not wanted."""

    workload: str = model("gpt", "what is trained", choices=_workloads, fixed=True)
    mode: str = model("nano", "size preset of the model", choices=_modes, fixed=True)
    width: int | None = model(
        None, "width of the residual stream in features, in place of the mode's", low=1, fixed=True)
    device: str = model("auto", "auto, cpu, cuda, cuda:<index> or mps; auto takes the fastest there is")
    text: str | None = model(
        None, "glob of plain text files to train on, in place of the embedded corpus", fixed=True)
    train_files: str | None = model(None, "glob of .bin shards to train on", fixed=True)
    val_files: str | None = model(None, "glob of .bin shards to validate on", fixed=True)
    seq_len: int = model(512, "length of a sequence in tokens", low=1, fixed=True)

    optimizer: str = optimization(
        "muon", "rule of the update; muon is for hidden matrices, with AdamW for the rest",
        choices=("muon", "adamw", "sgd"), fixed=True)
    lr: float = optimization(2e-4, "peak learning rate", low=0)
    weight_decay: float = optimization(
        0.08, "decay of the matrices in a step, as a multiple of the learning rate", low=0, fixed=True)
    batch_size: int = optimization(4, "sequences in a micro-batch", low=1)
    grad_accum: int = optimization(4, "micro-batches in a step, over all processes", low=1)
    steps: int = optimization(10000, "optimizer steps in the whole run", low=1)
    schedule: str = optimization("cosine", "shape of the learning rate after the warm-up", choices=tuple(SHAPES))
    warmup: int = optimization(200, "steps of linear warm-up", low=0)
    min_lr_ratio: float = optimization(0.1, "final learning rate as a fraction of the peak", low=0, high=1)
    grad_clip: float = optimization(
        1.0, "largest global gradient norm; 0 leaves gradients as they are", low=0)
    grad_checkpointing: bool = optimization(
        False, "recompute block activations in the backward pass: less memory, more time")
    compile: bool = optimization(False, "compile the model with torch.compile")
    precision: str | None = optimization(
        None, "number format; not given, bf16 on CUDA sm_80 and newer, else fp32 (the guide: fp16)",
        choices=("fp32", "bf16", "fp16"))
    seed: int = optimization(
        1337, "seed of the initial weights and the order of the data", low=0, high=2**63 - 1, fixed=True)

    run_name: str | None = run(None, "name of the run's folder; not given, speedrun_<date>_<time>[_w<width>]")
    run_dir: str = run("runs", "folder that holds the runs")
    save_interval: int = run(500, "steps between checkpoints; 0 saves at the end alone", low=0)
    log_interval: int = run(10, "steps between lines of the console; the run log has every step", low=1)
    val_interval: int = run(100, "steps between validations; 0 validates before saves alone", low=0)
    val_batches: int = run(10, "micro-batches in a validation", low=1)
    keep_checkpoints: int = run(5, "newest checkpoints kept, besides the best and the final one", low=1)
    resume: str | None = run(
        None, "continue a run: its folder or one of its checkpoints; alone, --run-name's or the newest run",
        bare="")
    eval_only: bool = run(False, "validate once, print the loss, write nothing")

    monitor: str = observation(
        "usual", "preset of the monitor; off leaves losses and times", choices=("off", "cheap", "usual", "full"))
    monitor_spectral_every: int | None = observation(
        None, "steps between spectral norms of weights; 0 or -1 is never; not given, the preset's", low=-1)
    monitor_activations: bool | None = observation(None, "activation moments; not given, the preset's")
    monitor_activations_every: int | None = observation(
        None, "steps between activation moments; 0 or -1 is never; not given, the preset's (the guide: 100)",
        low=-1)

    def __post_init__(self) -> None:
        for field in FIELDS.values():
            if (value := getattr(self, field.name)) is not None:
                flags.check(field, value)
            elif field.default is not None:
                raise ConfigError(f"{dashed(field.name)} needs a value")
        if self.text and (self.train_files or self.val_files):
            raise ConfigError("--text and --train-files/--val-files are two sources of data: give one")
        if bool(self.train_files) != bool(self.val_files):
            pair = ("--train-files", "--val-files")
            there, missing = pair if self.train_files else reversed(pair)
            raise ConfigError(f"{there} needs {missing} beside it")
        if self.run_name is not None and not re.fullmatch(r"[^./\\\0][^/\\\0]*", self.run_name):
            raise ConfigError(f"--run-name is a folder's name, without / or first dot, got {self.run_name!r}")

    def unheard(self) -> dict[str, str]:
        """Return the fields that ask for metrics which `--monitor off` leaves out, each with a sentence."""
        asked = [name for name in ENVIRONMENT.values() if (getattr(self, name) or 0) > 0]
        said = "has no effect with --monitor off: take cheap, usual or full"
        return {name: f"{dashed(name)} {said}" for name in asked if self.monitor == "off"}

    def monitor_every(self) -> dict[str, int]:
        """Return what the flags change in the schedules of the monitor's preset; off leaves losses and times."""
        if self.monitor == "off":
            return dict.fromkeys(("Optimization/*", "Gradients/*", "Model/*", "Hardware/*"), 0)
        every: dict[str, int] = {}
        if self.monitor_spectral_every is not None:
            names = ("Model/spectral_*", "Model/stable_rank/<param>")
            every |= dict.fromkeys(names, self.monitor_spectral_every)
        interval = self.monitor_activations_every
        if self.monitor_activations is False:
            every["Activations/*"] = 0
        elif interval is not None or (self.monitor_activations and self.monitor == "cheap"):
            parts = ["mean", "std", "min", "max", "l2_norm", "zero_frac"]
            parts += ["kurtosis"] if self.monitor == "full" else []
            every |= {f"Activations/<module>_{part}": 100 if interval is None else interval for part in parts}
        return every

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, fit for JSON and `--config`; resuming is a wish of the moment."""
        return dataclasses.asdict(self) | {"resume": None}
# fmt: on


FIELDS = flags.fields_of(Config)

MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "nano": {  # 4,096 tokens a step: 300 steps take two to three minutes on two cores of a CPU
        "seq_len": 128,
        "lr": 0.02,
        "batch_size": 16,
        "grad_accum": 2,  # even, so that two processes can share it
        "steps": 300,
        "warmup": 20,
        "save_interval": 100,
        "val_interval": 50,
    }
}

ENVIRONMENT = {
    "MONITOR_SPECTRAL_EVERY": "monitor_spectral_every",
    "MONITOR_ACTIVATIONS": "monitor_activations",
    "MONITOR_ACTIVATIONS_EVERY": "monitor_activations_every",
}


def apply_mode_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what `given` leaves out, first from the mode's table, then from the fields."""
    table = MODE_DEFAULTS.get(given.get("mode", FIELDS["mode"].default), {})
    return {name: given.get(name, table.get(name, field.default)) for name, field in FIELDS.items()}


def help_of(name: str) -> str:
    """Return the help of a field with its choices, its default and the modes that differ from it."""
    field = FIELDS[name]
    choices = field.values()
    values = f": {', '.join(choices)}" if choices else ""
    shown = {"default": field.default} | {m: t[name] for m, t in MODE_DEFAULTS.items() if name in t}
    words = [f"{who} {'none' if value is None else value}" for who, value in shown.items()]
    text = f"{field.help}{values} [{'; '.join(words)}]"
    return text.replace("True", "true").replace("False", "false").replace("%", "%%")


def parse(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Read flags, words, environment and files into a Config. ConfigError says what came and what was wanted.

    A flag that `--monitor off` would ignore is such an error; from elsewhere it stays, for `Config.unheard` to name.

    `--help` prints the fields and leaves with code 0, as `argparse` does.
    """
    tree = flags.parser(
        FIELDS,
        help_of,
        prog="train.py",
        description="Train a model and watch it. With no arguments: a small GPT on the embedded corpus.",
        epilog="In brackets: the default and where a mode's differs. Words such as steps=300 are flags too.",
    )
    words, file = flags.read_words(tree, FIELDS, sys.argv[1:] if argv is None else argv)
    variables = {
        name: flags.convert(FIELDS[name], environment[variable], called=variable)
        for variable, name in ENVIRONMENT.items()
        if environment.get(variable)
    }
    given = (flags.read_file(FIELDS, file) if file is not None else {}) | variables | words
    if given.get("resume") is not None:
        given = _continue(given)
    cfg = Config(**apply_mode_defaults(given))
    for name, sentence in cfg.unheard().items():
        if name in words:
            raise ConfigError(sentence)
    return cfg


def resumed_folder(given: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run that `--resume` continues; None when it is named but not there yet."""
    base = Path(given.get("run_dir") or FIELDS["run_dir"].default)
    if given["resume"]:
        folder = Path(given["resume"])
        if folder.parent.name == "checkpoints":
            folder = folder.parent.parent
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--resume {given['resume']}: there is no run in {folder} (no config.json)")
        return folder
    if given.get("run_name"):
        folder = base / given["run_name"]
        return folder if (folder / "config.json").is_file() else None
    found = sorted(base.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigError(f"--resume: there is no run in {base}")
    return found[-1].parent


def _continue(given: dict[str, Any]) -> dict[str, Any]:
    """Lay `given` over the configuration of the run that is continued; refuse to change what it is."""
    folder = resumed_folder(given)
    if folder is None:
        return given
    before = apply_mode_defaults(flags.read_file(FIELDS, folder / "config.json"))
    for name, value in given.items():
        if FIELDS[name].fixed and before[name] != value:
            asked = f"{dashed(name)} {value}"
            raise ConfigError(
                f"{asked} does not fit the run {folder}, which has {before[name]}: start a new run"
            )
    here = {"run_name": folder.resolve().name, "run_dir": str(folder.resolve().parent), "eval_only": False}
    return before | given | here | {"eval_only": given.get("eval_only", False)}
