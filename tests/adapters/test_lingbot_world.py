"""LingBot-World: clips whose latents all attend to each other, two models, cameras as rays."""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import lipass
from lipass.adapters.checkouts.examine import counted, examine, options_of
from lipass.adapters.checkouts.lingbot_world import CLIP, OPTIONS, STEPS, build, own_rollout
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Ran
from lipass.adapters.clips import Clips
from lipass.adapters.driving import module_of
from lipass.kernels import registry
from lipass.policy.convention import inverted
from lipass.receipt import current_report

CONTRACT = Path(__file__).parent / "contracts" / "lingbot_world"
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")


@pytest.fixture
def subject(monkeypatch, fresh_dynamo):
    """Yield a model with the call structure of the release, as a checkout of it would give."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_of_checkout(name)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # calls this small take longer to share than to compute
    yield build(CONTRACT, layers=1)
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if _is_of_checkout(name)]:
        del sys.modules[name]
    sys.modules.update(hidden)


def _is_of_checkout(name):
    return name.partition(".")[0] == "wan"


def compiled(subject, preset, **more):
    options = {**options_of(subject, preset, **more), "inner": "eager"}
    return torch.compile(subject.model, backend="light_interaction", options=options)


def rolled(subject, model, chunks, session=None):
    with torch.no_grad():
        return list(subject.rollout(model, session, chunks))


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_everything_an_examination_asks_for_holds(subject):
    found = examine(subject)
    assert [(one.name, one.seen) for one in found.checks if not one.holds] == []
    assert [one.name for one in found.checks if "frames" in one.name] == []


def test_exact_equals_the_model_in_two_graphs_with_its_rays_once_a_clip(subject):
    expected = rolled(subject, subject.model, 2)
    with lipass.adopt(subject.model) as adoption, lipass.Session(preset="exact") as session:
        assert adoption.family == "lingbot_world"
        fast = compiled(subject, "exact", counted_writes=True)
        close(rolled(subject, fast, 2, session), expected)
    report = current_report()
    # prompts of two lengths
    assert (report.graphs, report.left_eager) == (2, [])
    # both branches of guidance and all steps share what only the rays determine
    assert report.invariants_computed < report.invariants_kept
    close(rolled(subject, subject.model, 2), expected)


def test_all_leaves_out_steps_and_blocks_and_counts_them_truly(subject):
    options = options_of(subject, "all")
    with lipass.adopt(subject.model), registry.force("sparse"):
        fast = compiled(subject, "all", verify="off")
        rolled(subject, fast, 1)  # compiling runs operators too
        with lipass.Session(**options) as session:
            ran = counted(subject, lambda: rolled(subject, fast, 3, session))
    records = list(current_report().chunks)[-3:]
    said = [subject.expected(record) for record in records]
    assert ran == Ran(sum(one.calls for one in said), sum(one.latents for one in said))
    assert [one.steps_skipped for one in records] == [0, 0, 2]
    (site,) = [one for one in lipass.report().sites.values() if one.role == "self"]
    assert (site.action, site.grid) == ("rewritten", (4, 4, 8))
    assert site.density < 1
    assert current_report().graphs == 2


@pytest.fixture
def folder():
    """Yield a folder of cameras as the release reads it, and what writes a clip's into it."""
    c2w = inverted(there_and_back(3, CLIP)).numpy()
    with tempfile.TemporaryDirectory() as name:
        np.save(Path(name) / "intrinsics.npy", np.array([[300.0, 300.0, 416.0, 240.0]]))

        def point(clip):
            frames = np.repeat(c2w[clip * CLIP : (clip + 1) * CLIP], 4, 0)
            np.save(Path(name) / "poses.npy", frames)

        yield name, point


def generate(pipe, folder, clip, **more):
    name, point = folder
    point(clip)
    given = {"action_path": name, "max_area": 64 * 128, "frame_num": 13, "sampling_steps": STEPS}
    return pipe.generate("a prompt", torch.zeros(3, 64, 128), **{**given, "seed": clip, **more})


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_driven_clip_that_leaves_nothing_out_is_the_released_one(subject, folder, solver):
    pipe = subject.pipeline
    expected = generate(pipe, folder, 1, sample_solver=solver)
    with (
        lipass.adopt(pipe) as adoption,
        lipass.Session(preset="off") as session,
        adoption.drive(session),
    ):
        found = generate(pipe, folder, 1, sample_solver=solver)
        assert generate(pipe, folder, 1, action_path=None).shape == found.shape
    close([found], [expected])
    assert len(current_report().chunks) == 2
    assert "generate" not in vars(pipe)


def test_a_clip_that_comes_back_reuses_steps_of_the_model_that_took_them(subject, folder):
    pipe, calls = subject.pipeline, []
    hook = subject.model.register_forward_pre_hook(lambda *_: calls.append(0))
    options = {"preset": "cache", "chunk_latents": CLIP}
    fast = {**options, "inner": "eager", "verify": "off"}
    subject.model.compile(backend="light_interaction", options=fast)
    try:
        with (
            lipass.adopt(pipe) as adoption,
            lipass.Session(convention="c2w", **options) as session,
            adoption.drive(session),
        ):
            for clip in range(3):
                generate(pipe, folder, clip)
    finally:
        subject.model._compiled_call_impl = None
        hook.remove()
    records = list(current_report().chunks)
    assert [one.plan.history_latents for one in records] == [0, CLIP, 2 * CLIP]
    assert [one.steps_skipped for one in records] == [0, 0, 2]
    assert [one.lookups for one in records] == [0, 0, 4]


def test_attention_between_processes_is_a_lint(subject):
    attention = subject.model.blocks[0].self_attn
    attention.forward = types.MethodType(type(attention).forward, attention)
    with lipass.adopt(subject.model) as adoption:
        assert [one.where.partition(":")[0] for one in adoption.lints] == ["model.py"]


def test_a_session_of_other_axes_is_refused(subject):
    with (
        lipass.adopt(subject.pipeline) as adoption,
        lipass.Session(preset="off", convention="opengl") as session,
        pytest.raises(lipass.LipassError, match="OpenCV axes, got a session of w2c-opengl"),
        adoption.drive(session),
    ):
        pass


def test_its_own_rollout_is_the_loop_of_the_examination(subject):
    with torch.no_grad():
        close(list(own_rollout(subject.pipeline, 2)), rolled(subject, subject.model, 2))
    assert OPTIONS["chunk_latents"] == CLIP


def test_a_clip_without_cameras_is_a_stream_of_its_own():
    levels = types.SimpleNamespace(timesteps=torch.tensor([1000.0, 500.0]), step=len)
    levels.sigmas = torch.tensor([1.0, 0.5, 0.0])

    def generate(c2w):
        if c2w is not None:
            clips.see(c2w)
        return [float(level) for level in clips.scheduler(lambda: levels)().timesteps]

    walk = inverted(there_and_back(2, CLIP))
    with lipass.Session(preset="cache", chunk_latents=CLIP) as session:
        clips = Clips(session)
        for c2w in (walk[:CLIP], walk[CLIP:], None, walk[:CLIP]):
            assert clips.run(generate, c2w) == [1000.0, 500.0]
        clips = Clips(session)
        assert clips.run(generate, walk[:CLIP]) == [1000.0, 500.0]
    plans = [record.plan for record in list(current_report().chunks)[-5:]]
    assert [one.stream for one in plans] == ["main", "main", "main-2", "main", "main-3"]
    assert [one.history_latents for one in plans] == [0, CLIP, 0, 2 * CLIP, 0]


@pytest.fixture
def files(monkeypatch):
    """Yield a release's file, and a user's that has imported all names of it."""
    made = [types.ModuleType(name) for name in ("its_release", "users_file")]
    for module in made:
        module.choose = len
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_names_are_bound_in_the_file_of_the_release_where_a_class_is_the_users(files):
    release, user = files
    released = type("Pipeline", (), {"__module__": release.__name__})
    own = type("Own", (released,), {"__module__": user.__name__})
    assert module_of(released(), "choose") is module_of(own(), "choose") is release
    with pytest.raises(lipass.LipassError, match=r"has choose, other, got users_file.Own; open"):
        module_of(own(), "choose", "other")


def test_a_pipeline_of_a_class_below_the_release_is_driven(subject, folder):
    own = object.__new__(type("Own", (type(subject.pipeline),), {}))
    vars(own).update(vars(subject.pipeline))
    expected = generate(own, folder, 1)
    with (
        lipass.adopt(own) as adoption,
        lipass.Session(preset="off") as session,
        adoption.drive(session),
    ):
        close([generate(own, folder, 1)], [expected])
    assert len(current_report().chunks) == 1
