"""Drive a headless Chromium through its DevTools protocol: open, press, evaluate, look."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from websockets.sync.client import connect


@contextlib.contextmanager
def browser(profile, *options):
    """Start a browser and give its first page; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium, and none is on PATH")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--no-first-run", "--disable-extensions", "--remote-debugging-port=0",
        "--remote-allow-origins=*", *options, "about:blank",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            with connect(_first_page(profile), max_size=None) as opened:
                yield Page(opened)
        finally:
            process.terminate()


def _first_page(profile, seconds=60.0):
    """Return the address of the page that the browser opens by itself."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                pages = json.load(answer)
            return next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        time.sleep(0.05)
    raise TimeoutError("the browser did not start")


class Page:
    """One page; `said` collects what it writes to its console and what it throws."""

    def __init__(self, opened):
        self._socket, self._numbers, self.said = opened, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send one command and return its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(timeout=60))
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            if told.get("method") in (
                "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
            ):  # fmt: skip
                self.said.append(json.dumps(told["params"])[:500])

    def open(self, address, width=1280, height=900, mobile=False):
        """Open an address in a window of a size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Page.navigate", url=address)

    def ask(self, expression):
        """Evaluate JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=20.0):
        """Wait for an expression to become true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.ask(expression):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression} did not become true; the page said {self.said}")

    def key(self, code, down):
        """Press or release a key by its place on the keyboard."""
        kind = "rawKeyDown" if down else "keyUp"
        self.call("Input.dispatchKeyEvent", type=kind, code=code, key=code)

    def look(self, path):
        """Write a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
