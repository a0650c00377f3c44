"""The command `fastmon`."""

import subprocess
import sys

import pytest

import fastmon
from fastmon import backend, cli


def test_help_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastmon.__version__}\n"
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0
        assert cli.COMMANDS[name].__doc__ in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["docter"], "unknown command 'docter', the nearest is doctor"),
        (["xyz"], "unknown command 'xyz': choose one of doctor, summary"),
        (["doctor", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["summary"], "the following arguments are required: run"),
        (["summary", "absent"], "absent is no run: it holds no metrics.jsonl"),
    ],
)
def test_wrong_words_get_one_sentence_and_code_2(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_doctor_shows_every_row_with_its_fate(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, op in backend.OPS.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  cpu {name}: "))
        rows = lines[at + 1 : at + 1 + len(op.impls)]
        facts = backend.Facts("cpu", frozenset({backend.torch.float32}), prepared=True)
        for line, (impl, reason) in zip(rows, backend.explain(op, facts), strict=True):
            assert line[6:].split()[0] == impl.name
            assert reason is None or reason in line
        assert lines[at].endswith(f" / {backend.choose(op, facts).name}")
        assert [line[4] for line in rows].count("*") >= 1


def test_doctor_says_what_is_missing_and_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(backend, "extension", lambda: "the extension is on holiday")
    monkeypatch.setattr(backend, "triton_missing", lambda: None)
    monkeypatch.setattr(cli.shutil, "which", lambda _: None)
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert list(cli._missing()) == [
        "the extension is on holiday",
        "no C++ compiler (g++ or clang++): torch.compile and building the extension need one",
        "matplotlib: plots in summaries; pip install 'fastmon[plots]'",
    ]


def test_summary_writes_and_prints_the_path(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"fastmon": 1}\n{"step": 1, "Loss/train_loss": 2.5}\n')
    assert cli.main(["summary", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "summary.md")
    assert "2.5000" in (tmp_path / "summary.md").read_text()


def test_python_m_fastmon_and_help_without_torch():
    code = "import sys; from fastmon.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    found = subprocess.run([sys.executable, "-m", "fastmon", "docter"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "fastmon: unknown command 'docter', the nearest is doctor\n"
