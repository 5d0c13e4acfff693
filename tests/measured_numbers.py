"""Numbers in prose that look as if they had been measured, and the result files that they are said to come from.

What counts: a number with a unit of measurement (per cent, ×, times, points, seconds, bytes), alone or in a row of
numbers such as "22.4 to 798 times"; whatever stands around a "±"; and, but in tables, a decimal number.  "2 cores",
"1000 classes", versions and all code are free.  A paragraph, or a point of a list, with such numbers names its source
anywhere in it, in a comment that no reader sees:

    <!-- from: benchmarks/results/overhead/table.md -->

and then the numbers must occur in the named files as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_ROW = rf"{_NUMBER}(?:\s*(?:,|to|and|or|against|, and)\s+{_NUMBER})*"
_UNIT = r"(?:%|per\s+cent\b|×|(?:times|points?|seconds?|ms|s|minutes?|hours?|[KMG]i?B)\b)"
_MEASURED = re.compile(rf"(?<![\w.])({_ROW})\s*{_UNIT}|({_NUMBER})\s*±\s*({_NUMBER})")
_DECIMAL = re.compile(r"(?<![\w.,])\d[\d,]*\.\d+(?![\w.])")
_SOURCE = re.compile(r"<!-- from: (.+?) -->", flags=re.DOTALL)


def blocks(markdown: str) -> Iterator[str]:
    """Paragraphs, points of lists and tables; neither code nor tables that are marked as copies of a result."""
    prose = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for part in re.split(r"\n\s*\n", prose):
        for block in re.split(r"\n(?=\s*\* )", part):
            if block.strip() and not block.startswith(("    ", "<!-- table: ")):
                yield block


def plain(block: str) -> str:
    """A block without code, targets of links, comments, and the names of papers and versions."""
    paper, version = r"arXiv\s+\d{4}\.\d{4,5}", r"(?:Python|torch|timm)\s+(?:≥\s+)?\d+\.[\d.]+"
    for markup in (r"`[^`]*`", r"\]\([^)]*\)", r"<!--.*?-->", paper, version):
        block = re.sub(markup, " ", block, flags=re.DOTALL)
    return block


def looks_measured(block: str) -> list[str]:
    """Numbers with a unit of measurement or an error; in prose, decimal numbers as well."""
    text = plain(block)
    found = [match.group(1) or f"{match.group(2)} {match.group(3)}" for match in _MEASURED.finditer(text)]
    numbers = [number for row in found for number in re.findall(_NUMBER, row)]
    return numbers if block.lstrip().startswith("|") else list(dict.fromkeys(numbers + _DECIMAL.findall(text)))


def sources(block: str) -> list[str]:
    """The files that a block names."""
    return [path for found in _SOURCE.findall(block) for path in found.split()]


def missing(block: str, folder: Path) -> list[str]:
    """Numbers of a block that names its sources which are in none of them."""
    known = {n for path in sources(block) for n in re.findall(_NUMBER, (folder / path).read_text(encoding="utf-8"))}
    return [number for number in looks_measured(block) if number not in known]


def links(markdown: str) -> list[str]:
    """Targets of links and images within the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", markdown) if not target.startswith("http")]
