"""The kernels import alone, in a fresh interpreter, and only under their full name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )


def test_package_loads_nothing_above_it_and_no_triton():
    code = (
        "import sys, lipass.kernels\n"
        "heavy = ('lipass.passes', 'lipass.backend', 'lipass.session', 'triton', 'torch')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_operator_loads_without_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, lipass.kernels.ops\n"
        "q = torch.randn(1, 1, 64, 16)\n"
        "from lipass.kernels import registry\n"
        "with registry.force('sparse'):\n"
        "    torch.ops.lipass.sparse_attention(q, [q], [q], [4, 4, 4], [4, 4, 4], 'current',\n"
        "        [2, 2, 2], 0.5, 0.25, 0, 'prefill', None, 'site')\n"
        "heavy = ('lipass.passes', 'lipass.backend', 'lipass.session')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_bare_name_is_refused():
    # the import itself is none: other packages look for one of this name
    done = run("import kernels; kernels.plan_attention", cwd=ROOT)
    assert done.returncode != 0
    assert "lipass.kernels" in done.stderr


def test_public_names_resolve():
    import lipass.kernels as kernels

    for name in kernels.__all__:
        assert getattr(kernels, name).__name__ == name
