"""Time what a newcomer runs first, on empty caches and again: `lipass demo`, `lipass inspect`.

    python -m benchmarks.first_run > benchmarks/results/first_run.json

Each runs in a process of its own. Kernels, Inductor and Triton have caches in a folder that is
new; the second demo finds what the first has left there.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import environment

TARGET = "examples/targets.py:worldplay_size"


def _run(folder: str, *arguments: str) -> tuple[float, str]:
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "XDG_CACHE_HOME": f"{folder}/kernels",
    }
    begin = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).parent / "lipass", *arguments],
        env=os.environ | caches, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return round(time.perf_counter() - begin, 1), done.stderr


def _compiled(told: str) -> dict[str, int]:
    return {name: int(s) for name, s in re.findall(r"compiled (\w+) in (\d+) s", told)}


def measure() -> dict[str, object]:
    """Run all three."""
    with tempfile.TemporaryDirectory() as folder:
        first, told = _run(folder, "demo", "--out", f"{folder}/demo")
        again, told_again = _run(folder, "demo", "--out", f"{folder}/demo")
        inspect, _ = _run(folder, "inspect", TARGET, "--html", f"{folder}/page.html")
    return {
        "demo_first_s": first,
        "demo_first_compile_s": _compiled(told),
        "demo_again_s": again,
        "demo_again_compile_s": _compiled(told_again),
        "inspect_54_blocks_s": inspect,
    }


if __name__ == "__main__":
    print(json.dumps({"environment": environment(), **measure()}, indent=1))
