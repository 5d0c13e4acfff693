"""The command: both ways of saying the same, the two stages, exit codes, and one line for what is wrong."""

import csv
import json

import pytest

from ms_optim.sweep import command
from ms_optim.sweep.command import main, options_of, trials_of

FUNCTION = ("--function", "sweep.trials:accuracy", "--workers", "0")


@pytest.fixture
def run(capsys, tmp_path):
    def run(*arguments, output=tmp_path / "out"):
        capsys.readouterr()
        code = main([*map(str, arguments), "--output", str(output)])
        return code, *capsys.readouterr()

    return run


def rows(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_settings_are_chosen_and_run_from_fresh_seeds(run, tmp_path):
    grid = ("--grid", "opt=sgd,sam", "sam:rho=1e-2,0.1,1")
    code, out, err = run(*FUNCTION, *grid, "--seeds", 0, 1, "--fresh-seeds", 5, 6, 7)
    assert code == 0, err
    trials = rows(tmp_path / "out" / "trials.csv")
    assert len(trials) == 2 * 4 + 3 * 2
    fresh = [row for row in trials if row["stage"] == "fresh"]
    assert {(row["method"], row["settings.rho"]) for row in fresh} == {("sgd", ""), ("sam", "0.1")}
    summary = rows(tmp_path / "out" / "summary.csv")
    (sam,) = (row for row in summary if row["method"] == "sam" and row["chosen"] == "1")
    assert sam["reported.n"] == sam["pairs"] == "3" and float(sam["test_top1.mean"]) == pytest.approx(80.06)
    assert "rho = 0.1" in out and "summary.md" in out and err.count("\n[") + err.startswith("[") == 8 + 6
    # The same again runs nothing, and says the same.
    code, again, err = run(*FUNCTION, *grid, "--seeds", 0, 1, "--fresh-seeds", 5, 6, 7)
    assert (code, err) == (0, "") and out.endswith(again)  # what came before is what the trials printed


def test_a_file_says_the_same_as_the_command_line_which_wins(tmp_path):
    file = tmp_path / "sweep.yaml"
    recipe = tmp_path / "base.yaml"
    recipe.write_text("width: 3\n")
    file.write_text(
        f"recipes: {recipe}\nfunction: sweep.trials:accuracy\nset: {{weight-decay: 1e-4, depth: 2}}\n"
        "grid: {lr: [0.1, 1e-2]}\nmethods:\n  sgd:\n  sam: {rho: [0.1, 0.2], opt: sam}\n"
        "seeds: [0, 1]\nfresh-seeds: [7]\nmetric: accuracy\nworkers: 3\nsmallest: true\n"
    )
    options = options_of(["--sweep", str(file), "--output", "x", "--seeds", "4"])
    assert (options.seeds, options.fresh_seeds, options.metric) == ([4], [7], "accuracy")
    assert (options.workers, options.smallest) == (3, True)
    found = [(t.method, dict(t.settings)) for t in trials_of(options)[0]]
    base = {"width": 3, "weight_decay": 1e-4, "depth": 2, "seed": 4}
    assert found == [
        *(("sgd", {**base, "lr": lr}) for lr in (0.1, 0.01)),
        *(("sam", {**base, "lr": lr, "rho": rho, "opt": "sam"}) for lr in (0.1, 0.01) for rho in (0.1, 0.2)),
    ]
    words = ("-c", str(recipe), "--function", "sweep.trials:accuracy", "--set", "weight-decay=1e-4", "depth=2")
    typed = options_of([*words, "--seeds", "4", "--grid", "lr=0.1,1e-2", "--output", "x"])
    assert [dict(t.settings) for t in trials_of(typed)[0]] == [settings for _, settings in found[:2]]


def test_the_grid_of_the_command_line_takes_the_place_of_the_files(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("function: sweep.trials:accuracy\nmethods: {sam: {rho: [1, 2]}}\n")
    options = options_of(["--sweep", str(file), "--grid", "opt=sgd", "--output", "x"])
    assert [trial.method for trial in trials_of(options)[0]] == ["sgd"]


def test_training_is_the_default_and_its_settings_are_checked_before_it_begins(run, tmp_path):
    pytest.importorskip("ms_optim.train.loaders")
    recipe = tmp_path / "digits.yaml"
    recipe.write_text("dataset: digits\nopt: sgd\nlr: 1e-1\nepochs: 2\n")
    options = options_of(["-c", str(recipe), "--grid", "opt=sgd,mssam", "rho=0.05,0.1", "lr=0.1,1e-2", "--output", "x"])
    trials, remarks = trials_of(options)
    assert remarks == ["sgd has no rho: it is trained without"]
    assert [trial.method for trial in trials] == ["sgd"] * 2 + ["mssam"] * 4
    assert trials[0].settings == {"dataset": "digits", "opt": "sgd", "lr": 0.1, "epochs": 2, "seed": 0}
    assert trials[-1].settings["opt_kwargs"] == {"rho": 0.1} and trials[-1].settings["lr"] == 0.01
    for words, said in (
        (("opt=sgd", "rhoo=0.05"), "no optimizer of the sweep has an option rhoo"),
        (("opt=mssam", "epochs=many"), "epochs must be int, got 'many'"),
        (("opt=mssam", "batch_size=0"), "batch-size must be at least 1"),
    ):
        code, _, err = run("-c", recipe, "--grid", *words)
        assert code == 2 and said in err and not (tmp_path / "out").exists()
    recipe.write_text("dataset: digits\nopt: mssam\nopt_kwargs: {rho: 0.1}\n")
    code, _, err = run("-c", recipe, "--grid", "opt=sgd,mssam")
    assert code == 2 and "digits has opt_kwargs rho for mssam, which sgd does not take; begin" in err


def test_a_dry_run_runs_nothing(run, tmp_path):
    code, out, _ = run(*FUNCTION, "--grid", "opt=sgd,sam", "--dry-run")
    assert code == 0 and len(out.splitlines()) == 2 and not (tmp_path / "out").exists()


def test_lost_trials_are_an_exit_code_and_are_said(run, tmp_path):
    misbehaving = ("--function", "sweep.trials:misbehaving", "--workers", "0")
    code, out, err = run(*misbehaving, "--grid", "what=ok,raise,diverge")
    assert code == 1
    assert "FAILED: ValueError: rho must be at least 0" in err and "DIVERGED: train_loss is nan" in err
    assert "what = raise" in out and "what = diverge" in out
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("trials/*/record.json")]
    assert sorted(record["status"] for record in records) == ["diverged", "failed", "finished"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--grid", "lr"), "'lr' is not of the form name=value"),
        (("--set", "lr"), "--set 'lr' is not of the form name=value"),
        (("--seeds", "x"), "invalid int value: 'x'"),
        (("--grid", "lr=1", "--fresh-seeds", "0"), "seed 0 cannot be fresh"),
        (("--grid", "opt=sgd", "--baseline", "sam"), "--baseline sam is not among the methods: sgd"),
        (("--metric", "test_top1"), "cannot be chosen by test_top1"),
        (("-c", "absent.yaml"), "absent.yaml: No such file"),
        (("--workers", "-1"), "workers must be at least 0"),
    ],
)
def test_a_wrong_command_line_is_one_line(run, arguments, said):
    code, _, err = run(*FUNCTION, *arguments)
    assert code == 2 and err.splitlines()[-1].startswith("sweep: error: ") and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sead: [1]", "has 'sead'; its keys are"),
        ("seeds: [1, a]", "seeds has to be whole numbers"),
        ("grid: [1]", "grid has to be names with values"),
        ("methods: {sam: 3}", "the method sam needs names with values"),
        ("methods: [sam]", "methods has to be names with a grid each"),
    ],
)
def test_a_wrong_file_is_one_line(run, tmp_path, content, said):
    (tmp_path / "s.yaml").write_text(content)
    code, _, err = run(*FUNCTION, "--sweep", tmp_path / "s.yaml")
    assert code == 2 and said in err


def test_the_folder_is_asked_for(capsys):
    assert main(["--grid", "lr=1"]) == 2
    assert "--output is missing" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar_and_only_failures_get_lines(run, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, err = run("--function", "sweep.trials:misbehaving", "--workers", "0", "--grid", "what=ok,raise")
    assert code == 1 and "2/2" in err and "what = raise, seed 0: FAILED" in err and "[1/2]" not in err


def test_help_says_where_a_name_goes(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0 and "goes to opt_kwargs" in capsys.readouterr().out
