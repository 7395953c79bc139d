"""Result files: JSON that ``results/schema.json`` describes, written whole after every shape."""

import itertools
import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SCHEMA, VERSION = "vicreg_fast.benchmark", 3
RESULTS = Path(__file__).resolve().parent / "results"
JSON_SCHEMA = json.loads((RESULTS / "schema.json").read_text())
Document = dict[str, Any]


class UsageError(ValueError):
    """An argument or a file that cannot be used.  The message names it and lists what is available."""


def save(document: Document, path: Path) -> None:
    """Replace the file in one step, so that an interruption leaves the old document or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    new.replace(path)


def read(path: Path, schema: str, version: int, renamed: tuple[str, str] = ("", "")) -> Document:
    """Read JSON of a schema and version, with one text renamed.  Raises :class:`UsageError` for any other file."""
    try:
        document: Document = json.loads(path.read_text().replace(*renamed) if renamed[0] else path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not complete JSON: {error}") from error
    kind = [document.get(key) for key in ("schema", "version")] if isinstance(document, dict) else []
    if kind != [schema, version]:
        raise UsageError(f"{path} has schema and version {kind}; only {[schema, version]} can be read")
    return document


def load(path: Path) -> Document:
    """Read a result file.  Raises :class:`UsageError` for a malformed file or another version of the schema."""
    # Version 0.1.0 called vicreg_fast with another library's definition "ours as <library>".
    document = read(path, SCHEMA, VERSION, ("ours as ", "vicreg_fast-as-"))
    try:
        import jsonschema
    except ImportError:  # a machine that only measures need not have it
        warnings.warn(f"jsonschema is not installed: {path} is read without a check of its keys", stacklevel=2)
        return document
    try:
        jsonschema.validate(document, JSON_SCHEMA)
    except jsonschema.ValidationError as error:
        raise UsageError(f"{path} breaks the schema at {error.json_path}: {error.message[:200]}") from error
    return document


def kept(folder: Path) -> dict[Path, Document]:
    """The readable result files of a folder, the latest last."""
    documents = {}
    for path in folder.glob("*.json"):
        with suppress(UsageError):
            documents[path] = load(path)
    return dict(sorted(documents.items(), key=lambda item: str(item[1]["sessions"][-1]["date"])))


def find_resumable(folder: Path, document: Document, driver: str | None) -> tuple[Path, Document] | None:
    """The latest incomplete result of the same code, versions, device, driver and arguments."""
    for path, other in reversed(kept(folder).items()):
        same = all(other[key] == document[key] for key in ("machine", "commit", "asked", "libraries"))
        drivers = {session["clocks"]["before"]["driver"] for session in other["sessions"]}
        if same and drivers == {driver} and not other["complete"]:
            return path, other
    return None


def new_path(folder: Path, name: str, commit: Mapping[str, Any], quick: bool) -> Path:
    """``<name>-<commit>.json``, with a number where that file exists."""
    words = [name, commit["commit"] or "unknown"] + ["dirty"] * bool(commit["dirty"]) + ["quick"] * quick
    stem = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    names = (f"{stem}{number}.json" for number in itertools.chain([""], itertools.count(-2, -1)))
    return next(folder / name for name in names if not (folder / name).exists())
