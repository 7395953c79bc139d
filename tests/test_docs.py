"""What the pages promise: README's size, links, file names, Python blocks, the table of errors, the layout."""

import ast
import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

import vicreg_fast
from vicreg_fast import VICRegLLoss, VICRegLoss

ROOT = Path(vicreg_fast.__file__).parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
pytestmark = pytest.mark.skipif("README.md" not in PAGES, reason="needs the checkout")

each_page = pytest.mark.parametrize("page", sorted(PAGES))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 12_000


# -- links and file names -------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    broken = []
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@each_page
def test_every_link_has_a_target(page: str) -> None:
    assert broken_links(page, PAGES[page]) == []


@pytest.mark.parametrize("link", ["gone.md", "docs/interface.md#gone", "#gone"])
def test_a_broken_link_is_noticed(link: str) -> None:
    assert broken_links("README.md", f"[text]({link})") == [link]


@each_page
def test_every_file_that_a_page_names_exists(page: str) -> None:
    folders = "vicreg_fast|kernels|benchmarks|tests|examples|docs"
    named = re.findall(rf"`((?:{folders})/[\w./*-]+\w)`", PAGES[page])
    assert sorted(name for name in set(named) if not list(ROOT.glob(name))) == []


# -- Python blocks --------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[str]:
    return re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# docs/benchmarks.md has parts of programs: test_benchmark_gate.py runs them.
BLOCKS = {
    f"{page}-{k}": block
    for page, text in PAGES.items()
    if page != "docs/benchmarks.md"
    for k, block in enumerate(blocks(text))
}


def test_the_pages_have_blocks() -> None:
    pages = {name.rpartition("-")[0] for name in BLOCKS}
    assert pages >= {"README.md", "docs/interface.md", "docs/how-it-works.md", "docs/differences.md"}


# Dynamo itself makes the instance that torch.autograd.Function warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_and_prints_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vicreg_loss", vicreg_fast)  # what README's import line replaces
    compiled = torch.compile
    # The graph is the same; a C++ compiler is not needed.
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled(*args, backend="aot_eager", **options)
    )
    torch.compiler.reset()  # a compilation of another test would be counted here
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(BLOCKS[name], name, "exec"), {})
    assert output.getvalue().split() == re.findall(r"^print\(.*\)  # ([\d.]+):", BLOCKS[name], re.MULTILINE)


# -- the table of errors --------------------------------------------------------------------------------------------

ERRORS = dict(
    re.findall(r"^\| `([^`]+)` \| `(\w+Error: [^`]+)` \|$", PAGES.get("docs/interface.md", ""), re.MULTILINE)
)


def test_the_table_of_errors_is_read() -> None:
    rows = PAGES["docs/interface.md"].partition("## Errors")[2].count("\n| `")
    assert len(ERRORS) == rows > 10


@pytest.mark.parametrize("call", ERRORS)
def test_a_call_raises_the_error_of_its_row(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in call:
        pytest.importorskip("triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = {"VICRegLoss": VICRegLoss, "VICRegLLoss": VICRegLLoss, "ones": torch.ones}
    with pytest.raises((TypeError, ValueError)) as error:
        eval(call, names)
    assert f"{type(error.value).__name__}: {error.value}" == ERRORS[call]


# -- the layout -----------------------------------------------------------------------------------------------------


def layout() -> list[str]:
    """The modules in CONTRIBUTING.md's first table, from top to bottom."""
    table = PAGES["CONTRIBUTING.md"].partition("## Layout")[2].partition("`kernels/` holds")[0]
    return re.findall(r"^\| `(vicreg_fast/[\w/.]+\.py)` \|", table, re.MULTILINE)


def imported(module: str) -> set[str]:
    """The files of the library that a module imports at its top."""
    tree = ast.parse((ROOT / module).read_text())
    found = set()
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = (ROOT / module).parents[node.level - 1].joinpath(*(node.module or "").split("."))
        if folder.with_suffix(".py").exists():
            found.add(folder.with_suffix(".py"))
            continue
        for name in node.names:
            file = folder / f"{name.name}.py"
            package = folder / name.name / "__init__.py"
            found.add(file if file.exists() else package if package.exists() else folder / "__init__.py")
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_layout_has_every_module() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vicreg_fast").rglob("*.py")}
    modules = {file for file in files if "/kernels/" not in file and not file.endswith("/__init__.py")}
    assert set(layout()) == modules | {"vicreg_fast/backends/__init__.py"}


def test_the_layout_has_every_kernel() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")} - {
        "kernels/__init__.py"
    }
    assert set(re.findall(r"`(kernels/\w+\.py)`", PAGES["CONTRIBUTING.md"])) == files


def test_no_module_imports_one_above_it() -> None:
    order = layout()
    above = {module: set(order[: order.index(module)]) for module in order}
    wrong = {module: imported(module) & above[module] for module in order if (ROOT / module).exists()}
    assert {module: names for module, names in wrong.items() if names} == {}


# -- docs/notation.md ---------------------------------------------------------------------------------------------


def pointers_of(source: str) -> set[str]:
    """Names of the pointers that the kernels of a file take: parameters, and members of the file's NamedTuples."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            names |= {argument.arg for argument in node.args.args}
        elif isinstance(node, ast.ClassDef):
            names |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}  # type: ignore[union-attr]
    return {name for name in names if name.endswith("_ptr")}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_every_pointer_of_a_kernel_is_in_the_key(path: Path) -> None:
    named = set(re.findall(r"\b\w+_ptr\b", (ROOT / "docs" / "notation.md").read_text()))
    assert pointers_of(path.read_text()) - named == set()
