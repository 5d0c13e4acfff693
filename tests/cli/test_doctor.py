"""``ms-optim doctor``: the diagnosis that the function gives, and what it says as an exit code."""

import json

import pytest
from cli import project

import ms_optim


@pytest.mark.parametrize("name", ["loop", "loop_by_name"])
def test_a_healthy_loop_is_exit_code_0(ms, name):
    run = ms("doctor", "--loop", f"cli.project:{name}")
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{ms_optim.doctor(*project.loop())}\n" and "healthy" in run.out


def test_a_problem_is_exit_code_1(ms):
    run = ms("doctor", "--loop", "cli.project:loop", "--kwargs", "spoiled=True")
    assert run.code == 1 and "problem [step_raised] the step raised RuntimeError: out of data" in run.out


def test_the_diagnosis_in_numbers(ms, tmp_path):
    run = ms("doctor", "--loop", "cli.project:loop", "--json", tmp_path / "a.json")
    assert run.code == 0 and "observed" in run.out
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    diagnosis = ms_optim.doctor(*project.loop())
    assert content["healthy"] is True and content["subject"] == diagnosis.subject
    assert [seen["perturbation"] for seen in content["passes"]] == [seen.perturbation for seen in diagnosis.passes]
    assert content["loss_gap"] == pytest.approx(diagnosis.loss_gap) and content["cosine"] == diagnosis.cosine

    run = ms("doctor", "--loop", "cli.project:loop", "--kwargs", "spoiled=True", "--json", "-")
    content = json.loads(run.out)
    assert run.code == 1 and content["healthy"] is False
    finding = content["findings"][0]
    assert (finding["name"], finding["severity"]) == ("step_raised", "problem") and "mend this" in finding["next_move"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("half_a_loop", "returned a tuple of 2; return (model, optimizer, step)"),
        ("other", "returned a int; return (model, optimizer, step)"),
        ("samples", "returned a tuple of 2"),
        ("raising", "raised ValueError: the weights are elsewhere"),
        ("missing", "has no 'missing'"),
    ],
)
def test_what_is_no_loop_is_refused_in_one_line(refused, name, said):
    assert said in refused("doctor", "--loop", f"cli.project:{name}")
