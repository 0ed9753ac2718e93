"""Define what a pass is: a frozen value with a name, a class of numerics and one method."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lipass.passes import GROUP, PASSES, registered
from lipass.passes.graph.compat import fake_mode_of
from lipass.passes.graph.frame import Frame, frame_being_compiled
from lipass.passes.identity import uuid_of, uuid_of_pipeline
from lipass.passes.nearest import did_you_mean


class Numerics(enum.Enum):
    """Say how far the output of a rewritten graph may be from the output of the original."""

    EXACT = "exact"
    """The same operations on the same values."""
    REORDERED = "reordered"
    """Equal in real arithmetic; rounding differs."""
    APPROX = "approx"
    """Another function, chosen to be close."""


class PassError(RuntimeError):
    """Report a pass that failed or that left an invalid graph; the cause is chained."""


@dataclass(frozen=True)
class Note:
    """Record what one pass did at one place and why."""

    pass_name: str
    site: str
    """Attention site, step region or input that the note is about."""
    action: str
    """`rewritten`, `kept` or `found`."""
    reason: str


Gate = Callable[[tuple[int, ...], torch.dtype, torch.device, tuple[int, ...]], str | None]
"""Say why keys in pieces should be joined on this machine, or return None: for the shape of q
`(B, H, Lq, D)`, dtype, device, and the tokens of each piece."""


@dataclass
class PassContext:
    """Carry what passes share while one graph is compiled."""

    fake_mode: FakeTensorMode
    notes: list[Note] = field(default_factory=list)
    current: str = ""
    """Name of the pass that runs."""
    done: list[str] = field(default_factory=list)
    """Names of the passes that ran, in order."""
    constant_floats: set[str] = field(default_factory=set)
    """Symbols of Python floats that the graph must have as constants; it is then traced again."""
    failing: torch.fx.Node | None = None
    """Node that the running pass works on, named if it fails."""
    frame: Frame = field(default_factory=Frame)
    """What is known of the function that the graph is of."""
    gate: Gate | None = None
    """What is known of the speed of this machine; None is nothing. Passes measure nothing."""

    @classmethod
    def of(cls, graph: torch.fx.Graph, gate: Gate | None = None) -> PassContext:
        """Start on a graph of Dynamo, in the fake mode of its metadata.

        The inputs that a backend is called with are in another mode, and modes do not mix.
        """
        return cls(fake_mode_of(graph), frame=frame_being_compiled(graph), gate=gate)

    def note(self, site: str, action: str, reason: str) -> None:
        """Add a note of the running pass."""
        self.notes.append(Note(self.current, site, action, reason))

    def visit(self, nodes: list[torch.fx.Node]) -> Iterator[torch.fx.Node]:
        """Iterate over nodes so that a failure can be located."""
        for node in nodes:
            self.failing = node
            yield node
        self.failing = None


@dataclass(frozen=True)
class Pass(ABC):
    """Turn a valid graph into a valid graph; in between anything goes.

    Fields of a subclass are its options and have defaults. Lint, dead code, metadata checks,
    timing and dumps belong to the runner.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    requires: ClassVar[tuple[str, ...]] = ()
    """Passes that must run earlier in the pipeline."""
    precedes: ClassVar[tuple[str, ...]] = ()
    """Passes that must not run earlier in the pipeline."""
    section: ClassVar[str | None] = None
    """Section of the options that switches the pass on; None leaves that to the pipeline."""
    presets: ClassVar[tuple[str, ...]] = ()
    """Presets whose pipeline the pass joins, behind what it requires, though no text names it."""
    rewrites_attention: ClassVar[bool] = False
    """Whether its notes on a site say what became of that attention."""
    leaves_out: ClassVar[bool] = False
    """Whether it may leave keys out; where none are left out, a graph without it can run."""
    in_dense_twin: ClassVar[bool] = True
    """Whether that graph is compiled with it, if it requires nothing that is left out there."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the pass's own options out of flat ones such as `sparse.tile`.

        Sections that are off are not among them.
        """
        return {}

    @abstractmethod
    def run(self, graph: torch.fx.Graph, ctx: PassContext) -> bool:
        """Rewrite or annotate `graph`; return whether any node changed."""

    def uuid(self) -> str:
        """Return what changes with the pass's source, its options and the version of torch."""
        return uuid_of(self)

    def __str__(self) -> str:
        options = [
            f"{f.name}={_print_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{' '.join(options)}}}" if options else "")


@dataclass(frozen=True)
class PassPipeline:
    """Hold passes in the order in which they run; its text form parses back."""

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for one in self.passes:
            if missing := set(one.requires) - earlier:
                names = ", ".join(sorted(missing))
                raise ValueError(f"{one.name} needs {names} in front of it, got {str(self)!r}")
            if late := set(one.precedes) & earlier:
                names = ", ".join(sorted(late))
                raise ValueError(f"{one.name} must come before {names}, got {str(self)!r}")
            earlier.add(one.name)

    @classmethod
    def parse(cls, text: str, options: Mapping[str, Any] | None = None) -> PassPipeline:
        """Read `name{option=value option=value},name,...`.

        Args:
            text: the pipeline; empty for no pass.
            options: flat options, of which each pass takes its own: those that it picks itself,
                and `name.option`, which goes first. The text overrides both.

        Raises:
            ValueError: for an unknown pass, an unknown option, a value that does not parse, or an
                order that a pass does not allow.
        """
        return cls(tuple(_parse_pass(item, options) for item in _split(text)))

    def uuid(self) -> str:
        """Return what changes with the passes, their options, their order and torch's version."""
        return uuid_of_pipeline(self.passes)

    def __str__(self) -> str:
        return ",".join(str(one) for one in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)


def closest(word: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for the known word next to `word`, or all that are known."""
    return "; " + did_you_mean(word, known, f"known: {', '.join(sorted(known))}")


def _split(text: str) -> list[str]:
    return [item.strip() for item in re.split(r",(?![^{]*\})", text) if item.strip()]


def _parse_pass(item: str, flat: Mapping[str, Any] | None) -> Pass:
    match = re.fullmatch(r"([\w-]+)(?:\{([^{}]*)\})?", item)
    if not match:
        raise ValueError(f"a pass is written name{{option=value ...}}, got {item!r}")
    name, options_text = match.groups()
    cls = pass_class(name)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    options = dict(cls.options_from(flat)) if flat else {}
    for key, value in (flat or {}).items():
        owner, dot, option = key.partition(".")
        if dot and owner == name:
            hint = hints[_known(option, known, name)]
            options[option] = _typed(value, hint, f"{name}.{option}")
    for pair in (options_text or "").split():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"an option of {name} is written key=value, got {pair!r}")
        hint = hints[_known(key, known, name)]
        options[key] = _parse_value(value, hint, f"{name}.{key}")
    return cls(**options)


def _known(option: str, known: list[str], name: str) -> str:
    if option not in known:
        raise ValueError(f"{name} has no option {option!r}{closest(option, known)}")
    return option


def check_option(key: str, value: object) -> None:
    """Refuse an option of one pass, `name.option`, that the pass would refuse.

    Raises:
        ValueError: no such pass or option, or a value that does not parse.
    """
    name, _, option = key.partition(".")
    cls = pass_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    _typed(value, typing.get_type_hints(cls)[_known(option, known, name)], key)


def _typed(value: object, hint: Any, where: str) -> object:
    """Read a value as if it stood in the text of a pipeline."""
    return _parse_value(
        _print_value(tuple(value) if isinstance(value, list) else value), hint, where
    )


def pass_class(name: str) -> type[Pass]:
    """Return the class of a pass, of this package or registered by another.

    Raises:
        ValueError: for a name that nobody has registered, or that is registered wrongly.
    """
    if name in PASSES:
        return PASSES[name]()
    if name not in registered():
        known = [*PASSES, *registered()]
        raise ValueError(f"unknown pass {name!r}{closest(name, known)}")
    cls = registered()[name]()
    if not (isinstance(cls, type) and issubclass(cls, Pass) and cls.name == name):
        raise ValueError(
            f"an entry point of {GROUP} must be a subclass of Pass with the same name, got "
            f"{cls!r} for {name!r}; set its `name`"
        )
    return cls


def _print_value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ("x" if value and isinstance(value[0], int) else "+").join(map(str, value))
    return str(value)


def _parse_value(text: str, hint: Any, where: str) -> object:
    kinds = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    if text == "none" and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            if kind is bool:
                return {"true": True, "false": False}[text]
            if kind in (int, float, str):
                return kind(text)
            if typing.get_origin(kind) is tuple:
                item = typing.get_args(kind)[0]
                return tuple(item(x) for x in text.split("x" if item is int else "+") if x)
        except (ValueError, KeyError):
            continue
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{where} must be {names}, got {text!r}; see `lipass options {where}`")
