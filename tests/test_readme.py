"""The README is true: its code runs, and the tables in it are the ones that were measured and committed."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_every_table_in_the_readme_is_a_committed_result():
    claims = re.findall(r"<!-- table: (\S+) -->\n\n?((?:\|.*\n)+)", README)
    assert len(claims) >= 3
    for path, table in claims:
        lines = [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        missing = [line for line in table.splitlines() if line not in lines]
        assert not missing, f"{path} does not hold the README's rows {missing}"


def test_every_link_in_the_readme_leads_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
