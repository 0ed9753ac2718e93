"""Give every test one seed and two threads at most, and the kernels memory that is poisoned."""

import html
import json
import os
import shutil
import subprocess

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core, and each would start two threads
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

pytest_plugins = ["lipass.testing.fixtures"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory(request):
    """Fill `torch.empty` with NaN (integers: the largest value), so that unwritten output is seen.

    Only for tests/kernels: the mode adds fill nodes to traced graphs, and goldens must not show
    them.
    """
    if "tests/kernels" not in request.path.as_posix():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=20, help="random programs and scripts for each test of them"
    )


@pytest.fixture
def fuzz(request):
    """Return how many random programs a test should try."""
    return request.config.getoption("--fuzz")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA, and none is available")
    for item in items:
        if "needs_gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens a page in a headless browser and gives its DOM.

    Fails on any console message. Skips where there is no Chromium.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium, and none is on PATH")

    def run(page, *flags):
        said = subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--no-first-run",
                "--disable-extensions",
                "--virtual-time-budget=2000",
                *flags,
                "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
        assert [line for line in said.stderr.splitlines() if "CONSOLE" in line] == []
        return said.stdout

    return run


@pytest.fixture
def measured(opened, tmp_path):
    """Return a function that opens a page in frames of several widths and measures them.

    A window is never narrower than 500 pixels, a frame in it is. The second argument maps names
    to expressions of JavaScript in `doc`, the page's document; the result has a dict a width.
    """

    def run(page, expressions, widths=(1280, 400), height=800):
        asked = ", ".join(f"{json.dumps(name)}: {text}" for name, text in expressions.items())
        frames = "".join(
            f'<iframe src="{page.as_uri()}" style="width:{width}px;height:{height}px;border:0">'
            "</iframe>"
            for width in widths
        )
        around = tmp_path / "around.html"
        around.write_text(
            f"{frames}<script>addEventListener('load', () => {{"
            "const all = [...document.querySelectorAll('iframe')].map(({contentDocument: doc}) =>"
            f" ({{{asked}}}));"
            "document.body.textContent = '@' + JSON.stringify(all) + '@'; });</script>"
        )
        dom = opened(around, "--allow-file-access-from-files", "--window-size=1400,1800")
        return dict(zip(widths, json.loads(html.unescape(dom.split("@")[1])), strict=True))

    return run
