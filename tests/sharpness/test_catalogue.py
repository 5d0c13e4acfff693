"""The catalogue: its rows are the room's functions, and those that are not there are passed over."""

import pytest
import torch
from torch import nn

import ms_optim
from ms_optim.sharpness import Sharpness
from ms_optim.sharpness.catalogue import MEASURES, as_markdown, available


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def later(model, data, radius, rho=0.1, *, granularity="layer", group=None):
    """A measure as somebody may write it."""
    return 10 * radius + rho + len(granularity) + (0 if group is None else 1000)


def test_what_is_there_is_available_in_the_order_of_the_table():
    assert [name for name in MEASURES if name in available()] == list(available())
    assert {"trace", "minimum"} <= set(available())
    for name, measure in MEASURES.items():
        assert measure.name == name and measure.exists == (name in available())
        assert all((measure.formula, measure.cost, measure.invariances, measure.source))


def test_a_measure_appears_with_its_function(monkeypatch):
    monkeypatch.delattr("ms_optim.sharpness.sam_sharpness", raising=False)
    assert "sam" not in available() and "sam" in MEASURES
    monkeypatch.setattr("ms_optim.sharpness.sam_sharpness", later, raising=False)
    sam = available()["sam"]
    assert sam.required == ["radius"] and list(sam.options) == ["radius", "rho", "granularity", "group"]
    assert sam.accepts("rho") and not sam.accepts("data")
    value = sam(network(), None, radius=1.0)
    assert isinstance(value, Sharpness) and value == pytest.approx(15.1)


def test_a_row_with_a_fixed_option_needs_a_function_that_takes_it(monkeypatch):
    neuron = MEASURES["minimum_neuron"]
    assert str(neuron) == 'minimum_sharpness(granularity="neuron")'
    monkeypatch.setattr("ms_optim.sharpness.minimum_sharpness", lambda model, data: 1.0)
    assert not neuron.exists and MEASURES["minimum"].exists
    monkeypatch.setattr("ms_optim.sharpness.minimum_sharpness", later)
    assert neuron.exists
    value = neuron(network(), None, radius=1.0, granularity="layer", group="layers")  # but the row decides
    assert value == pytest.approx(16.1)


def test_measures_are_the_functions():
    model, x = network(), torch.randn(6, 5)
    assert MEASURES["trace"](model, x) == ms_optim.hessian_trace(model, x).total
    assert MEASURES["minimum"](model, x) == ms_optim.minimum_sharpness(model, x)


def test_the_table_in_markdown_has_a_row_for_each():
    lines = as_markdown().splitlines()
    assert len(lines) == 2 + len(available())
    cells = [[cell for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {6}
    assert lines[2].startswith("| `trace_sharpness` | Σ_p c_p")
    assert len(as_markdown(MEASURES.values()).splitlines()) == 2 + len(MEASURES)


def test_the_readme_shows_it():
    from pathlib import Path

    assert as_markdown() in (Path(__file__).parent.parent.parent / "README.md").read_text()
