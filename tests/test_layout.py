"""The layout of the source: unique module names, and files and functions of limited length."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vicreg_fast", "kernels", "tests", "benchmarks", "examples", "docs")
FILE_LINES, FUNCTION_LINES = 400, 80
# In the docstring of a longer function, or in a comment right above it, followed by the reason.
EXCUSE = f"over {FUNCTION_LINES} lines"


def python_files(*folders: str) -> list[Path]:
    """Files below the folders, each once: ``vicreg_fast/kernels`` may be a link to ``kernels``."""
    return sorted({path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")})


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = [*python_files(*FOLDERS), ROOT / "setup.py"]
every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def long_functions(source: str) -> list[str]:
    """Names of functions of more than FUNCTION_LINES lines without an excuse."""
    lines = source.splitlines()
    names = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        above = []
        for line in reversed(lines[: first - 1]):
            if not line.lstrip().startswith("#"):
                break
            above.append(line)
        # Line breaks and comment signs may stand between the words.
        texts = (ast.get_docstring(node) or "", " ".join(line.strip(" #") for line in reversed(above)))
        excused = any(EXCUSE in " ".join(text.lower().split()) for text in texts)
        if length > FUNCTION_LINES and not excused:
            names.append(f"{node.name}: {length} lines")
    return names


def test_module_names_are_unique() -> None:
    counts = Counter(path.name for path in python_files("vicreg_fast", "kernels"))
    assert [name for name, n in counts.items() if n > 1 and name not in ("__init__.py", "__main__.py")] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if not name_of(path).startswith("benchmarks/")], ids=name_of
)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES


@every_file
def test_functions_are_short(path: Path) -> None:
    assert long_functions(path.read_text()) == []


BODY = "\n    pass" * FUNCTION_LINES
SOURCES = {
    "long": (f"def f():{BODY}", ["f: 81 lines"]),
    "short": ("def f():" + "\n    pass" * (FUNCTION_LINES - 1), []),
    "docstring": (f'def f():\n    """Over 80\n    lines: a table."""{BODY}', []),
    "comment": (f"# Over 80 lines: a table.\n@d\ndef f():{BODY}", []),
    "other-comment": (f"# A table.\ndef f():{BODY}", ["f: 81 lines"]),
    "method": (f"class A:\n    def f(self):{BODY.replace('    ', '        ')}", ["f: 81 lines"]),
}


@pytest.mark.parametrize(("source", "expected"), SOURCES.values(), ids=SOURCES.keys())
def test_long_functions_are_recognised(source: str, expected: list[str]) -> None:
    assert long_functions(source) == expected
