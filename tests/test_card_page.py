"""The page of benchmarks/first_card.py, from files that were written by hand: no GPU has made them."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import card_page, kernel_results, results

from .fake_result import CEILINGS, CLOCKS, MARK, fake_result

FACTS = {
    "machine": {"device": "NVIDIA Fake", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "capability": "9.0",
                "multiprocessors": 132},
    "clocks": CLOCKS,
    "commit": {"commit": "0123456789ab", "dirty": True, "changes": "x", "reason": None},
    "ceilings": CEILINGS,
}  # fmt: skip


def verdict(
    step: str, status: str = "passed", reason: str | None = None, log: str | None = None
) -> dict[str, Any]:
    return {
        "step": step,
        "status": status,
        "reason": reason,
        "seconds": 3.0,
        "allowed": 60.0,
        "command": [],
        "log": log,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "machine.json").write_text(json.dumps(FACTS))
    (tmp_path / "logs").mkdir()
    return tmp_path


def page_of(folder: Path, *verdicts: dict[str, Any], rehearsed: bool = False) -> str:
    card_page.write(folder, "correctness", verdicts, 100.0, rehearsed)
    return (folder / "page.md").read_text()


def test_the_head_says_what_ran_where(folder: Path) -> None:
    page = page_of(
        folder, verdict("machine"), verdict("tests", "skipped", "no time left: 3 s, and it needs 90 s")
    )
    assert page.startswith("# First card, correctness: NVIDIA Fake\n\n2 steps in 100 s: 1 passed, 1 skipped.")
    assert "driver 580.1; torch 2.11.0; Triton 3.6.0" in page
    assert "commit 0123456789ab with changes" in page
    assert "copies 4.3 TB/s, matmuls in TFLOP/s: bf16 790, high 395, highest 132" in page
    assert "no time left: 3 s, and it needs 90 s" in page
    assert "rehearsal" not in page


def test_a_rehearsal_says_so_first(folder: Path) -> None:
    assert "**A rehearsal without a GPU" in page_of(folder, verdict("machine"), rehearsed=True).splitlines()[2]


def test_a_failed_step_shows_the_end_of_its_log(folder: Path) -> None:
    (folder / "logs" / "machine.log").write_text("first\n" + "more\n" * 9 + "RuntimeError: no device\n")
    page = page_of(folder, verdict("machine", "failed", "exit status 1", "logs/machine.log"))
    assert "**failed**" in page
    assert "RuntimeError: no device" in page
    assert "first" not in page


XML = """<testsuites><testsuite><testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="poor"><skipped message="needs two devices"/></testcase>
<testcase classname="tests.a" name="bad[x]"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
</testsuite></testsuites>"""
LOG = """2 workers [4 items]
tests/a.py::good
[gw0] [ 25%] PASSED tests/a.py::good
tests/a.py::bad[x y]
[gw1] [ 50%] FAILED tests/a.py::bad[x y]
tests/a.py::slow
"""


def test_failed_tests_come_before_skipped_ones(folder: Path) -> None:
    (folder / "tests.xml").write_text(XML)
    (folder / "logs" / "tests.log").write_text(LOG)
    page = page_of(folder, verdict("tests", "failed", "exit status 1", "logs/tests.log"))
    assert "tests: 1 failed, 1 passed, 1 skipped of 4.\n- failed `tests.a::bad[x]` assert 1 == 2\n" in page
    assert page.index("bad[x]` assert") < page.index("- skipped `tests.a::poor` needs two devices")


ONE_PROCESS = """collecting ... collected 9 items / 5 deselected / 4 selected
tests/a.py::good PASSED [ 25%]
tests/a.py::bad[x y] FAILED [ 50%]
tests/a.py::slow
"""


@pytest.mark.parametrize("log", [LOG, ONE_PROCESS], ids=["xdist", "one process"])
def test_without_a_report_the_log_tells_the_outcomes_and_what_was_running(log: str, folder: Path) -> None:
    (folder / "logs" / "tests.log").write_text(log)
    page = page_of(folder, verdict("tests", "timed out", "ended after 60 s", "logs/tests.log"))
    assert "tests: 1 failed, 1 passed of 4.\n- failed `tests/a.py::bad[x y]`\n" in page
    assert "- running when it was ended: `tests/a.py::slow`" in page


def kernel(name: str, microseconds: float) -> dict[str, Any]:
    quantiles = dict.fromkeys(kernel_results.QUANTILES, microseconds)
    return {"kernel": name, "programs": 4, "rounds": 9, "microseconds": quantiles}


def measured(**more: Any) -> dict[str, Any]:
    failed = {
        "shape": "6528x512-bf16",
        "status": "error",
        "reason": "RuntimeError: lost",
        "microseconds": None,
        "kernels": [],
    }
    timed = {"shape": "64x64-high", "status": "timed", "reason": None, "microseconds": 60.0}
    timed["kernels"] = [kernel("gram_forward", 20.0), kernel("gradient", 10.0), kernel("gradient", 30.0)]
    return {"asked": ["64x64-high", "6528x512-bf16", "x"], "complete": False, "shapes": [timed, failed], **more}


ESTIMATE = {"shapes": [{"shape": "64x64-high", "microseconds": 50.0, "floor_microseconds": 15.0, "kernels": [
    {"kernel": "gram_forward", "microseconds": 10.0}, {"kernel": "splitk_reduction", "microseconds": 5.0},
    {"kernel": "gradient", "microseconds": 20.0}, {"kernel": "gradient", "microseconds": 15.0}]}]}  # fmt: skip


def rows_of(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def test_every_kernel_stands_beside_its_estimate(folder: Path) -> None:
    (folder / "kernels.json").write_text(json.dumps(measured()))
    (folder / "estimate.json").write_text(json.dumps(ESTIMATE))
    page = page_of(folder)
    assert "2 of 3 shapes." in page
    assert "Nothing here was measured" not in page
    rows = rows_of(page)
    start = rows.index(["**64x64-high**, 25% of the bound", "50.0", "60.0", "1.20"])
    assert rows[start + 1 : start + 6] == [
        ["gram_forward", "10.0", "20.0", "2.00"],
        ["splitk_reduction", "5.0", "–", "–"],
        ["gradient", "20.0", "10.0", "0.50"],
        ["gradient", "15.0", "30.0", "2.00"],
        ["**6528x512-bf16**: RuntimeError: lost", "", "", ""],
    ]


def test_made_up_times_are_marked(folder: Path) -> None:
    (folder / "kernels.json").write_text(json.dumps(measured(fixture="made up by hand")))
    assert "**Nothing here was measured: made up by hand**" in page_of(folder)


ROWS = """# NVIDIA Fake, torch 2.11.0, Triton 3.6.0, 2026-01-01
# gradient["half"] of sm90, aligned, 132 SMs
# 256x8192-bf16: the table's Gradient(128, 128, 64) stays, 40 us
Row(2048, 8192, Gradient(128, 256, 64)),  # 2048x8192-bf16: 300 us, was 400 us
# moments of sm90, aligned, 132 SMs
# 64x64-high: the process ended
"""


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "estimated"])
def test_new_rows_stand_below_their_tables_beside_the_steps_with_them(timed: bool, folder: Path) -> None:
    (folder / "tune").mkdir()
    (folder / "tune" / "rows.txt").write_text(ROWS)
    step = {"shape": "2048x8192-bf16", "reason": None, "table": {"median": 900.0}, "rows": {"median": 800.0}}
    lost = {"shape": "64x64-high", "reason": "RuntimeError: lost", "table": None, "rows": None}
    document = {"timed": timed, "kernels": [{}, {}, {}], "steps": [step, lost]}
    (folder / "tune" / "tune.json").write_text(json.dumps(document))
    page = page_of(folder)
    assert "3 kernels searched, 2 without a new row." in page
    assert ("Nothing was timed" in page) == (not timed)
    table = '    # gradient["half"] of sm90, aligned, 132 SMs\n    Row(2048, 8192, Gradient(128, 256, 64)),'
    assert table in page
    assert "moments" not in page
    assert ["2048x8192-bf16", "", "900.0", "800.0"] in rows_of(page)
    assert ["64x64-high", "RuntimeError: lost", "", ""] in rows_of(page)


def test_missed_targets_are_bold_and_their_shapes_come_first(folder: Path) -> None:
    document = fake_result()
    document["cases"] = [
        record for record in document["cases"] if record["name"] in ("256x2048-bf16", "256x8192-high")
    ]
    results.save(document, folder / "results" / "fake.json")
    page = page_of(folder)
    verdicts = {record["name"]: record["targets"]["graph"] for record in document["cases"]}
    assert [verdict["met"] for verdict in verdicts["256x8192-high"].values()] == [False, False, True, True]
    found = {over: f"{verdict['found']:.3g}" for over, verdict in verdicts["256x8192-high"].items()}
    missed = ["256x8192-high", f"**{found['eager']} of 40**", f"**{found['compile']} of 20**"]
    rows = rows_of(page)
    start = rows.index([*missed, f"{found['aten']} of 1.5", f"{found['floor']} of 0.35"])
    assert rows[start + 1] == [
        "256x2048-bf16",
        "",
        "",
        f"{verdicts['256x2048-bf16']['aten']['found']:.3g} of 1",
        "",
    ]
    assert "## Targets: 2 missed, 3 met" in page
    assert MARK in page


def test_a_wrong_provider_is_named(folder: Path) -> None:
    results.save(fake_result(), folder / "results" / "fake.json")
    assert "- 256x2048-highest: eager wrong: loss: error 1.0e-01 of its size" in page_of(folder)


def test_the_page_is_short_and_names_where_the_rest_is(folder: Path) -> None:
    (folder / "results").mkdir()
    results.save(fake_result(), folder / "results" / "fake.json")
    (folder / "tests.xml").write_text(XML)
    log = folder / "logs" / "tests.log"
    log.write_text(LOG)
    (folder / "profile.txt").write_text("a line of the profile\n" * 500)
    page = page_of(folder, verdict("tests", "failed", "exit status 1", "logs/tests.log"))
    assert len(page) <= card_page.LIMIT + 1
    assert "more lines: profile.txt" in page
    assert "more lines: results/fake.json" in page
    assert "tests: 1 failed, 1 passed, 1 skipped of 4." in page
