"""Compile contenders in a process beside the demo, which then finds them in torch's caches.

Both take contenders from opposite ends of the list, so that whoever is free compiles the next one.
Once the caches hold all, another process would only trace for nothing; a file beside them says so.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from lipass.passes.identity import code_uuid

from .compare import Contender
from .model import CHUNK_LATENTS, tokenize
from .scenario import Scenario
from .train_batches import prompt_of
from .weights import load

_POLL_S = 0.2
_NICE = 5  # the demo's own work is what somebody waits for


def is_warm(presets: tuple[str, ...]) -> bool:
    """Whether torch's caches hold what these presets compile, as far as is known."""
    return all(_mark(preset).exists() for preset in presets)


def remember_warm(presets: tuple[str, ...]) -> None:
    """Say beside torch's caches that they hold what these presets compile."""
    for preset in presets:
        _mark(preset).parent.mkdir(parents=True, exist_ok=True)
        _mark(preset).touch()


def _mark(preset: str) -> Path:
    return Path(cache_dir()) / f"tinyworld-{preset}-{code_uuid([])[:16]}"


class Ahead:
    """The other process: what it has taken, and when it is done with it."""

    def __init__(self, presets: tuple[str, ...], inner: str, scenario: Scenario) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lipass-demo-")
        self.folder = Path(self._folder.name)
        end = len(scenario.given) + CHUNK_LATENTS
        first = dataclasses.replace(
            scenario, w2c=scenario.w2c[:end], walls=scenario.walls[:end], truth=scenario.truth[:0]
        )
        with (self.folder / "scenario").open("wb") as file:
            pickle.dump(first, file)
        own = [str(self.folder), inner, str(torch.get_num_threads()), *presets]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *own],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def take(self, preset: str) -> bool:
        """Take a contender, unless the other process has it."""
        return _take(self.folder, preset)

    def wait(self, preset: str) -> None:
        """Return when the other process has compiled what it has taken, or has ended."""
        while not (self.folder / f"{preset}.done").exists() and self._process.poll() is None:
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the other process, which has nothing to do any more."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def _take(folder: Path, preset: str) -> bool:
    try:
        (folder / f"{preset}.taken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@torch.no_grad()
def _main(folder: Path, inner: str, threads: int, presets: list[str]) -> None:
    os.nice(_NICE)
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 4 * len(presets)
    model, _ = load()
    with (folder / "scenario").open("rb") as file:
        scenario: Scenario = pickle.load(file)
    text = model.text(tokenize(prompt_of(scenario.attributes))[None])
    for preset in reversed(presets):
        if _take(folder, preset):
            Contender(preset, model, inner).roll_out(scenario, text)
            (folder / f"{preset}.done").touch()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
