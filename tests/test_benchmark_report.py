"""``python -m benchmarks report``: the files that it refuses, its tables and comparisons, README.md and docs/benchmarks.md."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import figures, machine, report, results, targets
from benchmarks import text as words
from benchmarks.__main__ import main
from benchmarks.cases import CASES

from .fake_result import CEILINGS, MARK, fake_result

Capture = pytest.CaptureFixture[str]
NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def document() -> results.Document:
    return fake_result()


@pytest.fixture
def path(document: results.Document, tmp_path: Path) -> Path:
    path = tmp_path / "fake.json"
    results.save(document, path)
    return path


def refused(capsys: Capture, *arguments: object) -> str:
    """What a refused command prints."""
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def cells(text: str, start: str) -> list[str]:
    """The cells of the one table row that starts so."""
    (row,) = [line for line in text.splitlines() if line.replace(" ", "").startswith(start.replace(" ", ""))]
    return [cell.strip() for cell in row.strip("|").split("|")]


# -- the file -----------------------------------------------------------------------------------------------------


def test_file_is_read_as_it_was_written(path: Path, document: results.Document) -> None:
    assert results.load(path) == document


def test_every_required_key_of_the_schema_is_written(document: results.Document) -> None:
    case, schema = document["cases"][3], results.JSON_SCHEMA
    assert set(schema["required"]) | {"fixture"} == document.keys()
    assert set(schema["$defs"]["case"]["required"]) == case.keys()
    assert set(schema["$defs"]["provider"]["required"]) == case["providers"]["triton"].keys()
    assert set(schema["$defs"]["mode"]["required"]) == case["providers"]["triton"]["modes"]["graph"].keys()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))

    return edit


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "cannot read"),
    "empty": (lambda path: path.write_text(""), "not complete JSON"),
    "cut short": (lambda path: path.write_text(path.read_text()[:-100]), "not complete JSON"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not complete JSON"),
    "a list": (lambda path: path.write_text("[]"), "schema and version []"),
    "another schema": (lambda path: path.write_text('{"schema": "other"}'), "['other', None]"),
    "another version": (edited(lambda d: d.update(version=1)), "only ['vicreg_fast.benchmark', 3] can be read"),
    "a missing key": (edited(lambda d: d.pop("cases")), "'cases' is a required property"),
    "a wrong type": (edited(lambda d: d["cases"][5].update(samples="many")), "$.cases[5].samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_file_is_refused_with_the_reason(case: str, path: Path, capsys: Capture) -> None:
    spoil, reason = REFUSED[case]
    spoil(path)
    message = refused(capsys, path, "--out", path.parent / "out")
    assert reason in message
    assert str(path) in message
    assert not (path.parent / "out").exists()


def test_without_jsonschema_a_file_is_read_and_that_is_said(
    path: Path, document: results.Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.warns(UserWarning, match=re.escape(f"{path} is read without a check of its keys")):
        assert results.load(path) == document


def test_impossible_arguments_are_refused(path: Path, capsys: Capture) -> None:
    before = report.README.read_text()
    assert "two result files" in refused(capsys, "--compare", path)
    assert str(path) in refused(capsys, path, "--out", path)  # a file in place of a folder
    assert "--out" in refused(capsys, "--readme", path, "--out", path.parent)
    assert "not there" in refused(capsys, "--readme", path)
    assert report.README.read_text() == before


def test_readme_takes_no_fake_result(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(results, "RESULTS", path.parent)
    assert "complete runs" in refused(capsys, "--readme", path)


# -- roofline bounds and targets ----------------------------------------------------------------------------------


def test_roofline_bound_is_the_slower_of_operations_and_bytes() -> None:
    expected = {
        "256x8192-highest": (24e-6, "operations"),
        "256x8192-high": (12e-6, "bytes"),
        "2048x8192-bf16": (0.26e-3, "operations"),
        "2600000x64-bf16": (0.46e-3, "bytes"),
        "vicregl-128x49x512-m20-highest": (18e-6, "bytes"),
        "vicregl-128x49x512-m20-bf16": (9e-6, "bytes"),
        "matching-64x1024x768-m20-bf16": (0.13e-3, "operations"),
        "matching-64x1024x768-m20-highest": (0.78e-3, "operations"),
    }
    for name, (seconds, bound_by) in expected.items():
        bound = targets.roofline(NAMED[name], CEILINGS)[NAMED[name].parts[-1]]
        assert bound["seconds"] == pytest.approx(seconds, rel=0.05), name
        assert bound["bound_by"] == bound_by
    one, four = (targets.roofline(NAMED["256x8192-high"], CEILINGS, n)["both"]["seconds"] for n in (1, 4))
    assert four == pytest.approx(one / 4)


def test_targets_are_met_or_missed() -> None:
    case = NAMED["256x8192-highest"]
    seconds = {"eager": 6.0, "compile": 2.4, "triton": 0.1}
    record: dict[str, Any] = {"suite": "vicreg", "floor": {"both": {"seconds": 0.05}}}
    record["providers"] = {
        name: {"status": "right", "modes": {"graph": {"both": {"median": median}}}}
        for name, median in seconds.items()
    }
    record["providers"]["aten"] = {"status": "wrong", "modes": {"launch": {"status": "wrong"}}}
    verdicts = targets.judge(case, record, "cuda")
    assert verdicts["graph"] == {
        "eager": {"asked": 60, "found": pytest.approx(60), "met": True},
        "compile": {"asked": 25, "found": pytest.approx(24), "met": False},
        "aten": {"asked": 1.5, "found": None, "met": None},
        "floor": {"asked": 0.4, "found": pytest.approx(0.5), "met": True},
    }
    assert verdicts["launch"]["floor"] == {"asked": None, "found": None, "met": None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-6, "4 µs"), (9.996e-4, "1000 µs"), (1234.0, "1234 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


# -- the page -----------------------------------------------------------------------------------------------------


def test_page_has_the_measured_numbers(path: Path, document: results.Document, capsys: Capture) -> None:
    out = path.parent / "out"
    assert main(["report", str(path), "--out", str(out)]) == 0
    assert "3 figures" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert f"**Nothing here was measured:** {MARK}" in text
    for name, case in NAMED.items():
        assert (name in text) == ("cuda" in case.devices), name
    (record,) = [record for record in document["cases"] if record["name"] == "256x8192-highest"]
    medians = {name: targets.seconds(record, name, "graph") for name in ("eager", "triton")}
    graph = text.partition("## Suite vicreg, mode graph")[2].partition("<details>")[0]
    row = dict(zip(cells(graph, "| shape"), cells(graph, "| 256x8192-highest"), strict=True))
    assert row["eager"] == words.duration(medians["eager"])
    assert row["triton"] == words.duration(medians["triton"])
    assert row["speed-up over eager"] == f"{medians['eager'] / medians['triton']:.3g}x"
    assert row["% of roofline"] == f"{100 * record['floor']['both']['seconds'] / medians['triton']:.3g}%"
    assert row["samples/s"] == f"{256 / medians['triton']:,.0f}"
    assert cells(text, "| 256x8192-highest | graph | eager")[3:] == ["60", "15.1", "**missed**"]
    first = document["cases"][0]["name"]
    assert cells(text, "| eager | wrong")[2:] == ["loss: error 1.0e-01 of its size", first, "1"]
    assert cells(text, "| all | out of memory")[2] == "CUDA out of memory"
    for picture in out.glob("*.png"):
        assert f"{picture.name}" in text


def test_comparison_marks_overlapping_quantiles(path: Path, tmp_path: Path) -> None:
    others = [tmp_path / "other.json", tmp_path / "third.json"]
    for other, faster in zip(others, (1.001, 2.0), strict=True):
        results.save(fake_result(faster, f"NVIDIA {other.stem}"), other)
    assert main(["report", "--compare", *map(str, [path, *others]), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "NVIDIA Fake against NVIDIA other against NVIDIA third" in text
    row = dict(zip(cells(text, "| shape"), cells(text, "| 4096x16384-highest | graph"), strict=True))
    assert (row["A/B"], row["A/C"]) == ("1x ~", "2x")


def test_line_of_scaling_is_the_longest(document: results.Document) -> None:
    for along, fixed in (("N", "D = 2048, high"), ("D", "N = 2048, high")):
        name, sizes = figures.line_of(document, along)
        assert name == fixed
        assert sorted(sizes.values()) == [2**k for k in range(6, 15)]


def test_result_without_times_has_a_page(document: results.Document) -> None:
    empty = document | {"complete": False, "cases": document["cases"][-1:]}
    assert "**Stopped after 1 of" in "\n".join(report.page(empty))
    assert report.summary(empty).startswith("Nothing was timed.")
    assert "**Stopped after 0 of" in "\n".join(report.page(empty | {"cases": []}))


# -- README.md and docs/benchmarks.md -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "mark"),
    [(report.README, "speed table"), (report.GUIDE, "memory table"), (report.GUIDE, "library table")],
    ids=["speed", "memory", "library"],
)
def test_tables_are_those_of_a_kept_result(file: Path, mark: str) -> None:
    found = report.between(mark).search(file.read_text())
    assert found is not None
    block = found[0]
    path = results.RESULTS / block.partition("from `benchmarks/results/")[2].partition("`")[0]
    document = results.load(path)
    assert document["complete"]
    assert "fixture" not in document
    assert report.blocks(document, path)[mark] == block
    for theme in ("light", "dark") if mark == "speed table" else ():
        with Image.open(machine.ROOT / "docs" / f"speed-{theme}.png") as picture:
            assert picture.info["Title"].endswith(figures.label(document))


def test_every_kept_result_was_measured_on_a_commit() -> None:
    command = ["git", "-C", str(results.RESULTS), "ls-files", "*.json"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    kept = [results.RESULTS / name for name in tracked if name != "schema.json"]
    assert kept
    for path in kept:
        document = results.load(path)
        assert "fixture" not in document, path
        assert document["commit"]["dirty"] is False, path
