"""Matrix-Game-3.0: clips with memory, past and new latents in one sequence, in one graph each."""

import gc
import itertools
import sys
import types
from pathlib import Path

import pytest
import torch

import lipass
from lipass.adapters.checkouts import matrix_game_3_rollout
from lipass.adapters.checkouts.examine import counted, options_of
from lipass.adapters.checkouts.matrix_game_3 import build
from lipass.adapters.checkouts.subject import Ran
from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.policy.convention import inverted
from lipass.policy.reference_matrixgame import gate_clip
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report

CONTRACT = Path(__file__).parent / "contracts" / "matrix_game_3"
VIEW = {"chunk_latents": 10, "hfov_deg": 90.0, "vfov_deg": 90.0, "far": 30.0}
OWN = {**VIEW, "context.window_latents": 4}


@pytest.fixture
def subject(monkeypatch, fresh_dynamo):
    """Yield a model with the call structure of the release, as a checkout of it would give."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    before = {name for name in sys.modules if _is_of_checkout(name)}
    hidden = {name: sys.modules.pop(name) for name in before}
    yield build(CONTRACT, layers=1)
    for name in [name for name in sys.modules if _is_of_checkout(name)]:
        del sys.modules[name]
    sys.modules.update(hidden)


def _is_of_checkout(name):
    return name.partition(".")[0] in ("wan", "utils", "pipeline")


def compiled(subject, preset, **more):
    options = {**options_of(subject, preset, **more), "inner": "eager"}
    return torch.compile(subject.model, backend="light_interaction", options=options)


def rolled(subject, model, chunks, session=None):
    with torch.no_grad():
        return list(subject.rollout(model, session, chunks))


def test_exact_equals_the_model_in_two_graphs_with_its_rays_once_a_clip(subject):
    expected = rolled(subject, subject.model, 4)
    with lipass.adopt(subject.model), lipass.Session(preset="exact") as session:
        actual = rolled(subject, compiled(subject, "exact", counted_writes=True), 4, session)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    # the first clip has no memory, the others share one
    assert current_report().graphs == 2
    assert not current_report().left_eager
    # what only the rays determine is computed once a clip, and kept for its other two steps
    report = current_report()
    assert (report.invariants_computed, report.invariants_kept) == (4, 8)


@pytest.mark.slow
def test_full_budget_equals_the_model(subject):
    expected = rolled(subject, subject.model, 2)
    with lipass.adopt(subject.model):
        actual = rolled(subject, compiled(subject, "sparse", **{"sparse.budget": 1.0}), 2)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_all_leaves_out_memory_steps_and_blocks_and_counts_them_truly(subject):
    two = {"context.sink_latents": 2}  # one latent of memory would be a graph of its own
    options = options_of(subject, "all", **two)
    with lipass.adopt(subject.model), registry.force("sparse"):
        model = compiled(subject, "all", verify="off", **two)
        with lipass.Session(**options) as session:
            rolled(subject, model, 3, session)
        graphs = current_report().graphs
        with lipass.Session(**options) as session:
            ran = counted(subject, lambda: rolled(subject, model, 3, session))
    records = list(current_report().chunks)[-3:]
    said = [subject.expected(record) for record in records]
    assert ran == Ran(sum(one.calls for one in said), sum(one.latents for one in said))
    assert [one.steps_skipped for one in records] == [0, 0, 1]
    assert all(one.plan.history_latents > len(one.plan.context.indices) for one in records[2:])
    sites = [site for site in lipass.report().sites.values() if site.role == "self"]
    assert len(sites) == 1
    assert all(site.action == "rewritten" and site.density < 1 for site in sites)
    assert current_report().graphs == graphs


def test_what_was_adopted_comes_back_bit_for_bit(subject):
    expected = rolled(subject, subject.model, 2)
    adoption = lipass.adopt(subject.model)
    assert adoption.family == "matrix_game_3"
    places = {change.where.partition(":")[0] for change in adoption.changes}
    assert places == {"attention.py", "model.py", "action_module.py", "posemb_layers.py"}
    adopted = rolled(subject, subject.model, 2)
    adoption.undo()
    again = rolled(subject, subject.model, 2)
    for first, second, third in zip(expected, adopted, again, strict=True):
        torch.testing.assert_close(second, first, atol=1e-4, rtol=0)
        assert torch.equal(third, first)


def test_a_model_of_a_class_below_the_release_is_adopted_as_it_is(subject):
    with lipass.adopt(subject.model) as adoption:
        expected = [one.name for one in adoption.changes]
    own = {"__module__": "a_users_file"}  # not this one, in whose package other tests lie
    subject.model.__class__ = type("Own", (type(subject.model),), own)
    with lipass.adopt(subject.model) as adoption:
        assert [one.name for one in adoption.changes] == expected


def test_what_stays_hidden_is_said_with_its_place(subject):
    class Int8Linear(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    attention = subject.model.blocks[0].self_attn
    attention.q = Int8Linear(48, 48)
    attention.forward = types.MethodType(type(attention).forward, attention)
    hidden = torch._dynamo.config.patch(suppress_errors=True)
    with hidden, lipass.adopt(subject.model) as adoption:
        lints = {one.name: one.where.partition(":")[0] for one in adoption.lints}
    assert lints == {
        "forward": "model.py",
        "Int8Linear": "test_matrix_game_3.py",
        "suppress_errors": "test_matrix_game_3.py",  # a package of its classes too
    }


def test_fewer_latents_of_memory_are_fewer_rows(subject):
    seen = []
    blocks = subject.model.blocks
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    rolled(subject, subject.model, 2)
    padded, seen[:] = list(seen), []
    with lipass.adopt(subject.model):
        rolled(subject, subject.model, 2)
    assert set(padded) == {20 * 24}
    assert seen == [15 * 24] * 3 + [(5 + 14) * 24] * 3


@pytest.fixture
def walk(subject, monkeypatch):
    """Yield what generates clips of a walk: latents, and which of them each clip remembered."""
    c2w = inverted(parse_trajectory("left-116, right-101", step_deg=1.5))
    monkeypatch.setattr(matrix_game_3_rollout, "cameras", lambda frames: c2w[:frames].float())

    def generate(clips):
        read = {}

        def remember(_, args, given):
            memory = given.get("memory_latent_idx")
            if memory is not None:
                read[int(given["predict_latent_idx"][0])] = [int(latent) for latent in memory]

        hook = subject.model.register_forward_pre_hook(remember, with_kwargs=True)
        with torch.no_grad():
            made = subject.drive(clips)
        hook.remove()
        return torch.cat(made, 2), list(read.values())

    generate.c2w = c2w
    generate.pipe = subject.pipeline
    return generate


def driven(walk, clips, **options):
    with (
        lipass.adopt(walk.pipe) as adoption,
        lipass.Session(**options) as session,
        adoption.drive(session),
    ):
        return walk(clips)


def test_a_driven_rollout_that_leaves_nothing_out_is_the_released_one(walk):
    expected, memory = walk(3)
    actual, read = driven(walk, 3, preset="off")
    assert read == memory
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert walk(1)[0].shape[2] == 15  # and it is undone


def test_memory_of_the_released_gate_is_read_once_each_and_the_sink_last(walk):
    _, read = driven(walk, 5, preset="reference-matrix-game", convention="c2w")
    cameras = inverted(walk.c2w)
    for clip, memory in enumerate(read, 1):
        gate = gate_clip(cameras, clip)
        assert sorted(memory) == sorted(set(gate.latents))
        assert memory[-1] == 1
    plans = [record.plan for record in current_report().chunks]
    assert [plan.revisit.allowed for plan in plans] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("convention", ["c2w", "w2c"])
def test_memory_of_our_own_policy_is_what_the_receipt_says(walk, convention):
    options = {**OWN, "preset": "context", "convention": convention}
    _, read = driven(walk, 5, **options)
    records = list(current_report().chunks)
    assert len(records) == 5
    for memory, record in zip(read, records[1:], strict=True):
        past = range(record.plan.history_latents - 4, record.plan.history_latents)
        chosen = [index + 1 for index in record.plan.context.indices if index not in past]
        assert sorted(memory) == chosen
        assert len(memory) <= 4


@pytest.mark.slow
def test_steps_of_a_driven_rollout_are_answered_and_its_scheduler_steps_each(walk, monkeypatch):
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler as Scheduler

    taken, step = [], Scheduler.step
    monkeypatch.setattr(
        Scheduler, "step", lambda *args, **kw: taken.append(0) or step(*args, **kw)
    )
    options = {**VIEW, "preset": "cache"}
    fast = {**options, "inner": "eager", "verify": "off"}
    walk.pipe.model.compile(backend="light_interaction", options=fast)
    driven(walk, 4, convention="c2w", **options)
    records = list(current_report().chunks)
    assert len(taken) == 4 * 3
    assert [record.steps_skipped for record in records] == [0, 0, 0, 1]
    assert [record.lookups for record in records] == [0, 0, 0, 1]


def test_a_session_takes_several_rollouts_each_a_stream_of_its_own(walk):
    options = {**OWN, "preset": "context", "convention": "c2w"}
    with lipass.adopt(walk.pipe) as adoption, lipass.Session(**options) as session:
        with adoption.drive(session):
            first, again = walk(2)[0], walk(2)[0]
        with adoption.drive(session):
            walk(1)
    streams = [record.plan.stream for record in current_report().chunks]
    assert streams == ["main"] * 2 + ["main-2"] * 2 + ["main-3"]
    assert torch.equal(first, again)


def test_a_clip_that_failed_is_no_chunk_of_the_next_rollout(walk, monkeypatch):
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler as Scheduler

    calls, step, failed = itertools.count(), Scheduler.step, []

    def once(*given, **named):
        call = next(calls)
        if call == 4:  # in the second clip
            raise ZeroDivisionError
        if call == 4 + 2:  # what failed is let go of in the first clip behind it
            failed.clear()
            gc.collect()
        return step(*given, **named)

    monkeypatch.setattr(Scheduler, "step", once)
    options = {**OWN, "preset": "context", "convention": "c2w"}
    with (
        lipass.adopt(walk.pipe) as adoption,
        lipass.Session(**options) as session,
        adoption.drive(session),
    ):
        try:
            walk(2)
        except ZeroDivisionError as error:
            failed.append(error)  # it keeps the loop, as a notebook does
        made, _ = walk(2)
        assert not session.open_chunks
    plans = [(one.plan.stream, one.plan.index) for one in current_report().chunks]
    assert plans == [("main", 0), ("main-2", 0), ("main-2", 1)]
    assert torch.equal(made, driven(walk, 2, **options)[0])


def test_a_session_that_cannot_choose_for_it_is_refused(walk):
    with pytest.raises(LipassError, match="OpenCV axes, got a session of w2c-opengl"):
        driven(walk, 1, preset="off", convention="opengl")
    mixed = {**OWN, "context.mode": "matrix-game"}
    with pytest.raises(ValueError, match="must both be 'matrix-game' or none"):
        driven(walk, 1, preset="all", **mixed)
