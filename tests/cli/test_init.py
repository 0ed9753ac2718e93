"""A draft of the wiring: the user's own loop with the lines of a session, and what is open."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lipass
from lipass.cli import FAILURE, NOTHING_MATCHED, OK, USAGE, main
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import reset_report

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
UNWIRED = '''
def roll_out(model, w2c):
    """Generate a chunk for each four cameras `[N, 4, 4]`; latents `[1, C, N, Y, X]`."""
    noise = torch.Generator().manual_seed(0)
    history = torch.zeros(1, CHANNELS, 0, ROWS, COLUMNS)
    for start in range(0, len(w2c), CHUNK_LATENTS):
        past, new = w2c[:start], w2c[start : start + CHUNK_LATENTS]
        caches = None
        if start:
            _, caches = model(history, torch.zeros(1), past[None])  # all of it
        x = torch.randn(1, CHANNELS, len(new), ROWS, COLUMNS, generator=noise)
        for sigma, sigma_next in itertools.pairwise(SIGMAS):
            # one level down
            velocity, _ = model(x, sigma, new[None], caches)
            x = x + (sigma_next - sigma) * velocity
        history = torch.cat([history, x], 2)
    return history
'''
SAMPLER = '''
import torch


class Sampler:
    def __init__(self, model, steps=4):
        self.model = model
        self.sigmas = torch.linspace(1, 0, steps + 1)

    @torch.inference_mode()
    def sample(self, noise: torch.Tensor, cond, *, scale: float = 3.0) -> torch.Tensor:
        """Denoise with guidance.

            indented as it was
        """
        latents = noise
        for i in range(len(self.sigmas) - 1):
            # both branches
            v_cond = self.model(latents, self.sigmas[i], cond)
            v_uncond = self.model(latents, self.sigmas[i])
            v = v_uncond + scale * (v_cond - v_uncond)
            latents = latents + (self.sigmas[i + 1] - self.sigmas[i]) * v
        return latents
'''
SCHEDULER = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm


def generate(transformer, prompt_embeds, c2w, num_chunks=4, per_chunk=4):
    scheduler = FlowMatchEulerDiscreteScheduler()
    done = []
    for index in range(num_chunks):
        scheduler.set_timesteps(4)
        latents = torch.randn(1, 16, per_chunk, 8, 8)
        with torch.no_grad():
            for i, t in enumerate(tqdm(scheduler.timesteps)):
                noise_pred = transformer(latents, timestep=t.expand(1), prompt=prompt_embeds)
                latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        done.append(latents)
    return torch.cat(done, 2)
"""
STREAM = '''
import torch

TIMESTEPS = [1000, 750, 500, 250]


def stream(generator, actions, viewmats, kv_cache: dict):
    """Yield blocks of latents."""
    frame = 0
    while frame < len(actions):
        x = torch.randn(1, 4, 16, 8, 8)
        for timestep in TIMESTEPS:
            views = viewmats[frame : frame + 4]
            flow = generator(x, timestep, kv_cache=kv_cache, start=frame, viewmats=views)
            x = x - flow * 0.25
        generator(x, 0, kv_cache=kv_cache, start=frame)
        frame += 4
        yield x
'''
PIPELINE = """
from diffusers import DiffusionPipeline


class OwnPipeline(DiffusionPipeline):
    def __call__(self, prompt, latents):
        self.scheduler.set_timesteps(4)
        with self.progress_bar(total=4) as bar:
            for t in self.scheduler.timesteps:
                noise_pred = self.transformer(latents, t, prompt)
                latents = self.scheduler.step(noise_pred, t, latents).prev_sample
                bar.update()
        return latents
"""
TRAINING = """
def train(model, sigmas, x, optimizer):
    for sigma in sigmas:
        loss = (model(x, sigma) - x).square().mean()
        loss.backward()
        optimizer.step()
"""
FILES = {
    "sampler": SAMPLER,
    "scheduler": SCHEDULER,
    "stream": STREAM,
    "pipeline": PIPELINE,
}


def unwired():
    """The example without its lines of lipass."""
    text = EXAMPLE.read_text()
    text = text[: text.index("@torch.no_grad()")] + UNWIRED.lstrip()
    text = text.replace("import time\n", "import itertools\n")
    for line in text.splitlines():
        if "lipass" in line or line.startswith(("OPTIONS", "# Graph and session")):
            text = text.replace(f"{line}\n", "")
    assert "lipass" not in text
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own", "own_lipass"):
        sys.modules.pop(name, None)


def drafted(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    assert main(["init", f"{name}.py"]) == OK
    return (folder / f"{name}_lipass.py").read_text()


def test_example_without_its_wiring_comes_out_complete(folder, capsys):
    text = drafted(folder, "own", unwired())
    assert "SIGMAS (pairs)" in capsys.readouterr().out
    assert "for step in chunk.steps(SIGMAS):" in text
    assert "# one level down" in text, "comments stay"
    draft = importlib.import_module("own_lipass")
    reset_report()
    model, w2c = draft.World(32, 2, 1).eval(), parse_trajectory("left-7, right-8")
    torch._dynamo.reset()
    options = {**draft.OPTIONS, "inner": "eager"}
    compiled = torch.compile(model, backend="light_interaction", options=options)
    history = draft.roll_out(compiled, w2c, session=lipass.Session(**draft.OPTIONS))
    assert history.shape == (1, 8, 16, 16, 16)
    last = lipass.report().chunks[-1]
    assert len(last.plan.context.indices) < last.plan.history_latents == 12
    assert last.latents_read == len(last.plan.context.indices)
    assert last.steps_skipped == 2


@pytest.mark.parametrize("name", FILES)
def test_draft_is_python_that_ruff_takes(folder, name):
    text = drafted(folder, name, FILES[name])
    ast.parse(text)
    numbers = [line for line in text.splitlines() if "# Open " in line]
    assert [f"# Open {n}:" in line for n, line in enumerate(numbers, 1)] == [True] * len(numbers)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", f"{name}_lipass.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("length", "step"),
    [("chunk=4", "chunk"), ("chunk_size", "chunk_size // 2"), ("config", "config.per_block")],
)
def test_length_of_a_chunk_that_no_module_has_is_asked_for(folder, capsys, length, step):
    text = f"""
import torch


def generate(model, w2c, sigmas, {length}):
    done = []
    for start in range(0, len(w2c), {step}):
        x = torch.randn(1, 4, 16, 8, 8)
        for i in range(len(sigmas) - 1):
            x = x + (sigmas[i + 1] - sigmas[i]) * model(x, sigmas[i], w2c[: start + 4])
        done.append(x)
    return done
"""
    draft = drafted(folder, "argument", text)
    assert f"how many latents does a chunk generate? The loop says `{step}`" in " ".join(
        capsys.readouterr().out.split()
    )
    assert '"chunk_latents": 4' in draft
    importlib.import_module("argument_lipass")


def test_method_keeps_its_comments_and_both_branches(folder, capsys):
    text = drafted(folder, "sampler", SAMPLER)
    assert "self.model, 2 calls a step" in capsys.readouterr().out
    assert (
        "            # both branches\n            v_cond = self.model(latents, step.sigma," in text
    )
    assert "\n        indented as it was\n" in text
    assert "(step.sigma_next - step.sigma) * v" in text
    assert "@torch.inference_mode()" in text
    assert "@torch.no_grad()" not in text
    assert "self.model = torch.compile(model, " in text


def test_scheduler_takes_the_steps_in_one_with(folder):
    text = drafted(folder, "scheduler", SCHEDULER)
    assert "            torch.no_grad(),\n            session.chunk(\n" in text
    assert "for step in chunk.steps(scheduler):\n                t = step.timestep\n" in text
    assert "set_timesteps(...) called for each chunk?" in text
    assert "names like cameras: c2w" in text


def test_stream_asks_how_its_cache_follows_the_choice(folder, capsys):
    text = drafted(folder, "stream", STREAM)
    said = capsys.readouterr().out
    assert "how does `kv_cache` hold the latents of chunk.context only?" in said
    assert "history   not found" in said
    assert "poses=viewmats[:frame] if len(viewmats[:frame]) else None" in text
    assert "            generator(x, 0, kv_cache=kv_cache, start=frame)\n" in text, "in the chunk"
    assert "list(stream(compiled, " in text


def test_pipeline_is_followed_and_not_copied(folder):
    text = drafted(folder, "pipeline", PIPELINE)
    assert "chunk.follow(pipe.scheduler)" in text
    assert "pipe.transformer = torch.compile(model, " in text
    assert "noise_pred" not in text


def test_pipeline_of_a_package_is_found_by_name(folder, capsys):
    assert main(["init", "diffusers:WanPipeline", "-o", "wan.py"]) == OK
    assert "self.transformer, 2 calls a step" in capsys.readouterr().out
    assert "from diffusers import WanPipeline" in Path("wan.py").read_text()


def test_draft_overwrites_nothing(folder, capsys):
    before = drafted(folder, "own", unwired())
    assert main(["init", "own.py"]) == USAGE
    assert "DRAFT must be a new file, got own_lipass.py" in capsys.readouterr().err
    assert Path("own_lipass.py").read_text() == before
    assert main(["init", "own.py", "-o", "second.py"]) == OK
    assert main(["init", "own.py", "-o", "no/such/folder.py"]) == USAGE
    assert "DRAFT must be writable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TRAINING, "no denoising loop was found in own.py"),
        ("x = 1\n", "no denoising loop was found in own.py"),
        (EXAMPLE.read_text(), "has a session already"),
    ],
    ids=["training", "nothing", "wired"],
)
def test_what_has_no_loop_to_wire_is_said(folder, capsys, text, said):
    (folder / "own.py").write_text(text)
    assert main(["init", "own.py"]) == NOTHING_MATCHED
    assert said in capsys.readouterr().err
    assert not Path("own_lipass.py").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("missing.py", "FILE must exist, got 'missing.py'"),
        ("no_such_module:thing", "FILE must be file.py or module:name"),
        ("diffusers:NoSuchPipeline", "diffusers must have 'NoSuchPipeline'"),
    ],
)
def test_target_that_is_none_is_refused(folder, capsys, target, said):
    assert main(["init", target]) == USAGE
    assert said in capsys.readouterr().err


def test_file_that_does_not_parse_is_refused(folder, capsys):
    (folder / "own.py").write_text("def broken(:\n")
    assert main(["init", "own.py"]) == USAGE
    assert "FILE must be Python, got own.py with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "def f(model, x, sigmas):\n    for s in sigmas: x = x - model(x, s)\n    return x\n",
        "def f(model, x, sigmas):\n\tfor s in sigmas:\n\t\tx = x - model(x, s)\n\treturn x\n",
    ],
    ids=["one-line", "tabs"],
)
def test_loop_that_cannot_be_edited_is_refused(folder, capsys, text):
    (folder / "own.py").write_text(text)
    assert main(["init", "own.py"]) == FAILURE
    assert "must be written over lines of their own" in capsys.readouterr().err
    assert not Path("own_lipass.py").exists()


def test_name_chooses_among_loops(folder, capsys):
    (folder / "own.py").write_text(unwired() + SAMPLER)
    assert main(["init", "own.py:Sampler"]) == OK
    said = capsys.readouterr().out
    assert "Sampler.sample" in said
    assert "roll_out" not in said


def test_json_is_one_document(folder, capsys):
    (folder / "own.py").write_text(unwired())
    assert main(["init", "own.py", "--json"]) == OK
    document = json.loads(capsys.readouterr().out)
    assert document["draft"] == "own_lipass.py"
    assert document["found"]["history"] == "history"
    assert len(document["open"]) == 4


def test_names_that_only_the_script_itself_makes_are_not_imported(folder, capsys):
    script = f"{ast.unparse(ast.parse(EXAMPLE.read_text()))}".partition("if __name__")[0]
    script = script.partition("def roll_out")[0] + UNWIRED
    script += '\n\nif __name__ == "__main__":\n    model = World()\n    w2c = prompt = 1\n'
    (folder / "scripted.py").write_text("import itertools\n" + script)
    assert main(["init", "scripted.py"]) == OK
    draft = next(folder.glob("scripted_*.py")).read_text()
    taken = [line for line in draft.splitlines() if line.startswith("from scripted import")]
    assert taken
    assert not {"model", "w2c", "prompt"} & set(re.split(r"[ ,]+", " ".join(taken)))
