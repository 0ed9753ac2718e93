"""Lines of the pages of models, of cameras and of events run word for word, on small models."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from page_blocks import PAGES, ROOT, RUN, block_of, code_of, written

import lipass
from lipass.adapters.checkouts import (
    hy_worldplay,
    imports,
    lingbot_world,
    matrix_game_3,
    matrix_game_3_rollout,
    open_oasis,
    self_forcing,
)
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.self_forcing_loop import Given, new_caches
from lipass.examples import own_model
from lipass.kernels import registry
from lipass.policy.convention import inverted
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report

_OF_CHECKOUTS = {
    "hyvideo", "wan", "pipeline", "utils", "attention", "dit", "rotary_embedding_torch",
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch, compiles):
    """Hide what checkouts left among the modules, in front of a test and behind it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    hidden = _forgotten()
    yield
    _forgotten()
    sys.modules.update(hidden)


def _forgotten():
    names = [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] in _OF_CHECKOUTS or isinstance(module, imports._Empty)
    ]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def built(monkeypatch, alone):
    """Return what builds one layer of a family's miniature, of a file of checkouts."""
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    # its one class from there is not what is tried here
    monkeypatch.setattr(open_oasis, "NEEDED", ("einops",))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # calls this small take longer to share than to compute
    yield lambda family: family.build(
        ROOT / "tests/adapters/contracts" / family.__name__.rpartition(".")[2], layers=1
    )
    torch.set_num_threads(threads)


def rolled(subject, chunks=2):
    """Run the release's own rollout with nothing compiled."""
    subject.model._compiled_call_impl = None
    with torch.no_grad():
        return [one.clone() for one in subject.drive(chunks)]


def same(found, expected):
    """Whether two rollouts are equal to the bit."""
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def ran(role):
    """Sum up the receipt: steps that were skipped, latents left out, actions of a role's sites."""
    chunks = current_report().chunks
    dropped = [one.plan.history_latents - len(one.plan.context.indices) for one in chunks]
    sites = {one.action for one in lipass.report().sites.values() if one.role == role}
    return [one.steps_skipped for one in chunks], dropped, sites


@block_of("docs/models/hy-worldplay.md")
def test_lines_of_hy_worldplay_run(built, compiles, code, capsys):
    subject = built(hy_worldplay)
    expected = rolled(subject)
    # the pipeline's own call records no gradients
    generate = torch.no_grad()(lambda pipe: subject.drive(4))
    exec(code, {"pipe": subject.pipeline, "generate": generate})
    assert compiles == [{"preset": "all"}]
    assert ran("decode") == ([0, 0, 2, 2], [0, 0, 0, 4], {"rewritten"})
    assert "adopted as hy_worldplay" in capsys.readouterr().out
    assert same(rolled(subject), expected)


@block_of("docs/models/self-forcing.md")
def test_lines_of_self_forcing_run(code, request):
    """In a process of their own: Dynamo keeps guards on modules by name, and other tests have one
    of that name."""
    if "LIPASS_TEST_APART" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", request.node.nodeid]
        told = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"LIPASS_TEST_APART": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout
        return
    _self_forcing_runs(*map(request.getfixturevalue, ("built", "compiles")), code, request)


def _self_forcing_runs(built, compiles, code, request):
    capsys = request.getfixturevalue("capsys")
    subject = built(self_forcing)
    pipe, model = subject.pipeline, subject.model

    @torch.no_grad()
    def one_block():
        torch.manual_seed(0)
        model._compiled_call_impl = None
        pipe.kv_cache1, pipe.crossattn_cache = new_caches(model)
        with lipass.adopt(model, family="any"):  # its attention asks for a GPU
            return pipe.inference(Given(1).noise, ["a prompt"])

    expected = one_block()
    pipe.kv_cache1, pipe.crossattn_cache = new_caches(model)
    names = {"pipe": pipe, "noise": Given(4).noise, "prompts": ["a prompt"]}
    with torch.enable_grad():  # the page switches them off for the whole process
        exec(code, names | {"w2c": there_and_back(4, 3)})
    assert compiles == [{"preset": "all"}]
    assert ran("decode") == ([0, 0, 2, 2], [0, 0, 0, 2], {"rewritten"})
    assert "adopted as self_forcing" in capsys.readouterr().out
    assert torch.equal(one_block(), expected)


@block_of("docs/models/matrix-game-3.md")
def test_lines_of_matrix_game_3_run(built, compiles, code, capsys, monkeypatch):
    turn = inverted(parse_trajectory("left-56, right-40", step_deg=1.5)).float()
    monkeypatch.setattr(matrix_game_3_rollout, "cameras", lambda frames: turn[:frames])
    subject = built(matrix_game_3)
    expected = rolled(subject)
    # as inside of its `generate`, which ends so
    generate = torch.no_grad()(lambda pipe: subject.drive(2) and sys.exit())
    exec(code, {"pipe": subject.pipeline, "generate": generate})
    assert [one["preset"] for one in compiles] == ["all"]
    assert ran("self") == ([0, 1], [0, 6], {"rewritten"})
    assert "adopted as matrix_game_3" in capsys.readouterr().out
    assert same(rolled(subject), expected)


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
@block_of("docs/models/lingbot-world.md")
def test_lines_of_lingbot_world_run(built, compiles, code, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(lingbot_world, "CLIP", 21)
    monkeypatch.setattr(lingbot_world, "_FRAMES", 81)
    subject = built(lingbot_world)
    expected = rolled(subject)
    c2w = inverted(there_and_back(3, 21)).numpy()
    walks = [tmp_path / f"{i}" for i in range(3)]
    for i, walk in enumerate(walks):
        walk.mkdir()
        np.save(walk / "intrinsics.npy", np.array([[300.0, 300.0, 416.0, 240.0]]))
        np.save(walk / "poses.npy", np.repeat(c2w[21 * i : 21 * (i + 1)], 4, 0)[:81])
    small = {"max_area": 64 * 128, "sampling_steps": 4, "seed": 0}
    pipe = subject.pipeline
    pipe.generate = functools.partial(pipe.generate, **small)
    names = {"pipe": pipe, "walks": walks, "prompt": "a prompt", "image": torch.zeros(3, 64, 128)}
    exec(code, names)
    assert [one["preset"] for one in compiles] == ["all", "all"]
    assert ran("self") == ([0, 0, 2], [0, 0, 0], {"rewritten"})
    assert "adopted as lingbot_world" in capsys.readouterr().out
    assert same(rolled(subject), expected)


@block_of("docs/models/open-oasis.md")
def test_lines_of_open_oasis_run(built, compiles, code, capsys):
    subject = built(open_oasis)
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 1, 16, 8, 16, generator=draw)
    actions = torch.randn(1, 5, 25, generator=draw)

    def denoise(model, context, context_actions, level):
        x = torch.randn(1, 1, 16, 8, 16, generator=draw)
        levels = torch.full((1, context.shape[1] + 1), level)
        return model(torch.cat([context, x], 1), levels, context_actions)[:, -1:]

    def own():
        with torch.no_grad():
            return list(subject.rollout(subject.model, None, 2))

    expected = own()
    names = {"model": subject.model, "x": frames, "actions": actions, "denoise": denoise}
    exec(code, names)
    assert [one["preset"] for one in compiles] == ["context"]
    assert ran("other") == ([0] * 4, [0, 0, 1, 2], {"kept"})
    assert "adopted as open_oasis" in capsys.readouterr().out
    names["adoption"].undo()
    assert same(own(), expected)


@pytest.fixture
def pipe(monkeypatch, alone):
    """Return a pipeline of Wan with a small transformer, which knows one prompt."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(ROOT / "tests/models"))
    import zoo

    class Small(diffusers.WanPipeline):
        def __call__(self, prompt, num_frames):
            words = {"prompt_embeds": states[prompt], "negative_prompt_embeds": states[""]}
            size = {"height": 32, "width": 48, "num_inference_steps": 4}
            seed = torch.Generator().manual_seed(0)
            return super().__call__(
                num_frames=num_frames, output_type="latent", generator=seed, **words, **size
            )

    states = {prompt: torch.randn(1, 7, 16) for prompt in ("", "a street")}
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    model, _ = zoo.wan()
    pipe = Small(None, None, None, scheduler, transformer=model.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@block_of("docs/models/diffusers.md", 0)
def test_attention_of_a_pipeline_becomes_sparse(pipe, compiles, code, capsys):
    with registry.force("sparse"):  # this small it is not worth it
        exec(code, {"pipe": pipe, "prompt": "a street"})
    assert compiles == [{"preset": "sparse"}]
    sites = [one for one in lipass.report().sites.values() if one.role == "self"]
    assert [one.action for one in sites] == ["rewritten"] * 2
    assert all(one.density < 1 for one in sites)
    assert "attn1" in capsys.readouterr().out


@block_of("docs/models/diffusers.md", 1)
def test_clips_of_a_pipeline_that_come_back_reuse_steps(pipe, compiles, code):
    w2c = there_and_back(3, 21)
    clips = [(w2c[:i] if i else None, w2c[i : i + 21], "a street") for i in (0, 21, 42)]
    # the page has imported both in its block above
    exec(code, {"torch": torch, "lipass": lipass, "pipe": pipe, "clips": clips})
    assert compiles == [{"preset": "all", "chunk_latents": 21}]
    chunks = list(current_report().chunks)
    assert [one.steps_skipped for one in chunks] == [0, 0, 2]
    assert [one.lookups for one in chunks] == [0, 0, 4]  # two branches of guidance
    assert [one.misses for one in chunks] == [0, 0, 0]


@block_of("docs/poses.md")
def test_cameras_of_blender_choose_what_ours_do(code, capsys):
    exec(code, {})
    w2c = parse_trajectory("w-6, right-12, w-6")
    chunk = lipass.Session(preset="context").chunk(poses=w2c[:20], query=w2c[20:24])
    with chunk:
        assert 0 < len(chunk.context) < 20
        assert capsys.readouterr().out == f"{chunk.context}\n"


@block_of("docs/events.md")
def test_events_of_a_rollout_are_lines_of_a_file(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_model, "ROWS", 4)
    monkeypatch.setattr(own_model, "COLUMNS", 4)
    names = {"model": own_model.World().eval(), "w2c": parse_trajectory("left-7")}
    exec(code, {"lipass": lipass, "roll_out": own_model.roll_out, **names})
    events = [json.loads(line)["name"] for line in Path("events.jsonl").read_text().splitlines()]
    assert events == ["lipass.session.start", *["lipass.chunk"] * 2, "lipass.session.end"]


def walk_to_be_stopped(monkeypatch, folder):
    """Names that the page of snapshots takes for granted, in a folder of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(own_model, "ROWS", 4)
    monkeypatch.setattr(own_model, "COLUMNS", 4)
    torch.manual_seed(0)
    names = {
        "model": own_model.World(width=32).eval(),
        "w2c": parse_trajectory("left-20, right-23"),
    }
    return {"lipass": lipass, "roll_out": own_model.roll_out, **names}


@block_of("docs/snapshots.md")
def test_session_is_stopped_and_its_file_has_the_history(code, monkeypatch, tmp_path):
    names = walk_to_be_stopped(monkeypatch, tmp_path)
    exec(code, names)
    snapshot = lipass.Snapshot.load("walk.safetensors")
    assert torch.equal(snapshot.carried["history"], names["history"])
    assert [plan.index for plan in snapshot.plans] == list(range(10))


@block_of("docs/snapshots.md", 1)
def test_session_goes_on_from_its_file(code, monkeypatch, tmp_path):
    names = walk_to_be_stopped(monkeypatch, tmp_path)
    w2c, going = names["w2c"], []
    with lipass.Session(preset="all") as session:
        history = own_model.roll_out(names["model"], w2c[:40], session)
        carry = {"history": history}
        session.snapshot(model=names["model"], carry=carry).save("walk.safetensors")

    def go_on(model, history, w2c, session):
        latents = history[0].transpose(0, 1)
        with session.chunk(poses=w2c[:40], query=w2c[40:], latents=latents) as chunk:
            going.append(chunk.index)

    exec(code, names | {"go_on": go_on})
    assert going == [10]


@block_of("kernels/block_sparse/README.md")
def test_a_plan_of_blocks_reads_fewer_keys(code):
    names = {}
    exec(code, names)
    q, keys = names["q"], torch.cat(names["keys"], 2)
    assert names["out"].shape == q.shape
    assert (names["lse"] < (q @ keys.mT / 8).logsumexp(-1)).all()
    assert names["plan"].density() < 0.5


def test_ten_lines_are_about_ten():
    pages = [page for page in PAGES if "## Ten lines" in page.read_text(encoding="utf-8")]
    assert len(pages) == 5
    for code, *_ in map(code_of, pages):
        assert len([line for line in code.splitlines() if line]) <= 15


def test_every_block_is_run_by_a_test():
    import test_blocks  # noqa: F401
    import test_eval_blocks  # noqa: F401
    import test_stages_blocks  # noqa: F401

    wanted = set().union(*map(written, PAGES))
    assert wanted == RUN
