"""The README is true: its code runs, and its tables and numbers are the ones that were measured and committed."""

from __future__ import annotations

import re
from pathlib import Path

import measured_numbers
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_in_the_readme_runs(capsys):
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["balance"].minimum_sharpness > 0
    printed = capsys.readouterr().out
    assert "gauss-newton" not in printed
    assert "independent rescalings" in printed


def tables_of(text):
    """All tables: lists of their lines."""
    return [found.splitlines() for found in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]


def test_every_table_in_the_readme_is_a_committed_result():
    claims = re.findall(r"<!-- table: (\S+) -->\n\n?((?:\|.*\n)+)", README)
    assert len(claims) >= 3
    for path, table in claims:
        head, rows = table.splitlines()[:2], table.splitlines()[2:]
        same_head = [found for found in tables_of((ROOT / path).read_text(encoding="utf-8")) if found[:2] == head]
        # All rows are of one table with this head: a column is not what another table's head says.
        missing = [[row for row in rows if row not in found[2:]] for found in same_head]
        assert [] in missing, f"{path} has no table with the README's head and rows: {head[0]}, {missing}"


# Numbers that no benchmark measures: the settings of an experiment, and a number of passes, 2 s, in a formula.
NOT_MEASURED = ("20% of the training labels", "| 2 s |")


def test_every_measured_number_in_the_prose_is_in_the_results_that_it_names():
    marked = [block for block in measured_numbers.blocks(README) if measured_numbers.sources(block)]
    assert len(marked) >= 6
    for block in marked:
        missing = measured_numbers.missing(block, ROOT)
        assert not missing, f"{measured_numbers.sources(block)} do not hold {missing}, of: {block}"


def test_prose_with_measured_numbers_names_its_source():
    for block in measured_numbers.blocks(README):
        for phrase in NOT_MEASURED:
            block = block.replace(phrase, "")
        found = measured_numbers.looks_measured(block)
        assert not found or measured_numbers.sources(block), f"add <!-- from: PATH --> for {found} to: {block}"


def test_what_looks_measured():
    paragraphs = list(
        measured_numbers.blocks("It takes 2 to 3.5 times as\nlong on 2 cores,\n<!-- from: a b -->\n\n* 4 ± 1 %\n* no")
    )
    assert [measured_numbers.looks_measured(block) for block in paragraphs] == [["2", "3.5"], ["4", "1"], []]
    assert [measured_numbers.sources(block) for block in paragraphs] == [["a", "b"], [], []]
    free = "`rho=0.05` with torch ≥ 2.6 ([arXiv 2106.12612](https://arxiv.org/abs/2106.12612)), 1000 classes, batch 256"
    assert measured_numbers.looks_measured(free) == []
    assert measured_numbers.looks_measured("the best was 0.4 (MLP)") == ["0.4"]
    assert measured_numbers.looks_measured("| a | 0.1 | 10 to 40 products |\n") == []
    assert not list(measured_numbers.blocks("```\n5 % of it\n```"))


def test_a_number_that_is_in_no_named_file_is_found(tmp_path):
    (tmp_path / "table.md").write_text("| 1.25× [1.2, 1.3] (30) |")
    assert measured_numbers.missing("1.25 to 1.30 times <!-- from: table.md -->", tmp_path) == ["1.30"]


def test_every_link_in_the_readme_leads_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_figures_in_the_readme_are_there():
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(shown) >= 2
    assert [path for path in shown if not (ROOT / path).is_file()] == []
