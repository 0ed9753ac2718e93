"""Show progress of long work on stderr, with rich where it is installed and plainly where not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 10.0  # a log file wants a line now and then, not one per step


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield a function that counts one step and names it; with `done=0`, what is waited for.

    stdout stays untouched, so that `--json` output can be piped.
    """
    try:
        import rich.console
        import rich.progress
    except ImportError:
        rich_bar = False
    else:
        rich_bar = sys.stderr.isatty()
    if rich_bar:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[step]}"),
        )
        console = rich.console.Console(stderr=True)  # honours NO_COLOR
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, step="")

            def advance(step: str = "", done: int = 1) -> None:
                bar.update(task, advance=done, step=step)

            yield advance
        return
    counter = _PlainCounter(title, total)
    yield counter.step


class _PlainCounter:
    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = self.printed = time.monotonic()

    def step(self, step: str = "", done: int = 1) -> None:
        self.done += done
        now = time.monotonic()
        if done and now - self.printed < PLAIN_INTERVAL_S and self.done < self.total:
            return
        self.printed = now
        seconds = now - self.started
        line = f"{self.title} {self.done}/{self.total} ({seconds:.0f} s) {step}".rstrip()
        print(line, file=sys.stderr, flush=True)
