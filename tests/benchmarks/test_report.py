"""The report and the pages are what the committed results say, and nothing that did not work can be left out."""

import sys
import types
from pathlib import Path

import measured_numbers
import pytest

from benchmarks import demonstration, report, rows
from benchmarks.harness import RESULTS, Claim, record
from benchmarks.render import figures, pages, rendered
from benchmarks.rows import Row, in_one_row, of_claims

PAGES = sorted(path.parent.name for path in RESULTS.glob("*/table.md"))
DESCRIBED = {"date": "", "cpu": "", "cpu_capability": "", "threads": 1, "torch": "", "python": "", "device": "cpu"}
DESCRIBED |= {"load_average_before": 0, "load_average_after": 0, "commit": "", "uncommitted_changes": False}


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As if matplotlib were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def script(monkeypatch):
    """Makes a script of the folder that is none."""

    def made(name="invented", text="It is so.  And more.", **attributes):
        module = types.ModuleType(f"benchmarks.{name}", text)
        for key, value in attributes.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(report.scripts, "names", lambda: [name])

    return made


def seconds(**values):
    return [
        {"network": network, "contender": name, "round": i, "seconds": value}
        for network, contenders in values.items()
        for name, found in contenders.items()
        for i, value in enumerate(found)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_what_its_results_say(name, no_matplotlib):
    committed = (RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert pages(name, RESULTS / name) == committed, "run python -m benchmarks.render"


def test_every_claim_that_can_be_rendered_is():
    assert rendered(RESULTS) == PAGES


def test_the_report_is_what_the_results_say(no_matplotlib):
    committed = report.place(RESULTS).read_text(encoding="utf-8")
    assert report.page(RESULTS) == committed, "run python -m benchmarks.render"


def test_the_demo_s_table_is_what_its_results_say():
    folder = demonstration.newest(RESULTS)
    assert demonstration.table(folder) == (folder / "table.md").read_text(encoding="utf-8")


def test_what_is_written_by_hand_holds_no_measured_number():
    free = ("the 95 % interval by t",)
    for text in (report.TOP, report.PROSE, *report.FINDINGS):
        for block in measured_numbers.blocks(text):
            for phrase in free:
                block = " ".join(block.split()).replace(phrase, "")
            assert not measured_numbers.looks_measured(block), block


def test_every_link_of_the_report_leads_somewhere():
    place = report.place(RESULTS)
    for path in [place, *(RESULTS / name / "table.md" for name in PAGES)]:
        for target in measured_numbers.links(path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_goals_of_one_claim_make_one_row_with_the_names_of_those_that_missed():
    runs = seconds(
        mlp={"ours": [2.0] * 3, "peer": [8.0] * 3},
        lenet={"ours": [2.0] * 3, "peer": [4.0] * 3},
        cnn={"ours": [2.0] * 3, "peer": [5.0, 6.0, 7.0]},
    ) + [{"network": "vit", "contender": "peer", "failed": "ValueError: no"}]
    networks = ("mlp", "lenet", "cnn", "vit", "none")
    claims = [Claim(network, "faster", "peer", "ours", 3.0, at_least=True) for network in networks]
    (row,) = of_claims([*claims, Claim("mlp", "to compare with", "peer", "ours")], runs)
    assert row.claim == "faster: ≥ 3×" and row.paper == rows.NOTHING
    assert row.ours == "mlp 4.00× [4.00, 4.00] (3); lenet 2.00× [2.00, 2.00] (3); cnn 3.00× [2.75, 3.25] (3)"
    first, *others = row.verdict.split("; ")
    assert first == "2 of 3 reached"
    assert others == [
        "**missed**: lenet",
        "of these the middle half has both: cnn",
        "nothing to compare with: vit",
        "not measured: none",
    ]
    assert rows.did_not_work(row)
    (alone,) = of_claims(claims[:1], runs)
    assert alone.verdict == "reached" and not rows.did_not_work(alone)


@pytest.mark.parametrize(
    ("values", "text", "word"),
    [
        ([0.0, 0.0], "+0.00 ± 0.00 (n = 2)", "the same"),
        ([1.0, 1.1, 1.2, 1.0, 1.1], "+1.08 ± 0.04 (n = 5)", "better"),
        ([-1.0, -1.1, -1.2], "-1.10 ± 0.06 (n = 3)", "worse"),
        ([-1.0, -2.0, -3.0, -1.0, -2.0], "-1.80 ± 0.37 (n = 5)", "worse"),
        # 3.5 standard errors are less than t with two degrees of freedom asks for.
        ([-1.0, -2.0, -3.0], "-2.00 ± 0.58 (n = 3)", "no difference shown"),
        ([1.0], "+1.00 ± nan (n = 1)", "no difference shown"),
    ],
)
def test_a_difference_of_few_seeds_needs_more_than_two_standard_errors(values, text, word):
    assert rows.compared(values) == (text, word)


def test_a_script_offers_its_rows_and_details_are_shown_only_where_they_did_not_work(script, tmp_path):
    given = [
        Row("first", "1 (n = 1)", "as the paper", "1 (arXiv)"),
        Row("second", "2 | 3", "worse"),
        Row("third", "4", "better", detail=True),
        Row("fourth", "5", "**missed**", detail=True),
    ]
    script(summary=lambda runs: given if runs == [{"network": "net"}] else [])
    record(tmp_path / "invented" / "2026-11-21_cpu1", DESCRIBED, [{"network": "net"}])
    page = report.page(tmp_path)
    above, below = page.split("## What did not work")
    assert (
        "| first | 1 (arXiv) | 1 (n = 1) | as the paper | invented |\n| second | – | 2 / 3 | worse | invented |"
        in above
    )
    assert "third" not in page and "fourth" not in above
    assert "| second | 2 / 3 | worse | invented |\n| fourth | 5 | **missed** | invented |" in below
    assert "### Others" in above and "Not measured yet" not in page


def test_a_script_without_results_says_how_to_measure_it(script, tmp_path):
    script(CLAIMS=[Claim("mlp", "faster", "ours", "peer", 1.0)])
    page = report.page(tmp_path)
    command = "python -m benchmarks.invented"
    assert f"| It is so. And more. | – | not measured: `{command}` | not measured | invented |" in page
    assert "\nNot measured yet: invented.\n" in page
    assert f"| It is so. And more. | `{command}` | {report.UNKNOWN_MINUTES} |" in page


def test_a_script_with_a_page_alone_is_pointed_at(script, tmp_path):
    script(body=lambda runs: [])
    record(tmp_path / "invented" / "2026-11-21_cpu1", DESCRIBED | {"minutes": 12.4}, [{}])
    page = report.page(tmp_path)
    assert "| It is so. And more. | – | see its page | – | invented |" in page
    assert "| `python -m benchmarks.invented` | 12 (1 thread) |" in page


def test_what_was_measured_on_a_gpu_says_so_and_what_was_not_is_listed(script, tmp_path):
    runs = seconds(mlp={"ours": [1.0, 1.0]})
    script(CLAIMS=[Claim("mlp", "no slower", "ours", "ours", 1.0)], DEVICES=("cpu", "cuda"))
    record(tmp_path / "invented" / "2026-11-21_cpu1", DESCRIBED, runs)
    assert "\nNot measured on a GPU yet: invented.\n" in report.page(tmp_path)
    record(tmp_path / "invented" / "2026-11-20_cuda_card", DESCRIBED | {"device": "Card 1"}, runs)
    page = report.page(tmp_path)
    assert "| no slower: ≤ 1× | –" in page and "| no slower: ≤ 1× (Card 1) | –" in page
    assert "on a GPU yet" not in page


def test_minutes_of_trainings_are_the_sum_of_their_seconds(script, tmp_path):
    script(body=lambda runs: [])
    record(tmp_path / "invented" / "2026-11-21_cpu1", DESCRIBED, [{"stage": "fresh", "seconds": 90.0}] * 4)
    assert report.minutes("invented", tmp_path) == "6 of one core, in all"
    stopped = {**DESCRIBED, "complete": False}
    record(tmp_path / "invented" / "2026-11-22_cpu1", stopped, [{"stage": "fresh", "seconds": 90.0}] * 2)
    assert report.minutes("invented", tmp_path) == "3 of one core, so far, and not complete"


def test_figures_are_drawn_beside_the_newest_run_and_linked(script, tmp_path):
    script(body=lambda runs: [], draw=lambda runs, path: path.write_text(str(len(runs))))
    record(tmp_path / "invented" / "2026-11-20_cpu1", DESCRIBED, [{}])
    record(tmp_path / "invented" / "2026-11-21_cpu1", DESCRIBED, [{}, {}])
    figures("invented", tmp_path / "invented")
    assert [path.parent.name for path in tmp_path.glob("*/*/figure.svg")] == ["2026-11-21_cpu1"]
    assert "* [invented](invented/2026-11-21_cpu1/figure.svg)" in report.page(tmp_path)


def test_the_report_of_other_results_is_among_them(tmp_path):
    assert report.place(tmp_path) == tmp_path / "README.md"
    assert report.place(RESULTS) == Path(report.__file__).parent / "README.md"


def test_in_short_counts_goals_and_lets_scripts_speak(script, tmp_path):
    goals = [Claim("net", "a is fast", "a", "b", 2.0), Claim("net", "b is very fast", "b", "a", 0.5)]
    script(CLAIMS=goals, in_short=lambda runs: f"There are {len(runs)} lines.")
    record(tmp_path / "invented" / "2026-01-01_cpu1", DESCRIBED, seconds(net={"a": [1.0, 1.0], "b": [1.0, 1.0]}))
    lines = report.in_short({"A chapter": ["invented"]}, tmp_path)
    assert lines[0] == "* A chapter: 1 of 2 goals reached, 1 missed."
    assert lines[1].startswith("* There are 4 lines. ([invented](")
    assert report.in_short({"A chapter": ["invented"]}, tmp_path / "nothing") == []


def test_several_comparisons_make_one_row_with_the_names_under_each_verdict():
    found = [("A", "+1", "better"), ("B, b", "-2", "worse"), ("C", "+3", "better")]
    assert in_one_row(found) == ("A +1; B, b -2; C +3", "better: A · C; worse: B, b")


def test_a_script_may_put_a_table_at_the_top(script, tmp_path):
    record(tmp_path / "invented" / "2026-01-01_cpu1", DESCRIBED, seconds(net={"a": [1.0], "b": [1.0]}))
    script(summary=lambda runs: [], overview=lambda runs: ["| a table |"])
    assert "| a table |" in report.page(tmp_path).split("## Every claim")[0]
    script(summary=lambda runs: [], overview=lambda runs: [])
    assert "| a table |" not in report.page(tmp_path)
