"""``python -m benchmarks`` finds its scripts by reading, runs each in a process, and fails if one of them does."""

import importlib
import subprocess

import pytest

from benchmarks import scripts

runner = importlib.import_module("benchmarks.__main__")

SCRIPT = """
def main(arguments=None):
    harness.main("", "name", measure, arguments)

if __name__ == "__main__":
    main()
"""


def test_scripts_are_found_and_what_they_are_made_of_is_not():
    names = scripts.names()
    assert {"trace_speed", "overhead", "universal_class", "flat_minima", "choosing", "gauge", "conformance"} <= {*names}
    assert not {"__main__", "render", "report", "harness", "trials", "memory", "networks", "two_layer"} & {*names}


@pytest.mark.parametrize(
    ("source", "whether"),
    [
        (SCRIPT, True),
        (SCRIPT.replace("harness.main(", "trials.main("), True),
        (SCRIPT.replace('harness.main("", "name", measure, arguments)', 'parser.add_argument("--scale")'), True),
        (SCRIPT.replace("harness.main(", "print("), False),
        (SCRIPT.split("if __name__")[0], False),
        ('if __name__ == "__main__":\n    harness.main()\n', False),
    ],
)
def test_a_script_has_a_main_with_a_scale_and_is_run_on_its_own(source, whether):
    assert scripts.is_script(source) == whether


def test_a_module_that_fails_says_so_with_its_last_line(capsys):
    assert not runner.ran(["benchmarks_that_are_not_there"], "nothing")
    printed = capsys.readouterr().out
    assert printed.startswith("nothing ") and " s  failed: " in printed
    assert "No module named" in printed and printed.count("\n") == 1


@pytest.fixture
def calls(monkeypatch):
    """What would have been run; all that is called overhead fails."""
    found = []

    def pretended(command, **options):
        found.append(command[2:])
        failed = "overhead" in command[2]
        return subprocess.CompletedProcess(command, int(failed), "", "Traceback\nValueError: so\n" if failed else "")

    monkeypatch.setattr(runner.subprocess, "run", pretended)
    return found


def test_every_script_runs_with_one_thread_into_a_folder_that_is_rendered_and_gone(calls, capsys, tmp_path):
    assert runner.main(["--jobs", "1"]) == 1
    *each, last = calls
    assert [call[0] for call in each] == [f"benchmarks.{name}" for name in scripts.names()]
    (options,) = {tuple(call[1:]) for call in each}
    assert options[:5] == ("--scale", "smoke", "--threads", "1", "--out")
    assert last == ["benchmarks.render", "--results", options[5]]
    printed = capsys.readouterr().out
    assert "failed: ValueError: so" in printed and printed.count("failed:") == 1
    assert f"{len(calls)} run, 1 failed, in 0.0 minutes" in printed


def test_chosen_scripts_at_the_scale_that_is_committed(calls):
    assert runner.main(["--scale", "cpu", "gauge", "trace_speed"]) == 0
    assert calls == [
        ["benchmarks.gauge", "--scale", "cpu", "--threads", "1"],
        ["benchmarks.trace_speed", "--scale", "cpu", "--threads", "1"],
        ["benchmarks.render"],
    ]


def test_a_script_that_is_not_there_is_refused(calls, capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.main(["gauge", "gouge"])
    assert "there is no script gouge; there are choosing, " in capsys.readouterr().err and not calls
