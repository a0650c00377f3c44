"""The folder of a run: who may have it, what its record says, and how its logs survive a kill.

runs/<name>/
    config.json      every field of the configuration; `--config` reads it back
    metrics.jsonl    a header, then one object a row; each --resume adds its own header before the rows it writes:
                     "after_step" is the step it goes on from, and of two headers the later one counts
    params.jsonl     the same for single parameters
    console.log      what the console showed
    checkpoints/     see checkpoint.py
    summary.md       written at the end
"""

import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TextIO

import torch

import fastmon.ops  # noqa: F401  fills the table of ops
from fastmon import __version__, backend, checkpoint, device
from fastmon.checkpoint import flush

LOGS = ("metrics.jsonl", "params.jsonl")


def default_name(now: datetime.datetime, *, width: int | None) -> str:
    """Return `speedrun_<date>_<time>`, with the width where one was asked for."""
    return f"speedrun_{now:%Y%m%d_%H%M%S}{f'_w{width}' if width else ''}"


def check_free(folder: Path) -> None:
    """Raise ValueError, in one sentence, unless a new run can have `folder`; touches nothing."""
    if folder.exists():
        raise ValueError(f"the run {folder} exists: continue it with --resume or take another --run-name")
    above = next(path for path in folder.parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"the run folder {folder} cannot be made: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"the run folder {folder} cannot be made: {above} is not writable")


def create(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the folder of a new run with its config.json, or raise OSError and leave nothing.

    It is drafted under a hidden name and renamed, so that a folder of the run's name is a run that can be
    resumed.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        (draft / "checkpoints").mkdir(parents=True)
        write_config(draft, config)
        draft.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def claim(folder: Path, config: Mapping[str, Any], *, step: int) -> list[str]:
    """Take the folder of a run that goes on after `step`: make it when new, else rewind it; return what was done.

    Raises ValueError, in one sentence, where the disk refuses; a new folder is then not there.
    """
    try:
        if not folder.is_dir():
            create(folder, config)
            return []
        swept = checkpoint.sweep(folder / "checkpoints")
        said = [f"removed {path.name}, left by a killed save" for path in swept] + rewind(folder, step=step)
        write_config(folder, config)
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror}") from error
    return said


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json in one rename."""
    draft = folder / ".config.json"
    draft.write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")
    flush(draft)
    draft.replace(folder / "config.json")


def provenance() -> dict[str, Any]:
    """Return what a reader needs to run this again: commit, versions, host. What is unknown is absent."""
    versions = {"fastmon": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "triton", "tokenizers", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {"versions": versions, "platform": platform.platform(), "cpus": os.cpu_count()}
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return facts
    return facts | ({"git_commit": found.stdout.strip()} if found.returncode == 0 else {})


def op_rows(here: torch.device) -> dict[str, str]:
    """Return the name of the row that each op has on `here` for prepared lists of fp32 tensors.

    BackendError where the row that was asked for cannot run, prepared or within a step: a run needs both.
    """
    rows: dict[str, str] = {}
    for prepared in (False, True):
        facts = backend.Facts(here.type, frozenset({torch.float32}), device.sm(here), prepared=prepared)
        rows = {name: backend.choose(op, facts).name for name, op in sorted(backend.OPS.items())}
    return rows


def told(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what runs where: the facts of a run's `record`, without the provenance."""
    lines = []
    for title in ("device", "precision", "workload", "ops", "effective_batch", "config"):
        said = record[title]
        if isinstance(said, dict):
            said = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        lines.append(f"{title.replace('_', ' ')}: {said}")
    return lines


@contextlib.contextmanager
def console(folder: Path, *, speaks: bool = True) -> Iterator[list[TextIO]]:
    """Yield the streams that what is said goes to: standard output and the run's console.log, which is appended.

    There are none for a process that does not speak (any but the first).
    """
    if not speaks:
        yield []
        return
    with (folder / "console.log").open("a", encoding="utf-8") as log:
        yield [sys.stdout, log]


def say(streams: Iterable[TextIO], text: str) -> None:
    """Print a line to each of the streams, at once."""
    for stream in streams:
        print(text, file=stream, flush=True)


class Interruption:
    """SIGTERM and SIGINT as a wish that the loop meets after the step it is in.

    A second SIGINT stops at once, as usual; under torchrun it does not, because torchrun passes on to its
    processes the signal that the terminal already sent them.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def came(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        again = self.signal is signal.SIGINT and number == signal.SIGINT
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


def rewind(folder: Path, *, step: int) -> list[str]:
    """Make the logs of `folder` end at `step`, and return what was done, in sentences.

    A torn last line goes first, then the rows of later steps, which the resumed run writes again. Checkpoints
    of later steps (there are some when an older one was asked for) are set aside under another name: the next
    `--resume` must not find a future that this run leaves.
    """
    said = []
    for name in LOGS:
        if torn := repair_tail(folder / name):
            said.append(f"{name}: repaired a torn last line ({torn} bytes cut)")
        if cut := cut_rows(folder / name, after=step):
            said.append(f"{name}: cut {cut} rows after step {step}")
    for later, path in checkpoint.steps(folder / "checkpoints"):
        if later > step:
            aside = path.with_name(f"{path.name}.superseded")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            said.append(f"checkpoint {path.name} is later than step {step}: set aside as {aside.name}")
    return said


def repair_tail(path: Path) -> int:
    """Cut a torn last line (no newline, or not JSON) off a JSONL file; return how many bytes went."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    sound = data.rfind(b"\n") + 1
    while sound:
        start = data.rfind(b"\n", 0, sound - 1) + 1
        try:
            json.loads(data[start:sound])
            break
        except ValueError:
            sound = start
    if sound < len(data):
        with path.open("r+b") as file:
            file.truncate(sound)
            os.fsync(file.fileno())
    return len(data) - sound


def cut_rows(path: Path, *, after: int) -> int:
    """Drop the rows of a JSONL file whose step is greater than `after`; return how many went.

    Lines without a step (headers) stay. The file is replaced in one rename, so that a kill leaves the old or
    the new one.
    """
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("step", after) <= after]
    if len(kept) < len(lines):
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text("".join(kept), encoding="utf-8")
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    return len(lines) - len(kept)
