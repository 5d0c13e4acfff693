"""The border: help, exit codes, one line per error, interruptions, and nothing of it left behind."""

import configparser
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ms_optim.cli import main

ROOT = Path(__file__).parents[2]
CHAIN = ("symmetries", "--model", "cli.project:network", "--input-size", "1", "8", "8")


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ms_optim", *arguments]
    return subprocess.Popen(command, cwd=ROOT / "tests", env=environment, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("command", ["measure", "symmetries", "balance", "doctor"])
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert "examples:" in shown and f"ms-optim {command} " in shown
    assert all(option in shown for option in ("--seed", "--threads", "--traceback"))


def test_help_and_version(capsys):
    for argument, said in (("--help", "exit codes: 0 done"), ("--version", "ms_optim ")):
        with pytest.raises(SystemExit) as left:
            main([argument])
        assert left.value.code == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: COMMAND; see ms-optim --help"),
        (("weigh",), "invalid choice: 'weigh'"),
        (("measure",), "required: --model, --data; see ms-optim measure --help"),
        (("measure", "--model", "resnet18", "--data"), "expected one argument"),
        (("measure", "--model", "a:b", "--data", "random", "--model-kwargs", "depth"), "'depth' is not of the form"),
        (("balance", "a.pth", "b.pth", "--model", "a:b", "--data", "random"), "the checkpoint a.pth is not there"),
        (("doctor", "--loop", "a:b", "--fast"), "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_command_line_is_one_line(refused, arguments, said):
    assert said in refused(*arguments)


def test_an_error_that_nobody_foresaw_is_one_line_and_shows_its_place_on_request(ms, monkeypatch):
    def failing(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("ms_optim.cli.symmetries.scale_symmetries", failing)
    run = ms(*CHAIN)
    assert run.code == 2
    assert run.err == "ms-optim: error: RuntimeError: first line second line (--traceback shows where)\n"
    run = ms(*CHAIN, "--traceback")
    assert run.code == 2 and "Traceback" in run.err and "in failing" in run.err
    assert run.err.endswith("(--traceback shows where)\n")


def test_a_file_that_may_not_be_read_is_named(ms, monkeypatch, tmp_path):
    def forbidden(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.pth").touch()
    monkeypatch.setattr("torch.load", forbidden)
    run = ms(*CHAIN, "--checkpoint", tmp_path / "a.pth")
    assert run.code == 2 and f"{tmp_path}/a.pth: Permission denied" in run.err


def test_an_interruption_is_130(ms):
    run = ms("symmetries", "--model", "cli.project:interrupted", "--input-size", 1, 8, 8)
    assert (run.code, run.err) == (130, "ms-optim: interrupted\n")


def test_threads_path_and_warnings_are_as_before(ms):
    import warnings

    before = (torch.get_num_threads(), list(sys.path), warnings.showwarning)
    assert ms(*CHAIN, "--threads", 2).code == 0
    assert ms("symmetries", "--model", "cli.project:raising").code == 2
    assert (torch.get_num_threads(), list(sys.path), warnings.showwarning) == before


def test_the_working_directory_can_be_imported_from(ms, tmp_path, monkeypatch):
    code = "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))\n"
    (tmp_path / "net_in_the_working_directory.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    run = ms("symmetries", "--model", "net_in_the_working_directory:make", "--input-size", 1, 8, 8)
    assert run.code == 0 and "fixed: 1.weight, 1.bias" in run.out


def test_the_entry_point_is_the_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "ms-optim" and getattr(importlib.import_module(module), function) is main


def test_python_m_ms_optim(tmp_path):
    run = process(*CHAIN, "--json", str(tmp_path / "a.json"), stdout=subprocess.PIPE)
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert "1 rescaling leaves the function unchanged" in out and (tmp_path / "a.json").is_file()


def test_the_exit_code_of_the_process_is_the_commands():
    run = process("measure", "--model", "cli.project:network", "--data", "nonsense", stdout=subprocess.PIPE)
    out, err = run.communicate()
    assert run.returncode == 2 and err.count("\n") == 1 and "nonsense" in err and "Traceback" not in out


def test_a_reader_that_leaves_ends_it_in_silence():
    with process("measure", "--list-measures", stdout=subprocess.PIPE) as run:
        run.stdout.close()
        err = run.stderr.read()
    assert (run.returncode, err) == (141, "")
