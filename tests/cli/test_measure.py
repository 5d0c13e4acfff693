"""``ms-optim measure``: what it prints and writes is what the functions return."""

import csv
import json
import math

import pytest
import torch
from cli import project
from cli.conftest import QUICK

import ms_optim
from ms_optim.sharpness.catalogue import available

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ms_optim[cli]'")

DIGITS = ("measure", "--model", "cli.project:network", "--data", "digits", "--samples", 40, "--dtype", "float64")
NAMED = ("measure", "--model", "cli.project:network", "--data", "cli.project:batches", "--dtype", "float64")


def digits():
    from ms_optim.demo.training import digits

    return digits(seed=0).x[:40]


def test_layers_and_measures_are_those_of_the_functions(ms, tmp_path):
    run = ms(*DIGITS, "--batch-size", 16, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    assert (run.code, run.err) == (0, "")
    model, x = project.network(), digits()
    traces = ms_optim.hessian_trace(model, x)
    found = ms_optim.balance(model, traces, ms_optim.scale_symmetries(model, x))

    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [layer["name"] for layer in content["layers"]] == list(traces)
    for layer in content["layers"]:
        name = layer["name"]
        assert layer["trace"] == pytest.approx(traces[name], rel=1e-12)
        assert layer["alpha"] == pytest.approx(math.exp(found.log_scale[name]), rel=1e-9)
        assert layer["share"] == pytest.approx(traces[name] * found.weights[name] / found.minimum_sharpness, rel=1e-9)
        assert layer["shape"] == list(model.get_parameter(name).shape)
        assert (layer["kind"], layer["standard_error"]) == ("hessian", 0.0)
    assert sum(layer["share"] for layer in content["layers"]) == pytest.approx(1, rel=1e-12)
    measures = content["measures"]
    assert measures["trace"]["value"] == pytest.approx(traces.total, rel=1e-12)
    assert measures["minimum"]["value"] == pytest.approx(ms_optim.minimum_sharpness(model, x), rel=1e-9)
    assert sum(measures["minimum"]["layers"].values()) == pytest.approx(measures["minimum"]["value"], rel=1e-12)
    assert content["data"]["samples"] == 40 and content["model"]["parameters"] == 64 * 12 + 12 + 12 * 10 + 10

    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    columns = "name shape entries kind trace standard_error alpha share minimum"
    assert reader.fieldnames == columns.split()
    assert [row["name"] for row in rows] == list(traces)
    assert [float(row["trace"]) for row in rows] == pytest.approx(list(traces.values()), rel=1e-12)
    # A measure with a value for each layer has a column of its own.
    assert [float(row["minimum"]) for row in rows] == pytest.approx(list(measures["minimum"]["layers"].values()))
    assert rows[0]["shape"] == "12x64" and rows[0]["entries"] == "768"

    for name in traces:
        assert any(line.startswith(name) and f"{traces[name]:.4g}" in line for line in run.out.splitlines())
    assert f"minimum  {found.minimum_sharpness:.6g}" in run.out
    assert "digits, train, 40 samples" in run.out and "cli.project:network, 910 parameters" in run.out


def test_sampled_traces_have_their_errors(ms, tmp_path):
    assert ms(*NAMED, "--columns", 1, "--probes", 3, "--seed", 4, "--json", tmp_path / "a.json").code == 0
    generator = torch.Generator().manual_seed(4)
    traces = ms_optim.hessian_trace(project.network(), project.batches(), 1, generator=generator, probes=3)
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    found = {layer["name"]: layer["standard_error"] for layer in content["layers"]}
    assert found == pytest.approx(traces.standard_error, rel=1e-9) and max(found.values()) > 0
    assert content["measures"]["trace"]["standard_error"] == pytest.approx(sum(found.values()))
    weights = {layer["name"]: layer["alpha"] ** -2 for layer in content["layers"]}
    bound = sum(weights[name] * error for name, error in found.items())
    assert content["measures"]["minimum"]["standard_error"] == pytest.approx(bound)


def test_one_signed_column_has_no_error(ms, tmp_path):
    run = ms(*NAMED, "--columns", 1, "--probes", 1, "--json", tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert {layer["standard_error"] for layer in content["layers"]} == {None}
    assert run.code == 0 and "±" not in run.out


def test_json_in_place_of_the_tables(ms):
    run = ms(*NAMED, "--json", "-", "--measures", "trace")
    content = json.loads(run.out)
    assert list(content["measures"]) == ["trace"]
    assert content["options"]["measures"] == ["trace"]


def test_the_figure_is_an_image(ms, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ms_optim[cli]'")
    assert ms(*NAMED, "--figure", tmp_path / "a.png").code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_timm_checkpoint_says_how_many_classes_it_has(ms, timm_checkpoint, tmp_path):
    run = ms("measure", *QUICK, "--checkpoint", timm_checkpoint, "--columns", 2, "--json", tmp_path / "a.json")
    assert run.code == 0 and "random" in run.out and "not what was trained on" in run.out
    assert f"{timm_checkpoint} [state_dict]" in run.out
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "a.json").read_text())["layers"]}
    assert layers["fc.weight"]["shape"][0] == 7
    assert "in front of a normaliser" in run.out


def test_the_average_of_the_weights_is_another_network(ms, timm_checkpoint):
    texts = [
        ms("measure", *QUICK, "--checkpoint", timm_checkpoint, "--columns", 1, "--json", "-", *ema).out
        for ema in ((), ("--ema",))
    ]
    first, second = (json.loads(text)["measures"]["trace"]["value"] for text in texts)
    assert abs(first - second) > 1e-3 * abs(first)


def test_all_measures_are_those_of_the_catalogue(ms, tmp_path):
    few = ["renyi", "logdet", "frobenius"]
    settings = [f"{name}.probes=3" for name in few if name in available()]
    settings += [f"{name}.steps=3" for name in ("sam", "adaptive", "bn_invariant") if name in available()]
    chosen = ("--set", *settings) if settings else ()
    run = ms(*NAMED, "--measures", "all", "--json", tmp_path / "a.json", *chosen)
    assert run.code == 0
    measures = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["measures"]
    assert list(measures) == [name for name, measure in available().items() if not measure.required]
    assert all(f"\n{name} " in run.out for name in measures)
    # The network is an ordinary one: whatever is in the catalogue measures it.
    assert {name: found.get("reason") for name, found in measures.items() if found["value"] is None} == {}


def labelled_measure(model, data, rho=0.1, columns=None):
    """A measure that needs labels, and fails for a negative ρ."""
    if rho < 0:
        raise ValueError(f"rho must be >= 0, got {rho}")
    return rho * sum(len(y) for _, y in data)


def test_a_measure_takes_the_options_that_were_set(ms, monkeypatch):
    monkeypatch.setattr("ms_optim.sharpness.sam_sharpness", labelled_measure, raising=False)
    run = ms(*NAMED, "--measures", "sam", "--set", "sam.rho=0.5", "--json", "-")
    assert json.loads(run.out)["measures"]["sam"]["value"] == 0.5 * 10


def test_a_measure_that_fails_leaves_the_others_and_fails_the_command(ms, monkeypatch):
    monkeypatch.setattr("ms_optim.sharpness.sam_sharpness", labelled_measure, raising=False)
    run = ms(*NAMED, "--measures", "sam,trace", "--set", "sam.rho=-1")
    assert run.code == 2
    assert "\ntrace " in run.out and "not measured" in run.out
    assert run.err == "ms-optim: error: 1 of 2 measures could not be taken: sam: ValueError: rho must be >= 0, got -1\n"


def test_without_labels_what_needs_them_is_left_out_and_said(ms, monkeypatch):
    monkeypatch.setattr("ms_optim.sharpness.sam_sharpness", labelled_measure, raising=False)
    given = ("measure", "--model", "cli.project:network", "--data", "cli.project:unlabelled")
    run = ms(*given, "--measures", "all")
    assert run.code == 0 and "sam: it needs labels, and the data has none" in run.out
    assert ms(*given, "--measures", "sam").code == 2


def test_where_symmetries_cannot_be_read_there_are_still_traces(ms):
    run = ms("measure", "--model", "cli.project:Undecided", "--data", "cli.project:batches", "--measures", "trace")
    assert run.code == 0 and "no α* and no minimum sharpness" in run.out
    assert any(line.startswith("first.weight") and "–" in line for line in run.out.splitlines())


def test_without_a_symmetry_a_line_says_so(ms):
    run = ms("measure", "--model", "cli.project:smooth", "--data", "cli.project:inputs", "--measures", "trace")
    assert run.code == 0
    assert run.err.startswith("ms-optim: warning: Sequential has no scale symmetry") and run.err.count("\n") == 1


def test_the_catalogue_is_shown(ms, capsys):
    with pytest.raises(SystemExit) as left:
        ms("measure", "--list-measures")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(measure.formula in shown for measure in available().values())


def test_a_figure_without_matplotlib_is_refused_before_anything_is_computed(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused("measure", "--model", "nobody:knows", "--data", "digits", "--figure", tmp_path / "a.png")
    assert "--figure needs matplotlib" in line and "pip install 'ms_optim[cli]'" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--measures", "sharp"), "there is no measure 'sharp'; there are trace, minimum"),
        (("--measures", ","), "no measure is named"),
        (("--set", "trace.rho=1"), "trace_sharpness takes columns"),
        (("--set", "trace"), "not of the form measure.option=value"),
        (("--columns", "few"), "neither a number nor rank"),
        (("--columns", "-1"), "columns"),
        (("--json", "nowhere/a.json"), "there is no folder nowhere"),
        (("--csv", "."), "is a folder; name a file"),
        (("--figure", "a.doc"), "matplotlib writes no .doc"),
        (("--samples", "0"), "--samples must be at least 1, got 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refused, arguments, said):
    assert said in refused(*NAMED, *arguments)


def test_a_measure_that_this_version_lacks_is_named(refused, monkeypatch):
    monkeypatch.delattr("ms_optim.sharpness.trace_sharpness")
    assert "'trace' (its function is not part of this version)" in refused(*NAMED, "--measures", "trace")
