"""Find the denoising loop of a user's file, and what it is made of, without running it."""

from __future__ import annotations

import ast
import builtins
import re
from dataclasses import dataclass, field

from lipass.cli.init_syntax import (
    Function,
    assigned,
    calls,
    derived_from,
    functions,
    level_pairs,
    loaded,
    names_in,
    receivers,
)

Loop = ast.For | ast.AsyncFor | ast.While

_LEVELS = re.compile(r"sigma|timestep|level|schedul|noise|denois|num_steps", re.IGNORECASE)
_MODEL = re.compile(
    r"model|transformer|net\b|dit\b|unet|denoiser|generator|velocity", re.IGNORECASE
)
_POSES = re.compile(r"w2c|c2w|pose|camera|viewmat|extrinsic|trajector", re.IGNORECASE)
_CACHE = re.compile(r"cache|kv|memory|past_key", re.IGNORECASE)
_GUIDANCE = re.compile(r"cfg|guidance|uncond|negative", re.IGNORECASE)
_LAYERS = re.compile(r"blocks|layers|callback", re.IGNORECASE)
_NO_GRAD = re.compile(r"no_grad|inference_mode")
_NO_MODEL = {"torch", "F", "np", "numpy", "math", "itertools", "einops", "random", "time"}
_NO_CALL = {"step", "scale_model_input", "add_noise", "to", "expand", "progress_bar"}
_NO_CALL |= {"cache_context"}


@dataclass
class Rollout:
    """What was found of one denoising loop; names are as in the source.

    Attributes:
        function: the function that holds the loop.
        owner: class of the function, or "".
        steps: the loop over denoising steps.
        chunks: the loop around it, or None.
        levels: what the steps are taken from: noise levels or a scheduler; "" where not found.
        form: how the loop is written: "pairs", "index", "scheduler", "levels" or "".
        names: what the loop binds: a level, a level and the next, or an index (and a timestep).
        model: what is called in each step.
        calls: calls of it in a step.
        latents: what the steps update.
        history: what the chunks are joined to, or "".
        history_dim: along which axis; None for a list.
        poses: names that look like cameras.
        past: cameras of the history, or "".
        query: cameras of the new latents, or "".
        prefill: calls of the model in front of the steps.
        refresh: calls of the model behind the steps.
        caches: arguments that look like caches.
        guided: whether names look like guidance.
        no_grad: whether gradients are off.
        chunk_latents: how far the chunk loop goes, or "".
    """

    function: Function
    owner: str
    steps: ast.For | ast.AsyncFor
    chunks: Loop | None
    levels: str
    form: str
    names: tuple[str, ...]
    model: str
    calls: int
    latents: str
    history: str = ""
    history_dim: int | None = None
    poses: tuple[str, ...] = ()
    past: str = ""
    query: str = ""
    prefill: list[ast.Call] = field(default_factory=list)
    refresh: list[ast.Call] = field(default_factory=list)
    caches: tuple[str, ...] = ()
    guided: bool = False
    no_grad: bool = False
    chunk_latents: str = ""

    @property
    def score(self) -> int:
        """How much of it was found; the loop that has most is the one meant."""
        found = [self.levels, self.chunks, self.history, self.past, self.query, self.prefill]
        return sum(map(bool, found))


def rollouts(tree: ast.Module) -> list[Rollout]:
    """List the denoising loops of a module, the most complete first."""
    found = []
    for owner, function in functions(tree):
        text = ast.unparse(function)
        if ".backward(" in text or "optimizer" in text:
            continue  # training
        for loop in ast.walk(function):
            if isinstance(loop, ast.For | ast.AsyncFor):
                one = _rollout(owner, function, loop)
                if one is not None:
                    found.append(one)
    inner = [r for r in found if not any(o is not r and _holds(r.steps, o.steps) for o in found)]
    return sorted(inner, key=lambda one: -one.score)


def _holds(outer: ast.AST, inner: ast.AST) -> bool:
    return outer is not inner and any(node is inner for node in ast.walk(outer))


def _rollout(owner: str, function: Function, loop: ast.For | ast.AsyncFor) -> Rollout | None:
    if _LAYERS.search(ast.unparse(loop.iter)):
        return None
    body = ast.Module(loop.body, [])
    called = {c.func.id for c in calls(body) if isinstance(c.func, ast.Name)}
    carried = (assigned(body) & loaded(body)) - called
    derived = derived_from(body, carried)
    targets = tuple(n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name))
    stepped = [
        c for c in calls(body) if isinstance(c.func, ast.Attribute) and c.func.attr == "step"
    ]
    of_model = [c for c in calls(body) if _is_model_call(c, derived, targets)]
    if not of_model:
        return None
    named = [c for c in of_model if _MODEL.search(ast.unparse(c.func))]
    model = ast.unparse((named or of_model)[0].func)
    of_model = [c for c in of_model if ast.unparse(c.func) == model]
    made = derived_from(body, {n for c in of_model for n in receivers(body, c)})
    updated = [
        name for name in sorted(carried) if _is_updated(body, name, made, of_model, stepped)
    ]
    levels, form, names = _levels(loop, body, stepped)
    evidence = bool(_LEVELS.search(ast.unparse(loop.iter)) or levels)
    if not updated or not evidence:
        return None
    inputs = [n for c in of_model for a in c.args for n in names_in(a) if n in updated]
    latents = (inputs or updated)[0]
    for node in ast.walk(body):  # a pipeline with two experts picks one of them
        aims = node.targets if isinstance(node, ast.Assign) else []
        if model in map(ast.unparse, aims) and isinstance(node.value, ast.Attribute):  # type: ignore[attr-defined]
            model = ast.unparse(node.value)  # type: ignore[attr-defined]
            break
    one = Rollout(
        function, owner, loop, _around(function, loop), levels, form, names, model,
        len(of_model), latents,
    )  # fmt: skip
    _look_around(one, of_model)
    return one


def _is_model_call(call: ast.Call, derived: set[str], targets: tuple[str, ...]) -> bool:
    name = ast.unparse(call.func)
    root = name.split(".")[0].split("(")[0]
    method = name.rpartition(".")[2]
    if root in _NO_MODEL or root in derived or method in _NO_CALL or _LAYERS.search(name):
        return False
    given = {n for a in [*call.args, *(k.value for k in call.keywords)] for n in names_in(a)}
    if not given & derived:
        return False
    return bool(_MODEL.search(name)) or (
        bool(given & set(targets)) and not hasattr(builtins, root)
    )


def _is_updated(
    body: ast.Module, name: str, made: set[str], of_model: list[ast.Call], stepped: list[ast.Call]
) -> bool:
    """Whether a name is given its own value, changed by what the model returned."""
    for node in ast.walk(body):
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AugAssign) or value is None:
            continue
        aims = node.targets if isinstance(node, ast.Assign) else [node.target]
        if name not in {n for aim in aims for n in names_in(aim)}:
            continue
        uses = names_in(value) | ({name} if isinstance(node, ast.AugAssign) else set())
        inside = list(ast.walk(value))
        from_model = bool(uses & made) or any(call in inside for call in of_model)
        from_model |= any(call in inside for call in stepped)
        if from_model and (name in uses or isinstance(node, ast.AugAssign)):
            return True
        if from_model and any(name in names_in(a) for c in of_model for a in c.args):
            return True
    return False


def _levels(
    loop: ast.For | ast.AsyncFor, body: ast.Module, stepped: list[ast.Call]
) -> tuple[str, str, tuple[str, ...]]:
    """Read what a loop iterates over; returns levels, form and the names that it binds."""
    iterated, target, index = loop.iter, loop.target, ""
    while isinstance(iterated, ast.Call):
        name = ast.unparse(iterated.func).split(".")[-1]
        if name == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            index, target = ast.unparse(target.elts[0]), target.elts[1]
        elif name not in ("tqdm", "trange", "list", "tuple", "progress_bar", "track"):
            break
        iterated = iterated.args[0] if iterated.args else ast.Constant(None)
    names = tuple(ast.unparse(e) for e in target.elts) if isinstance(target, ast.Tuple) else ()
    names = names or (ast.unparse(target),)
    scheduler = ast.unparse(stepped[0].func.value) if stepped else ""  # type: ignore[attr-defined]
    if isinstance(iterated, ast.Call):
        name = ast.unparse(iterated.func).split(".")[-1]
        if name in ("pairwise", "zip") and len(names) == 2 and iterated.args:
            first = iterated.args[0]
            first = first.value if isinstance(first, ast.Subscript) else first
            return ast.unparse(first), "pairs", (*names, index)
        if name == "range":
            pairs = level_pairs(body, names[0])
            if pairs:
                return pairs, "index", names
            return scheduler, "scheduler" if scheduler else "", ("", names[0])
    text = ast.unparse(iterated)
    if scheduler:
        return scheduler, "scheduler", (names[0], index)
    if _LEVELS.search(text) and len(names) == 1:
        return text, "levels", (names[0], index)
    return "", "", names


def _around(function: Function, loop: ast.AST) -> Loop | None:
    """Return the innermost loop around a loop."""
    outer = [n for n in ast.walk(function) if isinstance(n, Loop) and _holds(n, loop)]
    return outer[-1] if outer else None


def _look_around(one: Rollout, of_model: list[ast.Call]) -> None:
    """Add what stands around the steps: history, cameras, caches, other calls of the model."""
    function, scope = one.function, one.chunks or one.function
    text = ast.unparse(function)
    one.no_grad = bool(_NO_GRAD.search(text))
    given = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]}
    local = assigned(function) | given
    one.guided = len(of_model) > 1 or any(map(_GUIDANCE.search, local))
    in_steps = set(calls(one.steps))
    others = [c for c in calls(scope) if c not in in_steps and ast.unparse(c.func) == one.model]
    one.prefill = [c for c in others if c.lineno < one.steps.lineno]
    one.refresh = [c for c in others if c.lineno > one.steps.lineno]
    passed = [k.arg or "" for c in of_model for k in c.keywords]
    passed += [
        n for c in of_model for a in [*c.args, *(k.value for k in c.keywords)] for n in names_in(a)
    ]
    one.caches = tuple(dict.fromkeys(n for n in passed if _CACHE.search(n)))
    one.poses = tuple(sorted(n for n in local if _POSES.search(n)))
    if one.chunks is not None:
        one.history, one.history_dim = _history(one)
        if isinstance(one.chunks, ast.For) and isinstance(one.chunks.iter, ast.Call):
            args = one.chunks.iter.args
            if ast.unparse(one.chunks.iter.func) == "range" and len(args) == 3:
                one.chunk_latents = ast.unparse(args[2])
        for node in ast.walk(one.chunks):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
                _camera_slice(one, node, node.slice)


def _camera_slice(one: Rollout, node: ast.Subscript, cut: ast.Slice) -> None:
    if not isinstance(node.value, ast.Name) or node.value.id not in one.poses:
        return
    if cut.lower is None and cut.upper is not None:
        one.past = one.past or ast.unparse(node)
    elif cut.lower is not None and cut.upper is not None and not one.query:
        one.query, start = ast.unparse(node), ast.unparse(cut.lower)
        one.past = one.past or f"{node.value.id}[:{start}]"
        if isinstance(cut.upper, ast.BinOp) and ast.unparse(cut.upper.left) == start:
            one.chunk_latents = one.chunk_latents or ast.unparse(cut.upper.right)


def _history(one: Rollout) -> tuple[str, int | None]:
    """Find what the finished latents of a chunk are joined to."""
    assert one.chunks is not None
    for node in ast.walk(one.chunks):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call, name = node.value, ast.unparse(node.targets[0])
            joined = call.args[0] if call.args else None
            if ast.unparse(call.func).split(".")[-1] != "cat" or not isinstance(joined, ast.List):
                continue
            if name in {ast.unparse(e) for e in joined.elts} and one.latents in names_in(joined):
                dims = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "dim")]
                dim = ast.unparse(dims[0]) if dims else "0"
                return (name, int(dim)) if dim.isdecimal() else ("", None)
    for call in calls(one.chunks):
        named = ast.unparse(call.func).rpartition(".")
        grows = named[2] in ("append", "extend") and bool(call.args)
        if grows and one.latents in names_in(call.args[0]):
            return named[0], None
    return "", None
