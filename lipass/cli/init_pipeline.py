"""Draft the wiring of a pipeline of diffusers: its scheduler is followed, its loop stays."""

from __future__ import annotations

import ast
from pathlib import Path

from lipass.cli.init_find import Rollout
from lipass.cli.init_main import Draft, Questions

_TEXT = '''"""{name}, wired by `lipass init`; answer what is open."""

import time

{imports}

{length}
OPTIONS = {{"preset": "all", "chunk_latents": 16}}


def roll_out(pipe, clips, session):
    """Generate clip after clip along a walk of cameras.

    Args:
        pipe: the pipeline.
        clips: poses `[M, 4, 4]` of the latents so far (None for the first clip), query `[q, 4, 4]`
            of the new ones, and the arguments of the call of the pipeline.
        session: a lipass.Session.
    """
    made = []
    for poses, query, arguments in clips:
        # The pipeline takes all steps; the compiled model answers those that are reused.
        with (
            session.chunk(poses=poses, query=query) as chunk,
            chunk.follow(pipe.{scheduler}),
        ):
            {context}
            made.append(pipe(**arguments))
    return made


def main():
    """Roll out dense and accelerated, and say what was done."""
    {pipe}
    pipe = {name}.from_pretrained(...)
    {clips}
    clips = []
    model = pipe.{model}
    for options in ({{"preset": "off"}}, OPTIONS):
        pipe.{model} = torch.compile(model, backend="light_interaction", options=options)
        for _ in range(2):  # the first one compiles
            begin = time.perf_counter()
            with lipass.Session(**options) as session:
                roll_out(pipe, clips, session)
            print(options["preset"], f"{{time.perf_counter() - begin:.2f}} s")
    print(lipass.report().table())


if __name__ == "__main__":
    main()
'''


def is_pipeline(tree: ast.Module, one: Rollout) -> bool:
    """Whether a loop is that of a pipeline, which is called and not copied."""
    bases = [
        ast.unparse(base)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == one.owner
        for base in node.bases
    ]
    return one.model.startswith("self.") and any("Pipeline" in base for base in bases)


def draft_pipeline(target: str, path: Path, one: Rollout) -> Draft:
    """Draft the wiring of a pipeline."""
    questions = Questions()
    where = target.partition(":")[0]
    own = where.endswith(".py")
    imported = f"from {path.stem if own else where} import {one.owner}"
    packages = sorted(["import lipass", "import torch", *([] if own else [imported])])
    packages = sorted(packages, key=lambda line: line.startswith("from"))
    imports = "\n".join(packages) + (f"\n\n{imported}" if own else "")
    scheduler = one.levels if one.levels.startswith("self.") else "scheduler"
    text = _TEXT.format(
        name=one.owner,
        imports=imports,
        scheduler=scheduler.removeprefix("self."),
        model=one.model.removeprefix("self."),
        length="\n".join(questions.ask("how many latents does a clip have?")),
        context=questions.ask("what does a clip read of earlier ones? chunk.context only")[0],
        pipe=questions.ask("which weights?")[0],
        clips=questions.ask("which cameras (docs/poses.md), and which prompts?")[0],
    )
    return Draft(text, questions.asked)
