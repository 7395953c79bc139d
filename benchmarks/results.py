"""Result files: written whole, read only where they are whole; ``results/schema.json`` says what they hold."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import jsonschema

try:
    import fcntl
except ImportError:  # Windows: nothing is kept from others there
    fcntl = None  # type: ignore[assignment]

SCHEMA, VERSION = "vicreg_fast.benchmark", 3
RESULTS = Path(__file__).resolve().parent / "results"
Document = dict[str, Any]


class RefusedError(ValueError):
    """An argument or a file that cannot be used; the message names it, and what there is."""


@cache
def schema() -> dict[str, Any]:
    """JSON Schema of a result file."""
    loaded: dict[str, Any] = json.loads((RESULTS / "schema.json").read_text())
    return loaded


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of all that a document holds but this."""
    held = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(held, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hold(path: Path) -> IO[str] | None:
    """Keep other processes from going on with a file, until what is returned is closed; None where one keeps it already."""
    try:
        lock = path.with_suffix(".lock").open("w")
    except OSError:  # where nothing can be written; who then makes a file of its own says so
        return None
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def save(document: Document, path: Path) -> None:
    """Write the whole document: a reader, or an interruption, finds the old one or the new one."""
    document["sha256"] = digest(document)
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away meanwhile
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(new, path)


def load(path: Path) -> Document:
    """A result file; :class:`RefusedError` where it is none, of another version, cut short or edited."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise RefusedError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RefusedError(f"{path} is no JSON, or was cut short: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise RefusedError(f"{path} is no result file: its schema is {found!r}, not {SCHEMA!r}")
    if document.get("version") != VERSION:
        raise RefusedError(
            f"{path} has version {document.get('version')!r} of the schema; version {VERSION} is read"
        )
    if document.get("sha256") != digest(document):
        raise RefusedError(f"{path} was edited: its sha256 is not that of what it holds")
    try:
        jsonschema.validate(document, schema())
    except jsonschema.ValidationError as error:
        raise RefusedError(f"{path} breaks the schema at {error.json_path}: {error.message[:200]}") from error
    loaded: Document = document
    return loaded


def kept(folder: Path) -> dict[Path, Document]:
    """The result files of a folder that can be read, the latest last."""
    found = {}
    for path in folder.glob("*.json"):
        if path.name == "schema.json":
            continue
        try:
            found[path] = load(path)
        except RefusedError:
            continue
    return dict(sorted(found.items(), key=lambda item: str(item[1]["sessions"][-1]["date"])))


def reserve(folder: Path, device: str, date: str, commit: Mapping[str, Any], quick: bool) -> Path:
    """A new file for a result, ``<device>-<date>-<commit>``: never one that is there."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    state = (commit["commit"] or "unknown") + ("-dirty" if commit["dirty"] else "")
    name = f"{slug}-{date}-{state}" + ("-quick" if quick else "")
    number = 1
    while True:
        path = folder / (name + (f"-{number}" if number > 1 else "") + ".json")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.open("x").close()
            return path
        except FileExistsError as error:
            if not folder.is_dir():
                raise RefusedError(f"{folder} is no folder") from error
            number += 1
        except OSError as error:
            raise RefusedError(f"cannot write {path}: {error.strerror}") from error
