"""The smallest run of train.py, in this process or in one of its own, and what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import train
from fastmon.data.shards import write_shard

ROOT = Path(train.__file__).parent
STEPS = 6


def flags(folder: Path, *more: str) -> list[str]:
    """Write two small shards of learnable tokens to `folder`; return the flags of a run of six steps on them."""
    tokens = (np.arange(6000) ** 2 // 7 % 101).astype(np.uint16)
    write_shard(folder / "train.bin", tokens[:5000])
    write_shard(folder / "val.bin", tokens[5000:])
    words = (
        f"--width 32 --seq-len 16 --batch-size 2 --grad-accum 2 --steps {STEPS} --warmup 2 --lr 0.01 --device cpu "
        f"--val-batches 2 --val-interval 3 --save-interval 2 --log-interval 2 --train-files {folder}/train.bin "
        f"--val-files {folder}/val.bin"
    )
    return [*words.split(), *more]


def run(*argv: object) -> int:
    """Call train.py in this process."""
    before = sys.argv
    sys.argv = ["train.py", *map(str, argv)]
    try:
        return train.main()
    finally:
        sys.argv = before


def spawn(*argv: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start train.py in a process of its own, or under a launcher such as torchrun."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def rows(folder: Path, file: str = "metrics.jsonl") -> dict[int, dict]:
    """Return the rows of a run's log by step."""
    lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    kept = [line for line in lines if "step" in line and "event" not in line]
    assert len({line["step"] for line in kept}) == len(kept), "a step has two rows"
    return {line["step"]: line for line in kept}


def losses(folder: Path) -> list[tuple[int, float, float | None]]:
    """Return (step, training loss, validation loss or None)."""
    return [(s, r["Loss/train_loss"], r.get("Loss/val_loss")) for s, r in rows(folder).items()]
