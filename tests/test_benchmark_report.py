"""``python -m benchmarks report``: what it reads and refuses, its page, figures and comparison, and README."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import figures, machine, page, report, results
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Distributed

from .played_result import CEILINGS, MARK, played_result

Capture = pytest.CaptureFixture[str]
NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def document() -> results.Document:
    return played_result()


@pytest.fixture
def path(document: results.Document, tmp_path: Path) -> Path:
    path = tmp_path / "played.json"
    results.save(json.loads(json.dumps(document)), path)
    return path


# -- the file ---------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(path: Path, document: results.Document) -> None:
    assert results.load(path) == document


def edited(change: Callable[[dict[str, Any]], object], again: bool = False) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = json.loads(path.read_text())
        change(held)
        if again:
            held["sha256"] = results.digest(held)
        path.write_text(json.dumps(held))

    return edit


REFUSED = {
    "not there": (lambda path: path.unlink(), "cannot read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
    "empty": (lambda path: path.write_text(""), "cut short"),
    "cut short": (lambda path: path.write_text(path.read_text()[:-100]), "cut short"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no JSON"),
    "a list": (lambda path: path.write_text("[]"), "its schema is None"),
    "another file": (lambda path: path.write_text('{"schema": "other"}'), "its schema is 'other'"),
    "version 1": (edited(lambda d: d.update(version=1), again=True), "version 1 of the schema; version 3 is read"),
    "a faster time": (
        edited(lambda d: d["cases"][5]["providers"]["triton"]["modes"]["graph"]["both"].update(median=1e-9)),
        "was edited",
    ),
    "no checksum": (edited(lambda d: d.pop("sha256")), "was edited"),
    "no cases": (edited(lambda d: d.pop("cases"), again=True), "'cases' is a required property"),
    "a word for a time": (
        edited(lambda d: d["cases"][5].update(samples="many"), again=True),
        "$.cases[5].samples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(case: str, path: Path, capsys: Capture) -> None:
    spoil, reason = REFUSED[case]
    spoil(path)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(path), "--out", str(path.parent / "out")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert str(path) in message
    assert not (path.parent / "out").exists()


def test_every_key_of_the_schema_is_in_a_result(document: results.Document) -> None:
    """What the schema calls required is what is written: nothing is read that may be missing."""
    case = document["cases"][3]
    schema = results.schema()
    assert set(schema["required"]) | {"fixture"} == document.keys()
    assert set(schema["$defs"]["case"]["required"]) == case.keys()
    assert set(schema["$defs"]["provider"]["required"]) == case["providers"]["triton"].keys()
    assert set(schema["$defs"]["mode"]["required"]) == case["providers"]["triton"]["modes"]["graph"].keys()


# -- the floor and the targets ------------------------------------------------------------------------------------


def test_floor_is_the_slower_of_operations_and_bytes() -> None:
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
        found = report.floor(NAMED[name], CEILINGS)
        whole = found["both" if "both" in found else "forward"]
        assert whole["seconds"] == pytest.approx(seconds, rel=0.05), name
        assert whole["bound_by"] == bound_by
        assert sum(found[part]["bytes"] for part in found if part != "both") == whole["bytes"]


def test_the_floor_of_ranks_is_shared() -> None:
    (case, *_) = [case for case in CASES if isinstance(case, Distributed)]
    one, four = (report.floor(case, CEILINGS, ranks)["both"]["seconds"] for ranks in (1, 4))
    assert four == pytest.approx(one / 4)


def test_targets_are_met_or_missed() -> None:
    case = NAMED["256x8192-highest"]
    times = {"eager": 6.0, "compile": 2.4, "triton": 0.1}
    entries: dict[str, Any] = {
        name: {"status": "right", "modes": {"graph": {"status": "timed", "both": {"median": seconds}}}}
        for name, seconds in times.items()
    }
    entries["aten"] = {"status": "wrong", "modes": {"launch": {"status": "wrong"}}}
    record: dict[str, Any] = {
        "name": case.name, "suite": "vicreg", "samples": 256, "providers": entries,
        "floor": {"both": {"seconds": 0.05, "operations": 10**12, "bytes": 10**9}},
    }  # fmt: skip
    judged = report.judge(case, record, "cuda")
    assert {name: (j["asked"], j["met"]) for name, j in judged["graph"].items()} == {
        "eager": (60, True),
        "compile": (25, False),
        "aten": (1.5, None),
        "floor": (0.4, True),
    }
    assert judged["launch"]["floor"] == {"asked": None, "found": None, "met": None}
    record["targets"] = judged
    row = report.rows_of([record], "graph").splitlines()[2]
    assert row == (
        "| 256x8192-highest | 6 s | 2.4 s | wrong | 100 ms | 60x (60x) | – (1.5x) | "
        "2.56 k | 10 | 10 | 50% (40%) |"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-6, "4 µs"), (9.996e-4, "1e+03 µs"), (1234.0, "1234 s")],
)
def test_durations(seconds: float, words: str) -> None:
    found = report.duration(seconds)
    assert found == words.replace("1e+03", "1000")


# -- the page -----------------------------------------------------------------------------------------------------


def test_a_page_says_what_was_measured_and_what_was_not(path: Path, capsys: Capture) -> None:
    out = path.parent / "out"
    assert main(["report", str(path), "--out", str(out)]) == 0
    assert "4 figures" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert f"**Nothing here was measured:** {MARK}" in text
    for heading in (
        "What was asked of it",
        "VICReg, forward and backward, mode graph",
        "Patch matching, forward, mode",
    ):
        assert f"## {heading}" in text
    for name in NAMED:
        assert (name in text) == ("cuda" in NAMED[name].devices), name
    first = results.load(path)["cases"][0]["name"]
    assert f"| eager | wrong | loss: error 1.0e-01 of its size | {first} |" in text
    assert "CUDA out of memory" in text
    assert "**missed**" in text
    assert "700.0 W" in text
    for name in figures.FIGURES:
        for theme in ("light", "dark"):
            assert f"{name}-{theme}.png" in text
            assert (out / f"{name}-{theme}.png").stat().st_size > 10_000


def test_figures_differ_by_their_ground(path: Path, tmp_path: Path) -> None:
    from PIL import Image

    light, dark = figures.save(lambda: figures.speedups([results.load(path)]), tmp_path, "speed")
    corners = [Image.open(picture).convert("L").getpixel((0, 0)) for picture in (light, dark)]
    assert corners[0] == 255
    assert isinstance(corners[1], int)
    assert corners[1] < 40


def test_a_sweep_is_the_longest_line_of_shapes(document: results.Document) -> None:
    for along, fixed in (("N", 2048), ("D", 2048)):
        other, records = figures.sweep(document["cases"], along)
        assert other == fixed
        values = [record["shape"][along] for record in records]
        assert values == [2**k for k in range(6, 15)]
        assert {figures.products_of(record) for record in records} == {"high"}


def test_a_comparison_marks_what_overlaps(path: Path) -> None:
    other = path.parent / "other.json"
    results.save(played_result(faster=1.001, device="NVIDIA Other"), other)
    third = path.parent / "third.json"
    results.save(played_result(faster=2.0, device="NVIDIA Third"), third)
    out = path.parent / "out"
    assert main(["report", "--compare", str(path), str(other), str(third), "--out", str(out)]) == 0
    text = (out / "compare.md").read_text()
    assert "NVIDIA Played against NVIDIA Other against NVIDIA Third" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 4096x16384-highest | graph")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4] == "1x"
    assert cells[6] == "1x ~"
    assert cells[8].startswith("2x")
    assert "~" not in cells[8]


def test_two_runs_of_one_device_are_two_series(document: results.Document) -> None:
    figure = figures.speedups([document, document])
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label[:2] for label in labels] == ["A:", "B:"]


def test_sweeps_of_other_shapes_are_not_drawn_over_each_other(document: results.Document) -> None:
    other = json.loads(json.dumps(document))
    other["cases"] = [case for case in other["cases"] if case["shape"].get("D") != 2048]
    figure = figures.scaling([document, other])
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not [label for label in labels if label.startswith("B:")]


def test_one_file_cannot_be_compared(path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--compare", str(path)])
    assert "two result files" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(path), "--out", str(path)])
    assert str(path) in capsys.readouterr().err


def test_a_comparison_leaves_the_page_s_figures(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["report", str(path), "--out", str(out)]) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(["report", "--compare", str(path), str(path), "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    there = {file.name for file in out.iterdir()} - before.keys()
    assert {
        "compare.md",
        "compare-speedups-light.png",
        "compare-memory-A-dark.png",
        "compare-memory-B-dark.png",
    } <= there


def test_a_run_that_was_continued_in_vain_keeps_its_ceilings(document: results.Document) -> None:
    found = json.loads(json.dumps(document))
    found["sessions"].append({**found["sessions"][0], "ceilings": None})
    assert figures.roofline([found]) is not None


# -- README.md and docs/benchmarks.md ------------------------------------------------------------------------------

GUIDE = machine.ROOT / "docs" / "benchmarks.md"  # with the tables of memory and of other libraries


def test_readme_shows_what_its_result_file_holds() -> None:
    """``python -m benchmarks report --readme FILE`` writes both tables and the figure."""
    text = page.README.read_text()
    path = results.RESULTS / page.shown(text, "speed table")
    document = results.load(path)
    assert "fixture" not in document
    assert document["complete"]
    assert page.between(text, "speed table") == page.readme_speed(document, path)
    assert page.between(GUIDE.read_text(), "memory table") == page.readme_memory(document)
    for theme in ("light", "dark"):
        with Image.open(machine.ROOT / "docs" / f"speed-{theme}.png") as picture:
            assert picture.info["Source"] == document["sha256"], "the figure is of another result"


def test_a_figure_says_what_it_was_drawn_from(document: results.Document, tmp_path: Path) -> None:
    for path in figures.save(lambda: figures.speedups([document]), tmp_path, "speed", "a result"):
        with Image.open(path) as picture:
            assert picture.info["Source"] == "a result"


def test_readme_shows_what_was_measured_beside_libraries() -> None:
    text = GUIDE.read_text()
    path = results.RESULTS / page.shown(text, "library table")
    document = results.load(path)
    assert document["complete"]
    assert page.between(text, "library table") == page.readme_libraries(document, path)


def test_every_kept_result_can_be_read_and_was_measured() -> None:
    command = ["git", "-C", str(results.RESULTS), "ls-files", "*.json"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    kept = [results.RESULTS / name for name in tracked if name != "schema.json"]
    assert kept
    for path in kept:
        document = results.load(path)
        assert "fixture" not in document, path
        assert document["commit"]["dirty"] is False, path


def test_readme_takes_no_fixture(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(results, "RESULTS", path.parent)
    monkeypatch.setattr(page, "README", path.parent / "README.md")
    with pytest.raises(SystemExit):
        main(["report", "--readme", str(path)])
    assert "complete runs" in capsys.readouterr().err
    assert not (path.parent / "README.md").exists()


def test_readme_is_written_nowhere_else(path: Path, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--readme", str(path), "--out", str(tmp_path)])
    assert "--out" in capsys.readouterr().err


def test_readme_takes_what_is_kept_only(path: Path, capsys: Capture) -> None:
    before = page.README.read_text()
    with pytest.raises(SystemExit):
        main(["report", "--readme", str(path)])
    assert "is not" in capsys.readouterr().err
    assert page.README.read_text() == before
