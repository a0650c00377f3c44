"""State on disk: written whole or not at all, checked when it is read, never executed.

    runs/<name>/checkpoints/step_<N>/          (and final_step_<N>/)
        manifest.json        step, facts (losses), and the size and sha256 of every file below
        <part>.safetensors   a part that is a flat dict of tensors, where `safetensors` is installed
        <part>.pt            any other part: tensors, numbers, strings, and dicts, lists, tuples of them

A checkpoint is written into a hidden temporary folder, flushed to the disk file by file, and then renamed: a
process killed at any moment leaves either the whole folder or none of that name. `.pt` files are read with
`weights_only=True`, which refuses to run code. A checkpoint whose bytes changed since is refused by its
sha256 and the one before it is taken.

Cost of a save: one copy of the state through the page cache, one sha256 pass (about 1.5 GB/s a core), one
fsync a file.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"(final_|[a-z][a-z0-9]*_)?step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why, in one sentence."""


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    prefix: str = "",
    facts: Mapping[str, float] | None = None,
) -> Path:
    """Write `state` to `folder/<prefix>step_<step>` and return the path; one of that name is replaced.

    `state` maps part names to what `load` shall return: tensors of any device and dtype, Python numbers,
    strings, None, and dicts, lists and tuples of them. `facts` (losses) go to the manifest, where `rotate`
    finds them. Raises OSError when the disk refuses, TypeError for a value of another type; nothing of the
    name is then left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{prefix}step_{step}"
    draft = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        files = {}
        for part, value in state.items():
            _refuse_objects(value, part)
            path, aliases = _write_part(draft, part, value)
            flush(path)
            files[path.name] = {"sha256": _digest(path), "bytes": path.stat().st_size, "aliases": aliases}
        manifest = {"format": FORMAT, "step": step, "facts": dict(facts or {}), "files": files}
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        flush(draft / "manifest.json")
        flush(draft)
        if final.exists():
            old = folder / f".old.{final.name}.{os.getpid()}"
            final.rename(old)
            draft.rename(final)
            shutil.rmtree(old)
        else:
            draft.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def load(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read one checkpoint folder: its parts by name, tensors on `device`.

    Every file is compared with the manifest's sha256 first. Raises CheckpointError naming the file that is
    missing, cut short, changed or unreadable, or the package that reads it.
    """
    manifest = read_manifest(path)
    state: dict[str, Any] = {}
    for name, wanted in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != wanted["bytes"]:
            raise CheckpointError(
                f"{path} is torn: {name} has {file.stat().st_size} bytes of {wanted['bytes']}"
            )
        if _digest(file) != wanted["sha256"]:
            raise CheckpointError(f"{path} is corrupted: the sha256 of {name} is not the manifest's")
        state[file.stem] = part = _read_part(file, device)
        for alias, original in wanted["aliases"].items():
            part[alias] = part[original]
    return state


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: format, step, facts, files; or raise CheckpointError."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} is no complete checkpoint: no manifest.json ({error.strerror})"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is torn: manifest.json is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written in another format than {FORMAT}: read it with the version it is from"
        )
    return manifest


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints in `folder`, oldest first, complete or not."""
    names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(found[2]), path) for found, path in names if found and path.is_dir())


def newest(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None],
) -> tuple[int, Path, dict[str, Any]] | None:
    """Load the newest checkpoint of `folder` that is whole: (step, path, state), or None when there is none.

    Each one that is passed over is named through `say`, with the reason.
    """
    for step, path in reversed(steps(folder)):
        try:
            return step, path, load(path, device=device)
        except CheckpointError as error:
            say(f"passed over: {error}")
    return None


def sweep(folder: Path) -> list[Path]:
    """Delete the temporary folders that killed writers left in `folder`; return what was deleted."""
    left = [path for path in folder.glob(".*step_*.*") if path.is_dir()] if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return left


def rotate(folder: Path, *, keep: int, best: str | None = None) -> list[Path]:
    """Delete all but the `keep` newest `step_<N>`, sparing that of the lowest fact `best`; return what went.

    Checkpoints with a prefix (`final_step_<N>`) are never deleted.
    """
    plain = [(step, path) for step, path in steps(folder) if path.name == f"step_{step}"]
    spared = {path for _, path in plain[-keep:]}
    if best is not None:
        scores: list[tuple[float, int, Path]] = []
        for step, path in plain:
            with contextlib.suppress(CheckpointError):
                score = read_manifest(path)["facts"].get(best)
                scores += [(score, step, path)] if score is not None and score == score else []
        spared |= {min(scores)[2]} if scores else set()
    gone = [path for _, path in plain if path not in spared]
    for path in gone:
        hidden = path.with_name(
            f".old.{path.name}.{os.getpid()}"
        )  # a kill in rmtree must not leave half a folder
        path.rename(hidden)
        shutil.rmtree(hidden)
    return gone


def seed_generators(seed: int) -> None:
    """Seed every generator that `random_state` knows."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of every generator a step may draw from: Python, numpy, torch, each CUDA device."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to what `random_state` returned; CUDA only with as many devices as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def _refuse_objects(value: Any, where: str) -> None:
    """Raise TypeError for what `load` would refuse to read back: anything but tensors and plain values."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            _refuse_objects(one, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            _refuse_objects(one, f"{where}[{index}]")
    elif type(value) not in (int, float, bool, str, bytes, NoneType) and not isinstance(value, Tensor):
        raise TypeError(f"a checkpoint holds tensors and plain values, {where} is a {type(value).__name__}")


def _write_part(folder: Path, part: str, value: Any) -> tuple[Path, dict[str, str]]:
    """Write one part; return its file and the names that are left out because they are another's tensor."""
    flat = (
        isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())
    )
    if flat and importlib.util.find_spec("safetensors"):
        owners: dict[tuple[Any, ...], str] = {}
        keys = {name: (one.data_ptr(), one.shape, one.stride(), one.dtype) for name, one in value.items()}
        for name, key in keys.items():
            owners.setdefault(key, name)
        unique = {name: value[name] for name in owners.values()}
        if len({one.untyped_storage().data_ptr() for one in unique.values()}) == len(unique):
            from safetensors.torch import save_file

            path = folder / f"{part}.safetensors"
            save_file({name: one.detach().contiguous() for name, one in unique.items()}, path)
            return path, {name: owners[key] for name, key in keys.items() if owners[key] != name}
    path = folder / f"{part}.pt"  # nested, or tensors that overlap without being equal
    torch.save(value, path)
    return path, {}


def _read_part(file: Path, device: torch.device | str) -> Any:
    if file.suffix == ".safetensors":
        if not importlib.util.find_spec("safetensors"):
            raise CheckpointError(f"{file} needs the package safetensors: pip install safetensors")
        from safetensors.torch import load_file

        return load_file(file, device=str(device))
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors and plain values: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make the disk hold `path` (a file's bytes, a folder's names) before going on."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
