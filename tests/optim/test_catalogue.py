"""The README's table of optimizers is the catalogue's, which has a row for each and says what it costs."""

from pathlib import Path

import pytest
from cases import EVERY

import ms_optim
from ms_optim.optim.catalogue import OPTIMIZERS, as_markdown

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def test_every_public_optimizer_has_its_row():
    public = {
        name
        for name in ms_optim.__all__
        if isinstance(getattr(ms_optim, name), type) and issubclass(getattr(ms_optim, name), ms_optim.SharpnessAware)
    }
    assert public - {"SharpnessAware"} == {name.partition("(")[0] for name in OPTIMIZERS}


def test_the_readme_shows_it():
    assert as_markdown() in README


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_number_of_passes_is_the_one_that_a_step_makes(case):
    name = case.kind.__name__.removesuffix("Here")
    ascent = case.options.get("ascent")
    row = OPTIMIZERS[f'{name}(ascent="{ascent}")' if ascent and name == "SAM" else name]
    samples = case.options.get("samples", 2 if name in ("FrobSAM", "UniversalSAM") else 1)
    counted = {"1": 1, "2": 2, "2 s": 2 * samples, "1 + n": 1 + samples, "1 + 1/k": 2}[row.passes]
    one_pass_variant = ascent in ("momentum", "previous")
    two_pass_variant = case.options.get("gradient") == "antithetic"
    assert case.passes == (1 if one_pass_variant else 2 if two_pass_variant else counted)
