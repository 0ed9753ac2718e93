"""Write the draft of a wiring: the user's own loop with the lines of a session, and questions."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from lipass.cli.init_edits import Edits
from lipass.cli.init_find import Rollout
from lipass.cli.init_main import Draft, Questions, imports_of, is_bound, main_of
from lipass.cli.init_syntax import Function, level_pairs, loaded, names_in


def draft_loop(path: Path, source: str, tree: ast.Module, one: Rollout) -> Draft:
    """Draft the wiring of a loop that was found.

    Args:
        path: the user's file.
        source: its text.
        tree: its syntax tree.
        one: the loop.
    """
    questions = Questions()
    options = _options(one, tree, questions)
    loop = _wired(source, one, questions)
    main = main_of(tree, one, questions)
    body = "\n\n\n".join([options, loop, main])
    imports = imports_of(path, tree, body, one)
    name = f"{one.owner}.{one.function.name}" if one.owner else one.function.name
    head = f'"""`{name}` of {path.name}, wired by `lipass init`; answer what is open."""'
    text = "\n\n".join([head, imports, body]) + '\n\n\nif __name__ == "__main__":\n    main()\n'
    return Draft(text, questions.asked)


def _options(one: Rollout, tree: ast.Module, questions: Questions) -> str:
    lines = ["# Graph and session read different options of these, so both are given all of them."]
    length = one.chunk_latents
    # An argument, or what `self` has, is no name of the module that the draft imports from.
    if not length or not all(is_bound(tree, name) for name in names_in(ast.parse(length))):
        asked = "how many latents does a chunk generate?"
        lines += questions.ask(f"{asked} The loop says `{length}`" if length else asked)
        length = "4"
    lines.append(f'OPTIONS = {{"preset": "all", "chunk_latents": {length}}}')
    return "\n".join(lines)


def _wired(source: str, one: Rollout, questions: Questions) -> str:
    """Return the function with a chunk around what generates one, and its own steps."""
    function, edits = one.function, Edits(source)
    first, last = _region(one)
    keeps = bool(one.prefill and one.history and one.history_dim is not None)
    arguments = ast.parse(ast.unparse(function)).body[0].args  # type: ignore[attr-defined]
    arguments.kwonlyargs.append(ast.arg("session"))
    arguments.kw_defaults.append(None)
    decorators = [f"@{ast.unparse(one)}" for one in function.decorator_list]
    if not one.no_grad:
        decorators.insert(0, "@torch.no_grad()  # attention that records gradients stays dense")
    kind = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    start = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    edits.replace(
        start,
        edits.header_end(function),
        [*decorators, f"{kind} {function.name}({ast.unparse(arguments)}){returns}:"],
        function.col_offset,
    )
    inside, chunk = edits.indent(first), _chunk_lines(one, questions)
    within = _only_within(function, first, last)
    if within is not None:  # one `with` for both
        inside -= 4
        given = [ast.unparse(item) for item in within.items]
        ask = [line for line in chunk if line.startswith("#")]
        opened = chunk[len(ask) :]
        opened = ["(", *(f"    {one}," for one in given), f"    {opened[0].removeprefix('with ')}"]
        opened += [f"    {line}" for line in chunk[len(ask) + 1 : -1]] + ["    ) as chunk,", "):"]
        opened[:2] = [f"with {opened[0]}", opened[1]]
        edits.replace(within.lineno, edits.header_end(within), [*ask, *opened], inside)
    else:
        edits.before(first, chunk, inside)
        edits.deeper(first, last)
    if keeps:
        edits.before(first, _keep_lines(one, questions), inside + 4)
        for call in one.prefill:
            _read_kept(call, one, edits)
    _step_lines(one, edits, questions)
    end = function.end_lineno or function.lineno
    return textwrap.dedent("\n".join(edits.lines(start, end)))


def _region(one: Rollout) -> tuple[int, int]:
    """Return the lines from the first call of the model to the end of the steps."""
    body = one.chunks.body if one.chunks is not None else one.function.body
    called = {*(c.lineno for c in one.prefill), *(c.lineno for c in one.refresh), one.steps.lineno}
    inside = [s for s in body if any(s.lineno <= at <= (s.end_lineno or 0) for at in called)]
    while len(inside) == 1 and isinstance(inside[0], ast.With | ast.AsyncWith):
        inside = inside[0].body
    return inside[0].lineno, inside[-1].end_lineno or inside[-1].lineno


def _only_within(function: Function, first: int, last: int) -> ast.With | None:
    """Return the `with` that holds these lines and nothing else."""
    for node in ast.walk(function):
        if isinstance(node, ast.With) and (node.body[0].lineno, node.end_lineno) == (first, last):
            return node
    return None


def _chunk_lines(one: Rollout, questions: Questions) -> list[str]:
    lines = []
    if one.chunks is None:
        lines += questions.ask(
            f"`{one.function.name}` makes one chunk; open one session for the whole rollout, "
            "around all of its calls"
        )
    if one.past and one.query:
        known = "" if "w2c" in one.past else " (Session(..., convention=...) converts)"
        lines += questions.ask(
            f"are cameras world to camera, OpenCV axes, metres, one a latent{known}? docs/poses.md"
        )
        past = _alias(one, one.past)
        poses, query = f"{past} if len({past}) else None", _alias(one, one.query)
    else:
        seen = f" names like cameras: {', '.join(one.poses)}" if one.poses else ""
        lines += questions.ask(
            "which cameras [M, 4, 4] has the history (None in a first chunk), which [q, 4, 4] the "
            f"new latents?{seen}"
        )
        poses, query = "None", "None"
    latents = "None"
    if one.history and one.history_dim is not None:
        first = f".movedim({one.history_dim}, 0)" if one.history_dim else ""
        latents = f"{one.history}{first} if {one.history}.shape[{one.history_dim}] else None"
    elif one.history:
        lines += questions.ask(f"does `{one.history}` hold one latent an entry?")
        latents = f"torch.stack({one.history}) if {one.history} else None"
    else:
        lines += questions.ask(
            "where are the latents [M, ...] of the history? Without cameras they are needed"
        )
    if one.caches and not one.prefill:
        held = " and ".join(f"`{name}`" for name in one.caches)
        lines += questions.ask(
            f"how does {held} hold the latents of chunk.context only? All of them undo the choice"
        )
    return [
        *lines,
        "with session.chunk(",
        f"    poses={poses},",
        f"    query={query},",
        f"    latents={latents},",
        ") as chunk:",
    ]


def _keep_lines(one: Rollout, questions: Questions) -> list[str]:
    index = ", ".join([":"] * (one.history_dim or 0) + ["chunk.context"])
    asked = (
        "what else belongs to a history latent (conditions, masks, actions)? take chunk.context "
    )
    lines = [*questions.ask(asked + "of it too"), f"kept_history = {one.history}[{index}]"]
    if one.past:
        lines.append(f"kept_cameras = {_alias(one, one.past)}[chunk.context]")
    return lines


def _aliases(one: Rollout) -> dict[str, str]:
    """Map names to what they are bound to, in front of the first call of the model."""
    found: dict[str, str] = {}
    for node in ast.walk(one.chunks or one.function):
        if isinstance(node, ast.Assign) and node.lineno < _region(one)[0]:
            aims, values = node.targets[0], node.value
            if isinstance(aims, ast.Tuple) and isinstance(values, ast.Tuple):
                pairs = list(zip(aims.elts, values.elts, strict=False))
            else:
                pairs = [(aims, values)]
            found |= {ast.unparse(a): ast.unparse(v) for a, v in pairs}
    return found


def _alias(one: Rollout, expression: str) -> str:
    names = [name for name, value in _aliases(one).items() if value == expression]
    return names[0] if names else expression


def _read_kept(call: ast.Call, one: Rollout, edits: Edits) -> None:
    """Let a call that encodes the history encode what the chunk keeps of it."""
    aliases = {one.history: "kept_history"}
    if one.past:
        named = [name for name, value in _aliases(one).items() if value == one.past]
        aliases |= dict.fromkeys([one.past, *named], "kept_cameras")
    for given in [*call.args, *(k.value for k in call.keywords)]:
        for node in ast.walk(given):
            if isinstance(node, ast.Name | ast.Subscript) and ast.unparse(node) in aliases:
                edits.swap(node, aliases[ast.unparse(node)])


def _step_lines(one: Rollout, edits: Edits, questions: Questions) -> None:
    loop, names = one.steps, [*one.names, "", ""]
    at = loop.col_offset + 4 * edits.is_deeper(loop.lineno)
    lines: list[str] = []
    levels = one.levels
    if one.form == "pairs":
        lines = [f"{names[0]}, {names[1]} = step.sigma, step.sigma_next"]
        lines += [f"{names[2]} = step.index"] if names[2] else []
    elif one.form == "index":
        body = ast.Module(loop.body, [])
        assert level_pairs(body, names[0])
        rest = 0
        for node in ast.walk(body):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == one.levels:
                place = ast.unparse(node.slice)
                if place in (names[0], f"{names[0]} + 1"):
                    edits.swap(node, "step.sigma" if place == names[0] else "step.sigma_next")
                    rest -= 1
        rest += sum(isinstance(n, ast.Name) and n.id == names[0] for n in ast.walk(body))
        lines = [f"{names[0]} = step.index"] if rest else []
    elif one.form == "scheduler":
        used = loaded(ast.Module(loop.body, []))
        lines = [f"{names[0]} = step.timestep"] if names[0] in used else []
        lines += [f"{names[1]} = step.index"] if names[1] in used else []
        asked = f"is {levels}.set_timesteps(...) called for each chunk?"
        edits.before(loop.lineno, questions.ask(asked), at)
    elif one.form == "levels":
        lines = [f"{names[0]} = step.sigma  # it ends at step.sigma_next"]
        asked = f"does `{levels}` end with the level at which the last step ends, usually 0?"
        if "timestep" in levels.lower():
            asked = f"`{levels}`: which noise levels are they? Pass sigmas, or a scheduler"
        edits.before(loop.lineno, questions.ask(asked), at)
    else:
        asked = (
            "which noise levels does the loop take? write `for step in chunk.steps(sigmas)`, and "
            "step.sigma, step.sigma_next in it"
        )
        edits.before(loop.lineno, questions.ask(asked), at)
        return
    aim = "async for" if isinstance(loop, ast.AsyncFor) else "for"
    head = [f"{aim} step in chunk.steps({levels}):", *(f"    {line}" for line in lines)]
    edits.replace(loop.lineno, edits.header_end(loop), head, loop.col_offset)
