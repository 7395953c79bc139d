"""A view of the checkout in which the package has its kernels, for a machine on which nothing is installed.

``kernels/`` is ``vicreg_fast.kernels`` by the packaging alone.  The view is a folder of links outside of the checkout, which
stays as it is.  Python that starts there imports the checkout's own files.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def importable(root: Path = ROOT) -> Iterator[Path]:
    """The view's folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vicreg_fast-") as folder:
        view = Path(folder)
        package = view / "vicreg_fast"
        package.mkdir()
        for entry in root.iterdir():
            # A cache would be written through the link; git finds its folder from the files' real places.
            if entry.name != "vicreg_fast" and not entry.name.startswith("."):
                (view / entry.name).symlink_to(entry)
        for entry in (root / "vicreg_fast").iterdir():
            if entry.name not in ("kernels", "__pycache__"):
                (package / entry.name).symlink_to(entry)
        (package / "kernels").symlink_to(root / "kernels")
        yield view
