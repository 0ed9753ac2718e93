"""Copy what a session knows between two chunks, so that it goes on in another process or twice.

Each part of a session gives its state as plain data and tensors, and takes it back. What lives
in a chunk, such as kept outputs of steps, dies with it, so between chunks there is none; what
hangs on tensors of this process, such as projected prompts, is made again. So a session that is
resumed computes to the bit what the other one would have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from lipass._version import VERSION
from lipass.config import ONE_SIDED, Config
from lipass.errors import LipassError
from lipass.parallel.agree import Alone
from lipass.policy.plan import ChunkPlan
from lipass.receipt import ChunkRecord, current_report
from lipass.runtime.events import Events, Sink
from lipass.runtime.given import GivenChunks
from lipass.runtime.pace import Pace
from lipass.runtime.replay import Replay
from lipass.runtime.tree_file import Copies, Tree, checked, from_bytes, to_bytes
from lipass.runtime.turns import Turns

SCHEMA_VERSION = 1
_KIND = "lipass.session"
_PARTS = ("turns", "given", "effect", "events", "invariants", "histories", "written",
          "prompts")  # fmt: skip
_SAMPLED = 16


@dataclass(frozen=True)
class Snapshot:
    """What a session knew between two chunks: plain data and tensors.

    Attributes:
        options: of the session.
        convention: of its cameras.
        parts: state of each of its parts.
        records: what the receipt had of its chunks, oldest first.
        model: mark of a model's weights; None where none was given.
        carried: what the loop has kept beside, a copy each time it is asked for. Out of a file,
            tensors are on the CPU, and tuples are lists.
        made_with: versions of lipass and torch.
    """

    options: Mapping[str, Any]
    convention: str
    parts: Mapping[str, Tree] = field(repr=False)
    records: tuple[ChunkRecord, ...] = field(default=(), repr=False)
    model: Mapping[str, Any] | None = None
    carried: Mapping[str, Any] = field(default_factory=dict, repr=False)
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def plans(self) -> list[ChunkPlan]:
        """Decisions of the chunks in `records`; `Session.replay` takes the snapshot itself."""
        return [record.plan for record in self.records]

    def to_tree(self) -> dict[str, Tree]:
        """Give plain data and tensors, to be put into a file with other things."""
        records = [record.to_dict() for record in self.records]
        return vars(self) | {"records": records, "carried": dict(self.carried)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Tree]) -> Snapshot:
        """Rebuild one from `to_tree`."""
        records = tuple(map(ChunkRecord.from_dict, tree["records"]))
        carried = Copies(tree["carried"])
        return cls(**{**tree, "records": records, "carried": carried})

    def to_bytes(self) -> bytes:
        """Give it as the content of a safetensors file.

        Raises:
            LipassError: safetensors is not installed.
        """
        return to_bytes(checked(self.to_tree(), "a snapshot"), _KIND, SCHEMA_VERSION)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Read what `to_bytes` gave.

        Raises:
            ValueError: something else, or of another version, or not as it was written.
            LipassError: safetensors is not installed.
        """
        return cls.from_tree(from_bytes(data, _KIND, SCHEMA_VERSION))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; one of that name is replaced when the new one is whole."""
        beside = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
        beside.write_bytes(self.to_bytes())
        beside.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            ValueError: something else, or of another version, or not as it was written.
        """
        return cls.from_bytes(Path(path).read_bytes())

    def agreed(self, config: Config | None, options: Mapping[str, Any]) -> Config:
        """Return the config of the session.

        Args:
            config: what it has to agree with; None for `options`, and for anything if those are
                empty too.
            options: flat ones.

        Raises:
            TypeError: both.
            ValueError: they are others; says which.
        """
        own = Config.resolve(None, dict(self.options))
        if config is None and not options:
            return own
        if config is not None and options:
            raise TypeError(f"a session takes a config or options, got both ({sorted(options)})")
        asked = Config.resolve(None, options) if config is None else config
        if asked.fingerprint() != own.fingerprint():
            ours, theirs = own.to_options(), asked.to_options()
            differ = [
                f"{name} {theirs.get(name, 'off')!r} for {ours.get(name, 'off')!r}"
                for name in sorted({*ours, *theirs})
                if name not in ONE_SIDED and ours.get(name, "off") != theirs.get(name, "off")
            ]
            raise ValueError(
                f"a session must be resumed with the options it had, got {'; '.join(differ)}; "
                "leave them out, or begin a new session"
            )
        return asked


class Resumable:
    """What a `Session` can do with its snapshots."""

    config: Config
    given: GivenChunks
    turns: Turns
    number: int
    pace: Pace | None
    events: Events
    ranks: Alone
    recorded: Replay | None

    def snapshot(
        self,
        *,
        model: Module | None = None,
        carry: Mapping[str, Any] | None = None,
        records: bool = True,
    ) -> Snapshot:
        """Copy all that the session knows, between two chunks; it goes on as if nothing was.

        Args:
            model: whose weights are marked, so that another model is refused later.
            carry: what the loop keeps by itself, such as its history and seed: tensors and plain
                data, given back as `Snapshot.carried`.
            records: whether what the receipt still has of its chunks comes along.

        Raises:
            LipassError: the session is closed, or a chunk of it is open.
            TypeError: something to carry that is neither tensor nor plain data.
            ValueError: a number to carry that is not finite.
        """
        if self.turns.closed:
            raise LipassError("a snapshot is of an open session, got a closed one; take it before")
        for stream, chunk in self.turns.open.items():
            raise LipassError(
                f"a snapshot is taken between two chunks, got an open one, {chunk.index} of "
                f"{stream!r}; take it when its block is left"
            )
        parts = {name: getattr(self, name).state() for name in _PARTS}
        parts["recorded"] = None if self.recorded is None else self.recorded.state()
        parts["pace"] = None if self.pace is None else self.pace.state()
        own = current_report().chunks if records else ()
        return Snapshot(
            self.config.to_options(),
            str(self.given.convention),
            checked(parts, "state"),
            tuple(record for record in own if record.session == self.number),
            None if model is None else mark_of(model),
            Copies(checked(carry or {}, "carry")),
            {"lipass": VERSION, "torch": str(torch.__version__)},
        )

    @classmethod
    def resume(
        cls,
        snapshot: Snapshot,
        config: Config | None = None,
        /,
        *,
        model: Module | None = None,
        events: Sink | None = None,
        group: Any = None,
        **options: Any,
    ) -> Self:
        """Open a session that goes on where another one was, in whatever process.

        Args:
            snapshot: of it; `Snapshot.load` reads one from a file.
            config: what it has to agree with, or options; None takes those of the snapshot.
            model: what the snapshot's mark has to be of.
            events: as in `Session`.
            group: as in `Session`; each rank resumes its own snapshot.
            options: flat ones, as in `Config.resolve`; a frontier and targets are the snapshot's.

        Raises:
            TypeError: no snapshot, or both a config and options.
            ValueError: other options, or another model.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"a session is resumed from a lipass.Snapshot, got {type(snapshot).__name__}; "
                "write Session.resume(lipass.Snapshot.load(path))"
            )
        agreed = snapshot.agreed(config, options)
        if model is not None:
            _check_model(snapshot, model)
        make: Any = cls
        session = make(agreed, convention=snapshot.convention, events=events, group=group)
        for name in _PARTS:
            getattr(session, name).restore(snapshot.parts[name])
        if snapshot.parts["recorded"] is not None:
            session.recorded = Replay.of(snapshot.parts["recorded"])
        if (pace := snapshot.parts.get("pace")) is not None:
            session.pace = Pace.restored(pace)
        for record in snapshot.records:
            current_report().add_chunk(replace(record, session=session.number))
        return session

    def fork(self) -> Self:
        """Open a session that knows what this one does, and goes its own way from here on.

        Its events go where those of this one do; ranks that share a session all fork it.

        Raises:
            LipassError: the session is closed, or a chunk of it is open.
        """
        return type(self).resume(
            self.snapshot(records=False), events=self.events.sink, group=self.ranks.group
        )


def mark_of(model: Module) -> dict[str, Any]:
    """Mark a model by its class, the names, shapes and dtypes of its weights, and some values.

    Reads a few numbers of each tensor back, in one copy a device. Compiled or not, and on which
    devices tensors lie, makes no difference.
    """
    own = getattr(model, "_orig_mod", model)
    found = hashlib.sha256()
    samples: dict[torch.device, dict[int, Tensor]] = {}
    count = 0
    for name, tensor in (*own.named_parameters(), *own.named_buffers()):
        name = name.replace("_orig_mod.", "")
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        count += 1
        if tensor.numel() and tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
            samples.setdefault(tensor.device, {})[count] = some.double()
    values: dict[int, Tensor] = {}
    for there in samples.values():
        here = torch.cat(tuple(there.values())).cpu()
        values |= zip(there, here.split([len(some) for some in there.values()]), strict=True)
    for number in sorted(values):
        found.update(values[number].numpy().tobytes())
    return {"class": type(own).__qualname__, "tensors": count, "sha256": found.hexdigest()}


def _check_model(snapshot: Snapshot, model: Module) -> None:
    if snapshot.model is None:
        raise ValueError(
            "a snapshot must have the mark of a model to be compared with one, got none; take it "
            "with session.snapshot(model=model), or resume without model"
        )
    given, own = mark_of(model), snapshot.model
    if given != own:
        kind, theirs = (f"{one['class']} with {one['tensors']} tensors" for one in (given, own))
        what = f"{kind} for {theirs}" if kind != theirs else f"{kind} and other shapes or weights"
        raise ValueError(
            f"a session must be resumed with the model it was taken with, got {what}; load the "
            "weights that it had, or begin a new session"
        )
