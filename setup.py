"""Map the folders of the repository to import names; everything else is in pyproject.toml.

The folders are top level because they are the layers of the project and are read as such. The
import names are nested because a top-level module called `kernels` would shadow the package of
that name which diffusers and transformers look for. pyproject.toml can express the mapping of a
folder but not "and every package below it", so it lives here and new subfolders are picked up.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "lipass": "lipass",
    "lipass.passes": "passes",
    "lipass.kernels": "kernels",
    "lipass.examples": "examples",
}


def packages() -> list[str]:
    """Return every package below the mapped folders, under its import name."""
    found = []
    for name, folder in FOLDERS.items():
        found.append(name)
        found.extend(f"{name}.{below}" for below in find_packages(folder))
    return found


setup(packages=packages(), package_dir=FOLDERS)
