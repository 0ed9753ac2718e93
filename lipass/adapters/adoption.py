"""Replace what a model calls by name, reversibly, and list each replacement.

Models of the field bind their attention by name in the module that calls it, often behind
`torch.compiler.disable` or as an operator that no graph shows. An adoption binds those names to
code that Dynamo sees; `undo` puts back, last first, exactly the objects that stood there. Several
adoptions of one name may be undone in any order: what is undone hands what it has replaced to the
one above.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lipass.errors import LipassError

if TYPE_CHECKING:
    from lipass.session import Session

_MISSING = object()
_told: weakref.WeakKeyDictionary[object, list[Mapping[str, Any]]] = weakref.WeakKeyDictionary()
_left: weakref.WeakKeyDictionary[object, list[Change]] = weakref.WeakKeyDictionary()
# An adoption that nobody keeps is for good, and must not keep its model.
_live: dict[tuple[int, str], list[weakref.ref[_Binding]]] = {}


def options_told(model: object) -> Mapping[str, Any]:
    """Return options of passes that an adapter has told of a model or a part of it, or none."""
    if not _told or not isinstance(model, nn.Module):
        return {}
    return next((_told[part][-1] for part in model.modules() if _told.get(part)), {})


def refuse_lints(model: object) -> None:
    """Raise if an adopted model, or a part of it, has attention that nothing could show.

    Raises:
        LipassError: names the first place.
    """
    parts = model.modules() if _left and isinstance(model, nn.Module) else ()
    for lint in (one for part in parts for one in _left.get(part, ())):
        raise LipassError(
            f"strict: attention of an adopted model must be seen by Dynamo, got {lint}; switch "
            "that off in the model, or set strict to False"
        )


@dataclass(frozen=True)
class Change:
    """One name that was bound to something else, or one place that could not be."""

    where: str
    """`file.py:line` of what stood there."""
    name: str
    why: str
    owner: str = ""
    """The module, class or kind of object whose name it is."""

    def __str__(self) -> str:
        owner = f"{self.owner}." if self.owner else ""
        return f"{self.where}  {owner}{self.name}: {self.why}"


@dataclass(eq=False)
class _Binding:
    owner: Any
    name: str
    value: object
    before: object
    change: Change

    def put_back(self) -> None:
        """Bind the name to what stood there, or have the binding above do that in its turn."""
        stack = _bindings(self.owner, self.name)
        at = stack.index(self)
        _keep(stack[:at] + stack[at + 1 :], self.owner, self.name)
        if at + 1 < len(stack):
            stack[at + 1].before = self.before
        elif self.before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def _bindings(owner: object, name: str) -> list[_Binding]:
    """Return what is bound to a name until it is undone, the latest last."""
    found = (one() for one in _live.get((id(owner), name), ()))
    return [one for one in found if one is not None]


def _keep(stack: list[_Binding], owner: object, name: str) -> None:
    key = (id(owner), name)
    _live[key] = [weakref.ref(one) for one in stack]
    if not stack:
        del _live[key]


class Adoption:
    """What `lipass.adopt` did to one model, and the way back.

    Attributes:
        family: name of the family whose rules applied, or `"any"`.
        changes: each name that was bound anew.
        lints: what Dynamo will not see and nothing here could replace.
    """

    def __init__(
        self, family: str, drive: Callable[[Session, Adoption], None] | None = None
    ) -> None:
        self.family = family
        self._drive = drive
        self.changes: list[Change] = []
        self.lints: list[Change] = []
        self._at_undo: list[Callable[[], None]] = []

    def rebind(self, owner: Any, name: str, value: object, why: str, where: str = "") -> None:
        """Bind `name` of a module, class or object to `value` until `undo`.

        Args:
            owner: what holds the name.
            name: is listed among the changes.
            value: what it is bound to.
            why: is listed too.
            where: `file.py:line` that matters, where it is not that of what stood there.
        """
        own = vars(owner).get(name, _MISSING)
        before = getattr(owner, name, None) if own is _MISSING else own
        change = Change(where or place(before, owner), name, why, _last_name(owner))
        stack = _bindings(owner, name)
        self._bind(_Binding(owner, name, value, own, change), stack, len(stack))
        setattr(owner, name, value)

    def hold(self, owner: Any, name: str, why: str) -> bool:
        """Keep what another adoption has bound to a name for the same reason, if one has.

        It stays until both are undone, and is not replaced twice.
        """
        stack = _bindings(owner, name)
        if not stack or vars(owner).get(name) is not stack[-1].value:
            return False
        for at, one in enumerate(stack, 1):
            if one.change.why == why:
                self._bind(_Binding(owner, name, one.value, one.value, one.change), stack, at)
                return True
        return False

    def _bind(self, one: _Binding, stack: list[_Binding], at: int) -> None:
        self.changes.append(one.change)
        self.at_undo(one.put_back)
        _keep([*stack[:at], one, *stack[at:]], one.owner, one.name)

    def before_calls(self, model: Any, hook: Callable[..., Any], why: str) -> None:
        """Let `hook(model, args, kwargs)` change what a module is called with, until `undo`.

        `torch.compile(model)` runs it in front of the graph: what it makes of numbers is not
        compiled anew for other ones.
        """
        hidden = torch.compiler.disable(hook, reason="it prepares the arguments of a call")
        handle = model.register_forward_pre_hook(hidden, with_kwargs=True)
        self.changes.append(Change(place(type(model).forward, model), "forward", why))
        self.at_undo(handle.remove)

    def tell(self, model: nn.Module, options: Mapping[str, Any], why: str) -> None:
        """Give passes options for the graphs of a model until `undo`; the user's own win."""
        self.changes.append(Change(place(type(model).forward, model), ", ".join(options), why))
        _told.setdefault(model, []).append(options)
        self.at_undo(functools.partial(_remove, _told[model], options))

    def lint(self, found: object, name: str, why: str, model: nn.Module | None = None) -> None:
        """Say of a function that stays what it hides; `strict` refuses its model."""
        self.lints.append(Change(place(found, found), name, why))
        if model is not None:
            _left.setdefault(model, []).append(self.lints[-1])
            self.at_undo(functools.partial(_remove, _left[model], self.lints[-1]))

    def at_undo(self, put_back: Callable[[], None]) -> None:
        """Have something called by `undo` that no name is bound to."""
        self._at_undo.append(put_back)

    def undo(self) -> None:
        """Put back what stood there, last first; a second call does nothing.

        Raises:
            BaseException: the first error, behind all that could be put back.
        """
        first: BaseException | None = None
        while self._at_undo:
            try:
                self._at_undo.pop()()
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    @contextmanager
    def drive(self, session: Session) -> Iterator[Adoption]:
        """Let the pipeline's own rollout ask a session for context and steps inside the block.

        Args:
            session: an open session; chunks are opened and closed for it.

        Yields:
            What is bound anew for the block; it is undone behind it.

        Raises:
            LipassError: if nothing is known of the loop that this model is rolled out by.
        """
        if self._drive is None:
            raise LipassError(
                f"a rollout must be known to be driven, got one of family {self.family!r}; adopt "
                "the pipeline that holds the loop, or open chunks in a loop of your own"
            )
        bound = Adoption(self.family)
        try:
            self._drive(session, bound)
            yield bound
        finally:
            bound.undo()

    def table(self) -> str:
        """Return one line a change and one a lint, with its place."""
        lines = [f"adopted as {self.family}: {len(self.changes)} names bound anew"]
        lines += [f"  {one}" for one in self.changes]
        lines += [f"  left: {one}" for one in self.lints]
        return "\n".join(lines)

    def __enter__(self) -> Adoption:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def _remove(known: list[Any], one: object) -> None:
    """Take one object out of a list in which others may equal it."""
    del known[next(i for i, each in enumerate(known) if each is one)]


def place(found: object, owner: object) -> str:
    """Return `file.py:line` where something was defined.

    Of what is no function, that is where its owner is made, or the file if that is a module.
    """
    plain = getattr(found, "_torchdynamo_orig_callable", found)
    code = getattr(inspect.unwrap(plain) if callable(plain) else plain, "__code__", None)
    if code is None and inspect.ismodule(owner):
        return str(getattr(owner, "__file__", owner.__name__)).rpartition("/")[2]
    if code is None:
        code = getattr(inspect.unwrap(type(owner).__init__), "__code__", None)
    if code is None:
        return _last_name(owner)
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"


def _last_name(owner: object) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__)).rpartition(".")[2]
