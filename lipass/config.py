"""Turn a preset and flat options into one comparable, frozen Config, or say what is wrong.

Options are plain data (str, bool, int, float, tuples), so that `torch.compile(options=...)` can
compare them. Defaults live in `lipass.presets`, what a section holds in `lipass.options`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipass.grow_options import GrowOptions
from lipass.merge_options import MergeOptions
from lipass.option_kinds import coerced
from lipass.options import (
    ContextOptions,
    SparseOptions,
    SteeringOptions,
    StepOptions,
    ViewOptions,
    check,
    check_choice,
)
from lipass.presets import ADAPTIVE, PRESETS, SECTIONS_OF

INNERS = ("inductor", "aot_eager", "eager")
VERIFY = ("off", "first")
SECTIONS = ("context", "sparse", "steps", "merge", "steering", "grow")

_NO_PRESET = "use 'all', or 'exact' where nothing may change"
ONE_SIDED = ("preset", "inner", "strict", "verify")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a compilation and a session are told; build it with `Config.resolve`.

    Attributes:
        preset: name the values came from.
        inner: compiler behind the passes: "inductor", "aot_eager" or "eager".
        strict: raise where a site that the preset names would stay dense.
        verify: "first" compares the first attention site of each form with its rewrite at budget
            1.0, on small random inputs while the graph is compiled; what differs is kept. "off"
            trusts the matchers.
        pipeline: text of the pass pipeline; None takes the preset's.
        disable: names of passes to leave out of the pipeline.
        counted_writes: True promises that weights and inputs are only written to in ways that
            torch counts, so not through `Tensor.data` or numpy; projected prompts are then kept
            from call to call of a session.
        context, sparse, steps, merge: options of the approximations; None is off.
        steering: lets attention weigh prompts and older history as a session says; None is off.
        grow: which early steps sessions take on half of the grid; None is off.
        passes: options of single passes, `("pass-name.option", value)` in the order of the names.
    """

    preset: str
    inner: str
    strict: bool
    verify: str
    pipeline: str | None
    disable: tuple[str, ...]
    counted_writes: bool
    context: ContextOptions | None
    sparse: SparseOptions | None
    steps: StepOptions | None
    merge: MergeOptions | None
    steering: SteeringOptions | None
    grow: GrowOptions | None
    passes: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS), _NO_PRESET)
        check_choice("inner", self.inner, INNERS)
        check_choice("verify", self.verify, VERIFY)
        if self.context is not None and self.steps is not None:
            modes = (self.context.mode, self.steps.mode)
            check(
                len(set(modes)) == 1 or "matrix-game" not in modes,
                "context.mode and steps.mode must both be 'matrix-game' or none",
                modes,
                "set both, as its cameras are of video frames, or switch one section off",
            )
            for field in dataclasses.fields(ViewOptions):
                ours, theirs = getattr(self.context, field.name), getattr(self.steps, field.name)
                check(
                    ours == theirs,
                    f"context.{field.name} and steps.{field.name} must agree (one camera)",
                    (ours, theirs),
                    f"set both with '{field.name}'",
                )

    @classmethod
    def resolve(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """Build the Config of a preset with some options changed.

        Args:
            mode: preset name; None means `options["preset"]`, or "all" without one.
            options: flat keys: fields of Config ("inner"), of a section ("sparse.tile"), a
                section's switch ("steps": False), a shorthand that sets several (`SHORTHANDS`),
                an option of one pass ("find-steps.steps_min"), which the pipeline checks, or a
                file of `lipass calibrate` ("frontier"), whose options give way to the others.

        Raises:
            ValueError: unknown key or preset, value out of range, option of a section that is off.
            TypeError: value of the wrong kind.
        """
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(
                f"options must be a dict of names and values, got {type(options).__name__}; "
                "write options={'preset': 'all'}"
            )
        options = dict(options or {})
        if (path := options.pop("frontier", None)) is not None:
            from lipass.calibration.beside import beside  # reads files, and knows no Config
            from lipass.calibration.frontier import Frontier

            found = Frontier.load(coerced("frontier", path, str))
            options = beside(found, options, mode=mode)
        named = options.pop("preset", None)
        if mode is not None and named is not None and mode != named:
            raise ValueError(
                f"there must be one preset, got mode={mode!r} and preset={named!r}; drop one"
            )
        preset = mode if mode is not None else named if named is not None else "all"
        check_choice("preset", preset, tuple(PRESETS), _NO_PRESET)
        unknown = [key for key in options if key not in _known_keys()]
        of_passes = {key: options.pop(key) for key in unknown if _names_a_pass(key)}
        if unknown := [key for key in unknown if key not in of_passes]:
            raise ValueError(_unknown_key(unknown[0]))

        _check_passes(of_passes, options)

        values = _preset_values(preset)
        values["passes"] = tuple(
            (key, tuple(value) if isinstance(value, list) else value)
            for key, value in sorted(of_passes.items())
        )
        defaults = SECTIONS_OF.get(preset, ADAPTIVE)
        for name in SECTIONS:
            if name in options:
                switch = coerced(name, options.pop(name), bool)
                if switch and values[name] is None:
                    values[name] = dict(defaults[name])
                elif not switch:
                    values[name] = None
        if "pipeline" not in options:
            for key in of_passes:
                _check_section_of_pass(key, values)
        # A named key beats a shorthand that covers it, whatever their order.
        for key in sorted(options, key=lambda key: key not in SHORTHANDS):
            targets = SHORTHANDS.get(key, (key,))
            live = [t for t in targets if "." not in t or values[t.split(".")[0]] is not None]
            if not live and key in _OF_THE_WALK:
                coerced(key, options[key], _FIELD_KINDS[targets[0]])
            elif not live:
                raise ValueError(_section_off(key, targets, preset))
            for target in live:
                section, _, field = target.rpartition(".")
                where = values[section] if section else values
                where[field] = coerced(key, options[key], _FIELD_KINDS[target])
        for name, kind in _SECTION_TYPES.items():
            if values[name] is not None:
                values[name] = kind(**values[name])
        return cls(**values)

    def fingerprint(self) -> str:
        """Name what a compiled graph and a session must agree on: equal where they agree on all.

        The inner compiler, `verify` and `strict` are no part of it; it is the same in every
        process and version that has the same options.
        """
        flat = self.to_options()
        kept = {key: flat[key] for key in flat if key not in ONE_SIDED}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def to_options(self) -> dict[str, Any]:
        """Give the flat options that `resolve(None, ...)` turns back into this Config."""
        names = ("preset", "inner", "strict", "verify", "disable", "counted_writes")
        flat: dict[str, Any] = {name: getattr(self, name) for name in names} | dict(self.passes)
        if self.pipeline is not None:
            flat["pipeline"] = self.pipeline
        for name in SECTIONS:
            section = getattr(self, name)
            flat[name] = section is not None
            if section is not None:
                for field in dataclasses.fields(section):
                    flat[f"{name}.{field.name}"] = getattr(section, field.name)
        return flat


_SECTION_TYPES: dict[str, Any] = {
    "context": ContextOptions,
    "sparse": SparseOptions,
    "steps": StepOptions,
    "merge": MergeOptions,
    "steering": SteeringOptions,
    "grow": GrowOptions,
}

# True of a walk under any preset, so that one can be put in place of another and the rest stays.
_OF_THE_WALK = tuple(field.name for field in dataclasses.fields(ViewOptions))

SHORTHANDS: dict[str, tuple[str, ...]] = {
    "sparse.budget": ("sparse.budget_prefill", "sparse.budget_self", "sparse.budget_decode"),
    **{name: (f"context.{name}", f"steps.{name}") for name in _OF_THE_WALK},
}

_FIELD_KINDS: dict[str, Any] = {
    "frontier": str,
    "inner": str,
    "strict": bool,
    "verify": str,
    "pipeline": str,
    "disable": "tuple[str, ...]",
    "counted_writes": bool,
    **{
        f"{name}.{field.name}": field.type
        for name, kind in _SECTION_TYPES.items()
        for field in dataclasses.fields(kind)
    },
}


def kind_of(key: str) -> str:
    """Name the kind of value that an option takes, as it is written in its class; "" if none."""
    if key in SECTIONS:
        return "bool"
    kind = _FIELD_KINDS.get(SHORTHANDS.get(key, (key,))[0], "")
    return kind if isinstance(kind, str) else kind.__name__


def _preset_values(preset: str) -> dict[str, Any]:
    """Copy a preset's entry, sections included, so that options can be written into it."""
    values: dict[str, Any] = {"preset": preset}
    for key, value in PRESETS[preset].items():
        values[key] = dict(value) if isinstance(value, dict) else value
    return values


def _known_keys() -> set[str]:
    return {"preset", *SECTIONS, *_FIELD_KINDS, *SHORTHANDS}


def _names_a_pass(key: str) -> bool:
    name, dot, _ = str(key).partition(".")
    if not dot or name in SECTIONS:
        return False
    from lipass import passes  # imports no pass

    return name in passes.PASSES or name in passes.registered()


def _check_passes(of_passes: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what passes are told and would refuse: a session would never ask them."""
    if of_passes or options.get("disable") or options.get("pipeline"):
        from lipass.passes import core

        for key, value in of_passes.items():
            core.check_option(key, value)
        for name in coerced("disable", options.get("disable", ()), "tuple[str, ...]"):
            core.pass_class(name)
        core.PassPipeline.parse(coerced("pipeline", options.get("pipeline") or "", str))


def _check_section_of_pass(key: str, values: Mapping[str, Any]) -> None:
    """Refuse an option of a pass that a preset does not run, as that of its section is refused."""
    from lipass.passes.core import pass_class

    section = pass_class(key.partition(".")[0]).section
    if section is not None and values.get(section, True) is None:
        raise ValueError(_section_off(key, (f"{section}.",), values["preset"]))


def _unknown_key(key: str) -> str:
    from lipass.passes.nearest import did_you_mean, nearest

    known = nearest(key, sorted(_known_keys())) or _pass_options()
    remedy = did_you_mean(key, known, "see `lipass options`")
    return f"options must name what can be told, got {key!r}; {remedy}"


def _pass_options() -> list[str]:
    from lipass import passes
    from lipass.passes.core import pass_class

    names = (*passes.PASSES, *passes.registered())
    return [f"{name}.{field.name}" for name in names
            for field in dataclasses.fields(pass_class(name))]  # fmt: skip


def _section_off(key: str, targets: tuple[str, ...], preset: str) -> str:
    section = targets[0].split(".")[0]
    return (
        f"an option needs its section, got {key!r} while {section!r} is off in preset {preset!r}; "
        f"add '{section}': True, or use preset 'all'"
    )
