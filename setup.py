"""Maps the top-level folder ``kernels/`` to the package ``vicreg_fast.kernels``.

Everything else about the distribution stands in ``pyproject.toml``.  The folder is never installed under
its own name: a well-known package on the index is imported as ``kernels``.
"""

from setuptools import setup

setup(
    packages=[
        "vicreg_fast",
        "vicreg_fast.backends",
        "vicreg_fast.backends.aten",
        "vicreg_fast.backends.triton",
        "vicreg_fast.kernels",
    ],
    package_dir={"vicreg_fast": "vicreg_fast", "vicreg_fast.kernels": "kernels"},
)
