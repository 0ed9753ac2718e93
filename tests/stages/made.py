"""Stages that do as they are told, importable from the processes of a line."""

import os
import time
from pathlib import Path

import torch

from lipass import Stage
from lipass.stages import Stale, is_stale


def obedient(*names, **options):
    """Name stages that do as they are told."""
    return [Stage(n, "made:Obedient", {"name": n, **options}, threads=1) for n in names]


class Obedient:
    """Does what an item asks of it by its name, and hands the item on with a trace of it."""

    def __init__(self, name, closes=""):
        self.name, self.closes, self.forgotten, self.history = name, closes, [], []
        self.interrupted = False

    def __call__(self, item):
        asked = item.get(self.name, {})
        time.sleep(asked.get("sleep", 0.0))
        until = time.monotonic() + asked.get("work_until_stale", 0.0)
        while time.monotonic() < until and not is_stale():
            time.sleep(0.005)
        if asked.get("leave") or ("work_until_stale" in asked and is_stale()):
            raise Stale
        if asked.get("interrupt") and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        if "raise" in asked:
            raise ValueError(asked["raise"])
        if "unplain" in asked:
            return {"x": object()}
        if self.name == "first":
            self.history.append(asked.get("remember"))
            item = {**item, "history": self.history}
        trace = [*item.get("trace", []), [self.name, os.getpid(), list(self.forgotten)]]
        return {**item, "trace": trace, "grad": torch.is_grad_enabled()}

    def forget(self, count):
        self.forgotten.append(count)
        del self.history[-count:]

    def close(self):
        if self.closes == "raise":
            raise OSError("the disk is full")
        if self.closes:
            Path(self.closes).write_text(str(os.getpid()))


class Scale:
    """Multiplies by something that grows, as a stage with a state does."""

    def __init__(self, by):
        self.by, self.count = by, 0

    def __call__(self, x):
        self.count += 1
        return torch.tanh(x @ x.mT * self.by) + self.count


class Slow:
    """Takes its time to be made and to be closed, or to compute."""

    def __init__(self, seconds=0.0, close_seconds=0.0, closed=""):
        time.sleep(seconds)
        self.close_seconds, self.closed = close_seconds, closed

    def __call__(self, item):
        time.sleep(item)
        return item

    def close(self):
        time.sleep(self.close_seconds)
        if self.closed:
            Path(self.closed).touch()


def unmade():
    raise FileNotFoundError("weights/none.safetensors")


def no_callable():
    return 3


def ends_at_once():
    os._exit(7)
