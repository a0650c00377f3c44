"""Learning is proved: the default run reaches a fixed validation loss. About three minutes on two cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BAR = 3.80  # measured: 3.714 (seed 1337, 300 steps of 4,096 tokens, fp32 on a CPU); a fresh model starts at 9.04


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(tmp_path), "--run-name", "default"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines()[1:]
    ]
    assert rows[-1]["step"] == 300
    assert rows[-1]["Loss/val_loss"] < BAR
    assert all(row["Gradients/nonfinite"] == 0 for row in rows if "Gradients/nonfinite" in row)
