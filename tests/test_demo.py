"""The demo: its data are the real ones, its two starts are one function, and one short run writes all it promises."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's data need scikit-learn: pip install 'ms_optim[demo]'")
pytest.importorskip("tqdm", reason="the demo's progress bars need tqdm: pip install 'ms_optim[demo]'")

from ms_optim.demo import training
from ms_optim.demo.__main__ import main
from ms_optim.demo.report import mean_and_error


def run_of(model="mlp", optimizer="SGD", start="usual", seed=0):
    return training.Run(model, optimizer, start, seed, epochs=2, scale=1.0, label_noise=0.0)


def test_digits_are_split_and_standardised():
    data = training.digits(seed=0)
    assert data.x.shape == (1000, 1, 8, 8) and data.x_test.shape == (797, 1, 8, 8)
    assert data.x.mean().abs() < 1e-12 and abs(data.x.std() - 1) < 1e-12
    # No image is in both sets: every image of this data set occurs once.
    together = torch.cat([data.x, data.x_test]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797


def test_label_noise_touches_training_labels_only():
    clean, noisy = training.digits(seed=0), training.digits(seed=0, label_noise=0.5)
    assert torch.equal(clean.x, noisy.x) and torch.equal(clean.y_test, noisy.y_test)
    # 1,000 labels, each redrawn with probability 1/2 and then wrong with 9/10: 450 ± 15.7; five deviations.
    assert abs(int((clean.y != noisy.y).sum()) - 450) < 79


@pytest.mark.parametrize("model", training.MODELS)
def test_both_starts_are_the_same_function_with_other_weights(model):
    x = training.digits(seed=0).x[:50]
    usual, rescaled = (training.initial(run_of(model, start=start)).eval() for start in training.STARTS)
    torch.testing.assert_close(usual(x), rescaled(x), rtol=1e-10, atol=1e-10)
    pairs = zip(usual.parameters(), rescaled.parameters(), strict=True)
    log_scales = [(q.norm() / p.norm()).log() for p, q in pairs if p.norm() > 0]
    assert max(log_scales) - min(log_scales) > 0.5


def test_a_run_depends_on_its_description_alone():
    first, second = (training.train(run_of(optimizer="MSSAM")) for _ in range(2))
    assert first == second


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0])  # s = 1, n = 3
    assert mean == 2.0
    assert error == pytest.approx(3**-0.5)


@pytest.mark.slow
def test_quick_demo_writes_table_figure_and_results(tmp_path):
    pytest.importorskip("matplotlib", reason="the demo's figure needs matplotlib: pip install 'ms_optim[demo]'")
    command = [sys.executable, "-W", "error", "-m", "ms_optim.demo", "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in run.stdout
    assert table.count("\n") == 2 + len(training.MODELS) * len(training.OPTIMIZERS) * len(training.STARTS)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"

    outcomes = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["outcomes"]
    for model in training.MODELS:
        starts = [outcome for outcome in outcomes if outcome["run"]["model"] == model]
        values = [outcome["sharpness_before"] for outcome in starts]
        # One function, one minimum sharpness, however it is scaled. The trainings are in float32: a rescaling rounds
        # each weight by 6e-8, which the sums of a few layers amplify; a wrong scale would show at 1e-1.
        assert max(values) / min(values) < 1 + 1e-3
        for outcome in starts:
            # It is solved for, and the traces at the balanced weights are measured; they must sum to it.
            assert sum(outcome["balanced_layers"].values()) == pytest.approx(outcome["sharpness_before"], rel=1e-3)


def test_in_process_demo_of_one_optimizer(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the demo's figure needs matplotlib: pip install 'ms_optim[demo]'")
    main(["--quick", "--workers", "0", "--models", "mlp", "--optimizers", "MSSAM", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| MSSAM") == 2
    assert {"table.md", "figure.png", "results.json"} == {path.name for path in tmp_path.iterdir()}


def test_missing_library_is_named_together_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(SystemExit, match=r"matplotlib.*pip install 'ms_optim\[demo\]'"):
        main(["--quick"])


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--epochs", "-1"], ["--workers", "-1"], ["--models", "vgg"]])
def test_impossible_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "error:" in capsys.readouterr().err
