"""What all parts share: their arguments, the document they write, and a clock for the device."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lipass.kernels import registry


class Part:
    """One part: where it runs, how long it may, and the document that it writes row by row."""

    def __init__(self, argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("name", nargs="?", default="")
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--seconds", type=float, default=60.0)
        parser.add_argument("--until", type=float, help="of time.monotonic, in place of --seconds")
        parser.add_argument("--without", action="append", default=[], metavar="PROVIDER")
        parser.add_argument("--dry", action="store_true")
        parser.add_argument("--warm", action="store_true")
        args = parser.parse_args(argv)
        self.name, self.dry, self._path = args.name, args.dry, args.out
        # Only compile what another process times.
        self.warm: bool = args.warm
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self._end = args.until or time.monotonic() + args.seconds
        for provider in args.without:
            registry.leave_out(provider, "it hung or crashed in a part before this one")
        self._document: dict[str, object] = {"dry": self.dry, "rows": []}

    @property
    def folder(self) -> Path:
        """Where its document is, and what else it makes."""
        return self._path.parent

    @property
    def left_s(self) -> float:
        """Seconds until it is stopped."""
        return self._end - time.monotonic()

    def note(self, **facts: object) -> None:
        """Write down what holds for all rows."""
        self._document.update(facts)
        self._write()

    def row(self, **row: object) -> None:
        """Write down one row."""
        rows = self._document["rows"]
        assert isinstance(rows, list)
        rows.append(row)
        self._write()
        print(json.dumps(row), flush=True)

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._document, indent=1) + "\n")
        part.replace(self._path)

    def wait(self) -> None:
        """Wait until the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times_ms(
        self, calls: dict[str, Callable[[], object]], rounds: int = 5, burst_ms: float = 12.0
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Time calls in turns, so that all see the same machine.

        Returns:
            Median of each call, and why others could not be called. Where it only compiles, the
            time of the first call.
        """
        found: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            try:
                begin = time.perf_counter()
                for _ in range(1 if self.dry or self.warm else 3):
                    call()
                self.wait()
                found[name] = [(time.perf_counter() - begin) * 1e3] * self.warm
            except Exception as error:  # whatever a rival raises, the others are timed
                failed[name] = f"{type(error).__name__}: {error}"[:200]
        if self.warm:
            return {name: taken[0] for name, taken in found.items()}, failed
        rounds = 1 if self.dry else rounds
        for turn in range(rounds + 1):
            for name, taken in found.items():
                if name in failed:
                    continue
                count = 1 if turn == 0 else max(1, min(50, int(burst_ms / max(taken[0], 1e-3))))
                try:
                    taken.append(self._burst_ms(calls[name], 1 if self.dry else count))
                except Exception as error:  # where one has broken the context, all behind it
                    failed[name] = f"{type(error).__name__}: {error}"[:200]
        whole = {name: taken for name, taken in found.items() if name not in failed}
        return {name: statistics.median(taken[1:]) for name, taken in whole.items()}, failed

    def _burst_ms(self, call: Callable[[], object], count: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) * 1e3 / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def host_us(self, call: Callable[[], object], count: int = 20) -> float:
        """Time what a call costs the host, which need not wait for the device."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count * 1e6
