"""What train.py cannot do: one sentence, exit code 2, nothing written."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from fastmon.data.shards import write_shard
from tests.tiny_run import flags, run, spawn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return flags(tmp_path_factory.mktemp("data"))


def write_words(path: Path, *words: int, tokens: int = 0) -> str:
    header = np.zeros(256, dtype="<i4")
    header[: len(words)] = words
    path.write_bytes(header.tobytes() + bytes(2 * tokens))
    return str(path)


BAD = {
    "unknown flag": (lambda _: ["--stesp", "3"], "unknown flag --stesp, the nearest is --steps"),
    "unknown mode": (lambda _: ["--mode", "nanno"], "--mode 'nanno' does not exist: choose one of nano, "),
    "unknown workload": (
        lambda _: ["--workload", "jepa"],
        "--workload 'jepa' does not exist: choose one of gpt",
    ),
    "unknown precision": (lambda _: ["--precision", "int8"], "choose one of fp32, bf16, fp16"),
    "precision without device": (lambda _: ["--precision", "fp16"], "--precision fp16 needs a CUDA device"),
    "unknown device": (
        lambda _: ["--device", "tpu"],
        "--device 'tpu' does not exist: choose auto, cpu, cuda",
    ),
    "missing shard": (lambda at: ["--train-files", f"{at}/absent*.bin"], "no file matches"),
    "wrong magic": (lambda at: ["--train-files", write_words(at / "a.bin", 1, 1, 9, tokens=9)], "magic"),
    "truncated": (
        lambda at: ["--train-files", write_words(at / "a.bin", 20240520, 1, 999, tokens=9)],
        "truncated",
    ),
    "negative count": (
        lambda at: ["--train-files", write_words(at / "a.bin", 20240520, 1, -5)],
        "a negative number of tokens in its header: -5",
    ),
    "unheard flag": (
        lambda _: ["--monitor", "off", "--monitor-spectral-every", "1"],
        "--monitor-spectral-every has no effect with --monitor off",
    ),
    "huge seed": (lambda _: ["--seed", str(2**64)], f"--seed must be at most {2**63 - 1}, got {2**64}"),
    "empty shard": (lambda at: ["--train-files", write_words(at / "a.bin", 20240520, 1, 0)], "a.bin"),
    "large vocabulary": (lambda at: ["--val-files", big_token(at)], "vocab"),
    "missing text": (lambda at: ["--text", f"{at}/*.txt"], "no file matches"),
    "width": (lambda _: ["--width", "33"], "33"),
    "unwritable run folder": (lambda at: ["--run-dir", write_words(at / "file") + "/runs"], "is no folder"),
    "existing run": (lambda at: [*existing(at), "--run-name", "old"], "exists: continue it with --resume"),
    "another shape": (
        lambda at: ["--resume", str(at / "e/old"), *existing(at)[2:], "--width", "64"],
        "start a new run",
    ),
    "no run": (lambda at: ["--resume", str(at / "absent")], "there is no run in"),
    "no checkpoint": (
        lambda at: ["--resume", f"{existing(at)[1]}/old/checkpoints/step_7"],
        "no complete checkpoint",
    ),
}


def big_token(at: Path) -> str:
    write_shard(at / "big.bin", np.full(400, 9000, dtype=np.uint16))
    return str(at / "big.bin")


def existing(at: Path) -> list[str]:
    (at / "e" / "old").mkdir(parents=True)
    (at / "e" / "old" / "config.json").write_text("{}")
    return ["--run-dir", str(at / "e")]


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said_in_one_sentence(case, tiny, tmp_path, capsys):
    argv, message = BAD[case]
    (tmp_path / "in").mkdir()
    words = argv(tmp_path / "in")
    before = sorted(path for path in tmp_path.rglob("*"))
    base = tiny if "--text" not in words and case != "no checkpoint" else ["--device", "cpu"]
    place = [] if "--run-dir" in words or case == "no checkpoint" else ["--run-dir", str(tmp_path / "runs")]
    assert run(*base, *place, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("train.py: ")
    assert message in shown.err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "no op has an implementation 'nope'; there are "),
        ("triton", "has no implementation 'triton' that can run here"),
        ("compile", "has no implementation 'compile' that can run here"),  # no op compiles within a step
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs here")
def test_an_implementation_that_cannot_run_is_refused(name, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTMON_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(*tiny, "--run-dir", tmp_path / "runs") == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert message in shown.err
    assert not (tmp_path / "runs").exists()


def test_a_monitor_that_cannot_be_built_leaves_no_folder(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no such preset")

    monkeypatch.setattr(train, "Monitor", fail)
    assert run(*tiny, "--run-dir", tmp_path / "runs") == 2
    assert capsys.readouterr().err == "train.py: no such preset\n"
    assert not (tmp_path / "runs").exists()


def test_the_exit_code_of_the_process_is_2(tmp_path):
    child = spawn("--run-dir", tmp_path / "runs", "--sptes", "3")
    out, error = child.communicate(timeout=120)
    assert (child.returncode, out, error) == (
        2,
        "",
        "train.py: unknown flag --sptes, the nearest is --steps\n",
    )
    assert not (tmp_path / "runs").exists()
