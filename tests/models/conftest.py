"""Let the tests of foreign models share their small configurations."""

import contextlib
import sys
from pathlib import Path

_HERE, _ROOT = Path(__file__).parent, Path(__file__).parents[2]


@contextlib.contextmanager
def _without_the_root():
    """Take the project off the path: transformers takes its folder `kernels` for a package."""
    kept = sys.path[:]
    sys.path[:] = [one for one in kept if Path(one or ".").resolve() != _ROOT]
    try:
        yield
    finally:
        sys.path[:] = kept


with _without_the_root(), contextlib.suppress(ImportError):
    from transformers.utils.import_utils import is_kernels_available

    is_kernels_available()  # it remembers the answer

sys.path.insert(0, str(_HERE))
