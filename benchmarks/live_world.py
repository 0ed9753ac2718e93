"""Walk at random in a served world, and print what a visitor gets and what grows.

    python -m benchmarks.live_world [--seconds 60] [--visitors 1] [--inner inductor]
    python -m benchmarks.live_world --curve [--seconds 60]   1, 2, 4, 8 and 16 visitors at once
    python -m benchmarks.live_world --soak-minutes 30        by minute: chunk time and memory

The server of `lipass play` runs in this process; each visitor is a socket that holds a key for a
while, looks about, says a word now and then. Figures are those of visitors who move all the time;
latency is from an input to the first frame that follows it, at the other end of the socket. The
curve leaves the dense side out: chunk times are what the server takes, waits what a visitor sees
from one chunk to the next.
"""

import argparse
import itertools
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import uvicorn
from websockets.sync.client import connect

from benchmarks.environment import environment
from benchmarks.long_rollout import resident_mb
from lipass.examples.tinyworld.live import LiveWorld
from lipass.play.host import Host
from lipass.play.protocol import LONGEST_MESSAGE, unpack
from lipass.play.server import application

_KEYS = ({"ahead": 1}, {"ahead": 1, "turn": 1}, {"ahead": 1, "turn": -1}, {"turn": 1},
         {"turn": -1}, {"ahead": -1}, {"aside": 1}, {"ahead": 1, "aside": -1})  # fmt: skip
CURVE = (1, 2, 4, 8, 16)
_HELD_S = 0.6
_WARM_S = 5.0

Notes = dict[str, list[tuple[float, float]]]


class _Counted:
    """A part of a world that notes when it was done and the CPU time of its thread, in seconds."""

    def __init__(self, part: Any, notes: Notes, name: str = "") -> None:
        self._part, self._notes, self._name = part, notes, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def visit(self, room: int) -> "_Counted":
        return _Counted(self._part.visit(room), self._notes)

    def side(self, name: str) -> "_Counted":
        return _Counted(self._part.side(name), self._notes, name)

    def go(self, controls: Any) -> Any:
        return self._timed("way", self._part.go, controls)

    def make(self, *given: Any) -> Any:
        return self._timed(self._name, self._part.make, *given)

    def _timed(self, name: str, function: Callable, *given: Any) -> Any:
        begin = time.thread_time()
        made = function(*given)
        took = time.thread_time() - begin
        self._notes.setdefault(name, []).append((time.monotonic(), took))
        return made


class Walker:
    """A visitor who is never still."""

    def __init__(self, port: int, seed: int, end: float, compare: bool = True) -> None:
        self.port, self.end, self.compare = port, end, compare
        self.random = random.Random(seed)
        self.asked: dict[int, float] = {}
        self.latencies: list[float] = []
        self.chunks: dict[str, list[tuple[float, dict]]] = {"fast": [], "dense": []}

    def run(self) -> None:
        """Walk until the end."""
        origin = f"http://127.0.0.1:{self.port}"
        with connect(f"ws://127.0.0.1:{self.port}/socket", origin=origin, max_size=None) as opened:
            opened.send(json.dumps({"do": "enter", "room": 9000 + self.random.randrange(100)}))
            if not self.compare:
                opened.send(json.dumps({"do": "compare", "on": False}))
            number, turn_at = itertools.count(1), 0.0
            while (now := time.monotonic()) < self.end:
                if now >= turn_at:
                    turn_at = now + _HELD_S * (0.5 + self.random.random())
                    self._ask(opened, next(number))
                try:
                    data = opened.recv(timeout=max(0.01, turn_at - now))
                except TimeoutError:
                    continue
                if isinstance(data, bytes):
                    self._hear(unpack(data)[0])

    def _ask(self, opened, number: int) -> None:
        if self.random.random() < 0.03:
            word = self.random.choice(["day", "dusk", "night", "clear", "haze", "fog"])
            told = {"do": "say", "number": number, "words": [word]}
        else:
            told = {"do": "move", "number": number, **self.random.choice(_KEYS)}
            if self.random.random() < 0.3:
                told["yaw"] = self.random.randrange(-20, 21)
        self.asked[number] = time.monotonic()
        opened.send(json.dumps(told))

    def _hear(self, told: dict) -> None:
        now = time.monotonic()
        if told["do"] != "chunk":
            return
        del told["memory"]
        self.chunks[told["side"]].append((now, told))
        if told["side"] == "fast":
            for number in [one for one in self.asked if one <= told["number"]]:
                self.latencies.append(now - self.asked.pop(number))


class Served:
    """A world that is served by this process, compiled."""

    def __init__(self, inner: str, visitors: int) -> None:
        self.cpu: Notes = {}
        self.ready: dict[str, float] = {}
        begin = time.monotonic()
        self.host = Host(_Counted(LiveWorld(inner), self.cpu), visitors)
        app = application(self.host)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", ws="websockets-sansio", ws_max_size=LONGEST_MESSAGE,
                ws_per_message_deflate=False, timeout_graceful_shutdown=3,
            )
        )  # fmt: skip
        listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, args=([listening],))
        self._thread.start()
        self.port = listening.getsockname()[1]
        while len(self.host.status.ready) < 2 and self.host.failure is None:
            time.sleep(0.05)
            for side in self.host.status.ready:
                self.ready.setdefault(side, time.monotonic() - begin)
        if self.host.failure is not None:
            raise self.host.failure

    def close(self) -> None:
        """Send everybody away."""
        self._server.should_exit = True
        self._thread.join()


def _side(walkers: list[Walker], side: str, since: float) -> dict[str, float | int]:
    chunks = [[(at, c) for at, c in w.chunks[side] if at > since] for w in walkers]
    every = sorted((at, c["seconds"]) for one in chunks for at, c in one)
    if not every:
        return {}
    seconds = [s for _, s in every]
    frames = 4
    span = every[-1][0] - every[0][0]
    quarter = max(1, len(seconds) // 4)
    return {
        "chunks": len(seconds),
        "own_fps": round(frames / statistics.median(seconds), 2),
        "shown_fps_a_visitor": round(
            frames * (len(seconds) - 1) / max(span, 1e-9) / len(walkers), 2
        ),
        "chunk_ms_p50": round(1000 * float(np.percentile(seconds, 50)), 1),
        "chunk_ms_p99": round(1000 * float(np.percentile(seconds, 99)), 1),
        "chunk_ms_first_quarter": round(1000 * statistics.median(seconds[:quarter]), 1),
        "chunk_ms_last_quarter": round(1000 * statistics.median(seconds[-quarter:]), 1),
    }


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Walk(NamedTuple):
    """What walkers have seen: since when it counts, and memory and medians by minute."""

    walkers: list[Walker]
    since: float
    graphs: int
    memory: list[float]


def walk(served: Served, seconds: float, visitors: int, *, compare: bool = True) -> Walk:
    """Let visitors walk at once, and note what grows."""
    start = time.monotonic()
    walkers = [Walker(served.port, seed, start + seconds, compare) for seed in range(visitors)]
    threads = [threading.Thread(target=walker.run) for walker in walkers]
    for one in threads:
        one.start()
    time.sleep(min(_WARM_S, seconds / 2))
    graphs, memory = _graphs(), [resident_mb()]
    served.cpu.clear()
    while time.monotonic() < start + seconds:
        time.sleep(max(0.0, min(5.0, start + seconds - time.monotonic())))
        memory.append(resident_mb())
    for one in threads:
        one.join()
    since = start + min(_WARM_S, seconds / 2)
    return Walk(walkers, since, _graphs() - graphs, memory)


def measure(seconds: float, visitors: int, inner: str) -> dict[str, object]:
    """Serve, walk, and count."""
    served = Served(inner, visitors)
    walkers, since, graphs, memory = walk(served, seconds, visitors)
    fast, dense = (_side(walkers, side, since) for side in ("fast", "dense"))
    latencies = [1000 * one for w in walkers for one in w.latencies[3:]]
    missed = [w.chunks["dense"][-1][1]["missed"] for w in walkers if w.chunks["dense"]]
    served.close()
    return {
        "seconds": seconds,
        "visitors": visitors,
        "beside": served.host.beside,
        "threads_a_side": served.host.threads,
        "ready_after_s": {side: round(at, 1) for side, at in served.ready.items()},
        "fast": fast,
        "dense": dense,
        "ratio_of_chunk_times": round(fast["own_fps"] / dense["own_fps"], 2) if dense else None,
        # What a chunk costs whatever else runs; true where a side has one thread.
        "cpu_ms_p50": {
            name: round(1000 * statistics.median(took for _, took in notes), 1)
            for name, notes in served.cpu.items()
        },
        "latency_ms_p50": round(float(np.percentile(latencies, 50))) if latencies else None,
        "latency_ms_p95": round(float(np.percentile(latencies, 95))) if latencies else None,
        "dense_chunks_missed": sum(missed),
        "graphs_after_warm_up": graphs,
        "resident_mb": [round(memory[0]), round(memory[len(memory) // 2]), round(memory[-1])],
        "by_minute": by_minute(walkers, since, memory, served.cpu) if seconds >= 120 else None,
        **environment(),
    }


def by_minute(
    walkers: list[Walker], since: float, memory: list[float], cpu: Notes
) -> list[dict[str, Any]]:
    """Give chunk time and memory of each minute, for what is to stay as it is."""
    chunks = sorted((at, c["seconds"]) for w in walkers for at, c in w.chunks["fast"])
    found = []
    for minute in range(int((chunks[-1][0] - since) / 60)):
        seconds, busy = (
            [s for at, s in own if minute <= (at - since) / 60 < minute + 1]
            for own in (chunks, cpu["fast"])
        )
        found.append(
            {
                "chunks": len(seconds),
                "chunk_ms_p50": round(1000 * statistics.median(seconds), 1) if seconds else None,
                "cpu_ms_p50": round(1000 * statistics.median(busy), 1) if busy else None,
                "resident_mb": round(memory[min(12 * minute, len(memory) - 1)]),
            }
        )
    return found


def curve(seconds: float, inner: str, counts: Sequence[int] = CURVE) -> dict[str, object]:
    """Serve one world to more and more visitors."""
    served = Served(inner, max(counts))
    points = []
    for visitors in counts:
        walkers, since, graphs, memory = walk(served, seconds, visitors, compare=False)
        made = [[(at, c["seconds"]) for at, c in w.chunks["fast"] if at > since] for w in walkers]
        taken = [1000 * s for one in made for _, s in one]
        waits = [1000 * w for one in made for w in np.diff([at for at, _ in one])]
        chunks = [len(one) for one in made]
        points.append(
            {
                "visitors": visitors,
                "chunks": sum(chunks),
                "fewest_and_most_a_visitor": [min(chunks), max(chunks)],
                "chunk_ms": _percentiles(taken),
                "wait_ms": _percentiles(waits),
                "graphs_after_warm_up": graphs,
                "resident_mb": round(memory[-1]),
            }
        )
    served.close()
    return {
        "seconds": seconds,
        "threads_a_side": served.host.threads,
        "curve": points,
        **environment(),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    """Give p50, p99 and their ratio."""
    if not values:
        return {}
    p50, p99 = (float(np.percentile(values, at)) for at in (50, 99))
    return {"p50": round(p50, 1), "p99": round(p99, 1), "ratio": round(p99 / p50, 2)}


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--visitors", type=int, default=1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--curve", action="store_true", help="of visitors against chunk times")
    parser.add_argument("--soak-minutes", type=float, help="in place of --seconds")
    args = parser.parse_args()
    if args.curve:
        found = curve(args.seconds, args.inner)
    else:
        seconds = args.seconds if args.soak_minutes is None else 60 * args.soak_minutes
        found = measure(seconds, args.visitors, args.inner)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
