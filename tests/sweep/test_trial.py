"""A trial is its settings and its function; its record says what came of it."""

import math

import numpy as np
import pytest

from ms_optim.errors import CommandLineError
from ms_optim.sweep import Result, Trial
from ms_optim.sweep.records import Records, died, read, write
from ms_optim.sweep.trial import DIVERGED, FAILED, FINISHED, folder_of

SETTINGS = {"lr": 0.1, "opt": "sam", "opt_kwargs": {"rho": 0.05, "adaptive": True}, "seed": 1}


def test_the_key_depends_on_settings_and_function_alone():
    key = Trial(SETTINGS).key("a:b")
    assert Trial(dict(reversed(SETTINGS.items())), "method", "problem", "fresh").key("a:b") == key
    assert Trial(SETTINGS).key("a:c") != key
    for changed in ({"lr": 0.2}, {"seed": 2}, {"opt_kwargs": {"rho": 0.05, "adaptive": False}}, {"epochs": 1}):
        assert Trial({**SETTINGS, **changed}).key("a:b") != key
    # The folders of sweeps that were begun with an earlier version are found again.
    assert key == "21c905c91b64d1e4"


def test_one_is_one_however_it_is_written_and_true_is_not():
    assert Trial({"lr": 1}).key("a:b") == Trial({"lr": 1.0}).key("a:b") != Trial({"lr": True}).key("a:b")


def test_trials_of_one_setting_differ_in_their_seed_alone():
    one, other = Trial(SETTINGS), Trial({**SETTINGS, "seed": 7})
    assert one.setting_key == other.setting_key and "seed" not in one.setting and (one.seed, other.seed) == (1, 7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"output": "x"}, "output = 'x', which the sweep sets itself"),
        ({"resume": "auto"}, "resume"),
        ({"model": object()}, "JSON has no word"),
        ({"lr": math.nan}, "JSON has no word"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(settings, said):
    with pytest.raises(CommandLineError, match=said):
        Trial(settings)


def test_what_a_function_returns_is_finished_diverged_or_no_outcome():
    trial = Trial({"seed": 0})
    good = Result.returned(trial, {"accuracy": np.float32(0.5), "epochs": np.int64(3), "note": "x", "test": None})
    assert good.status == FINISHED and good.outcome == {"accuracy": 0.5, "epochs": 3, "note": "x", "test": None}
    assert type(good.outcome["accuracy"]) is float and type(good.outcome["epochs"]) is int
    assert good.value("accuracy") == 0.5 and good.value("test") is None and good.value("absent") is None
    lost = Result.returned(trial, {"accuracy": 10.0, "loss": math.inf})
    assert lost.status == DIVERGED and lost.error == "loss is inf"
    assert lost.value("accuracy") is None  # of a diverged trial no number counts
    assert Result.returned(trial, 3).status == FAILED
    assert Result.returned(trial, {"x": {1, 2}}).status == FAILED


@pytest.mark.parametrize("outcome", [{"accuracy": 0.1, "n": 3}, {"loss": math.nan}])
def test_a_record_is_read_as_it_was_written_but_for_what_json_cannot_say(tmp_path, outcome):
    trial = Trial(SETTINGS, "sam", "digits", "fresh")
    result = Result.returned(trial, outcome, seconds=1.5, host={"torch": "2"}, log="log.txt")
    Records(tmp_path)
    folder_of(tmp_path, trial.key("a:b")).mkdir()
    write(tmp_path, "a:b", result)
    found = Records(tmp_path).result(trial, "a:b")
    assert found is not None and found.trial == trial
    assert (found.status, found.error, found.seconds, found.host) == (result.status, result.error, 1.5, {"torch": "2"})
    assert found.outcome == {name: None if math.isnan(value) else value for name, value in outcome.items()}
    assert Records(tmp_path).result(trial, "a:c") is None


def test_a_file_that_is_no_record_is_named(tmp_path):
    file = tmp_path / "record.json"
    file.write_text('{"key": "1"}')
    with pytest.raises(ValueError, match="record.json is no record of a trial .* remove it"):
        read(file)


def test_a_trial_whose_process_is_gone_has_a_reason():
    assert died(Trial({}), "killed").status == FAILED and died(Trial({}), "killed").error == "killed"
