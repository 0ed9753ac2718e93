"""Remember what one stream of a session was told to show, and under which prompt it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lipass.policy.blend import Blend
from lipass.policy.blending import laid_out
from lipass.policy.steering import Steering


@dataclass
class Change:
    """The latest change of a stream's prompt."""

    steering: Steering
    old: int | Blend | None
    new: int
    first: int
    """Index of its first chunk."""
    since: int = 0
    """Latents of the history when it began."""
    blend: Blend | None = None
    """What the latest chunk was made of; None before its first."""

    def state(self) -> dict[str, Any]:
        """Give it as plain data, a curve as its weights; `restored` takes it back."""
        steering = asdict(replace(self.steering, curve=None))
        if self.steering.blends:
            steering["curve"] = list(self.steering.weights())
        old = self.old.to_dict() if isinstance(self.old, Blend) else self.old
        blend = None if self.blend is None else self.blend.to_dict()
        return {
            "steering": steering, "old": old, "new": self.new, "first": self.first,
            "since": self.since, "blend": blend,
        }  # fmt: skip

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Change:
        """Rebuild what a `state` was given of."""
        old, blend = state["old"], state["blend"]
        return cls(
            **state
            | {
                "steering": Steering(**state["steering"]),
                "old": Blend.from_dict(old) if isinstance(old, dict) else old,
                "blend": None if blend is None else Blend.from_dict(blend),
            }
        )


@dataclass
class Told:
    """What one stream was told.

    Attributes:
        texts: by number.
        count: how many there were.
        change: the latest.
        runs: first latent, and prompt under which it and those behind it were made.
        flushed: first and last latents, as for `range`, that are read no more.
        made: the latest mixed texts, by what they are made of.
    """

    texts: dict[int, Any] = field(default_factory=dict)
    count: int = 0
    change: Change | None = None
    runs: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    flushed: list[tuple[int, int]] = field(default_factory=list)
    made: dict[Any, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Give all but mixed texts as plain data and tensors; `restored` takes it back."""
        # A text that was said twice stays one: views made under it are known by the object.
        once = {id(text): text for text in self.texts.values()}
        places = {key: place for place, key in enumerate(once)}
        return {
            "texts": [packed(text) for text in once.values()],
            "said": [[number, places[id(text)]] for number, text in self.texts.items()],
            "count": self.count,
            "change": None if self.change is None else self.change.state(),
            "runs": self.runs,
            "flushed": self.flushed,
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Told:
        """Rebuild what a `state` was given of."""
        once = [unpacked(text) for text in state["texts"]]
        return cls(
            texts={number: once[place] for number, place in state["said"]},
            count=state["count"],
            change=None if state["change"] is None else Change.restored(state["change"]),
            runs=[(first, number) for first, number in state["runs"]],
            flushed=[(first, last) for first, last in state["flushed"]],
        )


def packed(text: Any) -> Any:
    """Write down of what kind each part of a text is, and where: graphs are compiled for that.

    Raises:
        TypeError: tensors in something else than lists, tuples and dicts.
    """
    if isinstance(text, Tensor):
        return ["tensor", [list(text.stride()), text, str(text.device)]]
    if text is None or type(text) in (bool, int, float, str):
        return text
    if type(text) in (list, tuple):
        return [type(text).__name__, [packed(one) for one in text]]
    if type(text) is dict:
        return ["dict", [[name, packed(one)] for name, one in text.items()]]
    raise TypeError(
        "a snapshot holds texts of tensors in lists, tuples and dicts, got "
        f"{type(text).__name__}; say such a text"
    )


def unpacked(told: Any) -> Any:
    """Rebuild a text from `packed`, each tensor where it was if there is such a device here."""
    if not isinstance(told, list):
        return told
    kind, parts = told
    if kind == "tensor":
        strides, tensor, *device = parts
        return laid_out(_placed(tensor, *device), strides)
    if kind == "dict":
        return {name: unpacked(one) for name, one in parts}
    made = [unpacked(one) for one in parts]
    return tuple(made) if kind == "tuple" else made


def _placed(tensor: Tensor, device: str = "cpu") -> Tensor:
    """Copy a tensor to where it was; where no such device is, it stays.

    Args:
        tensor: of a file, hence on the CPU, or of a session of this process.
        device: what was written down, which older files have not.
    """
    return tensor.to(device if is_there(torch.device(device)) else tensor.device, copy=True)


def is_there(device: torch.device) -> bool:
    """Whether this process has a device."""
    if device.type == "cpu":
        return True
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    return here is not None and here.type == device.type and (device.index or 0) < count
