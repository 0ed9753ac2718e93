"""HY-WorldPlay's call structure, in miniature: adopted, compiled, driven, counted, undone."""

import re
import sys
from pathlib import Path

import pytest
import torch

import lipass
from lipass.adapters.checkouts import examine
from lipass.adapters.checkouts.hy_worldplay import CHUNK, build, expected, latents_embedded
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Ran
from lipass.adapters.driving import cameras_of
from lipass.policy.reference_worldplay import gate_chunk
from lipass.receipt import report, reset_report

CONTRACT = Path(__file__).parent / "contracts" / "hy_worldplay"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Calls this small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subject():
    """Yield one layer of the miniature, and forget its code behind the tests."""
    before = set(sys.modules)
    yield build(CONTRACT, layers=1)
    sys.path.remove(str(CONTRACT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "hyvideo"]:
        if name not in before:
            del sys.modules[name]


@pytest.fixture
def adoption(subject):
    with lipass.adopt(subject.pipeline) as adopted:
        yield adopted


def counted(subject, run):
    """Run something, and count the calls over latents by a hook."""
    calls = []
    hook = subject.model.img_in.register_forward_hook(
        lambda module, given, out: calls.append(given[0].shape[2])
    )
    with torch.no_grad():
        latents = list(run())
    hook.remove()
    return torch.cat(latents, 2), calls


def said(chunks):
    """What the receipt says of the latest chunks."""
    parts = [expected(one) for one in list(report().chunks)[-chunks:]]
    return Ran(sum(one.calls for one in parts), sum(one.latents for one in parts))


@pytest.mark.parametrize("preset", ["exact", "cache", "all"])
def test_the_loop_of_a_user_and_the_driven_rollout_do_the_same(subject, adoption, preset):
    options = examine.options_of(subject, preset)
    with lipass.Session(**options) as session:
        own, calls = counted(subject, lambda: subject.rollout(subject.model, session, 5))
    assert said(5) == Ran(len(calls), sum(calls))
    with lipass.Session(**options) as session, adoption.drive(session) as bound:
        driven, driven_calls = counted(subject, lambda: subject.drive(5))
        assert [one.name for one in bound.changes] == [
            "select_aligned_memory_frames",
            "_ar_rollout_inner",
        ]
    assert said(5) == Ran(len(calls), sum(calls))
    assert driven_calls == calls
    assert torch.equal(driven, own)
    released, _ = counted(subject, lambda: subject.drive(5))
    assert torch.equal(released, own) == (preset == "exact")


def test_a_rollout_that_fails_leaves_a_session_that_goes_on(subject, adoption, monkeypatch):
    with lipass.Session(**examine.options_of(subject, "all")) as session, adoption.drive(session):
        with monkeypatch.context() as broken, torch.no_grad():
            broken.setattr(subject.pipeline.scheduler, "step", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                subject.drive(2)
        assert not session.open_chunks
        with torch.no_grad():
            assert len(list(subject.drive(2))) == 2


def plans(subject, adoption, chunks, **options):
    """Roll out in a session, and return what was chosen for the latest chunks."""
    given = {**examine.options_of(subject, "all"), **options}
    with lipass.Session(**given) as session, adoption.drive(session), torch.no_grad():
        subject.drive(chunks)
    records = list(report().chunks)[-chunks:]
    return [(one.plan.context.indices, one.plan.steps.reused) for one in records]


def test_cameras_of_the_pipeline_are_known_in_a_session_of_either_direction(subject, adoption):
    expected = plans(subject, adoption, 5)
    assert any(reused for _, reused in expected)
    assert plans(subject, adoption, 5, convention="c2w") == expected
    with pytest.raises(lipass.LipassError, match="OpenCV axes, got a session of w2c-opengl"):
        plans(subject, adoption, 1, convention="opengl")


def test_samples_of_other_cameras_are_refused():
    session, cameras = lipass.Session(preset="off"), torch.eye(4).repeat(2, 3, 1, 1)
    assert cameras_of(session, cameras).shape == (3, 4, 4)
    cameras[1, 2, 0, 3] = 1
    with pytest.raises(lipass.LipassError, match="other ones for sample 1 of 2; roll out"):
        cameras_of(session, cameras)


def test_a_session_takes_several_rollouts_each_a_stream_of_its_own(subject, adoption):
    with lipass.Session(**examine.options_of(subject, "all")) as session, torch.no_grad():
        with adoption.drive(session):
            first, again = subject.drive(3), subject.drive(3)
        with adoption.drive(session):
            last = subject.drive(2)
    records = list(report().chunks)[-8:]
    assert [one.plan.stream for one in records] == ["main"] * 3 + ["main-2"] * 3 + ["main-3"] * 2
    assert all(map(torch.equal, first, again))
    assert len(last) == 2


def test_the_keys_of_the_last_context_are_let_go_before_the_next(subject, adoption):
    held = []
    own = subject.model.forward_vision

    def watching(*args, **given):
        if given["cache_vision"]:
            held.append(given["kv_cache"][0]["k_vision"])
        return own(*args, **given)

    adoption.rebind(subject.model, "forward_vision", watching, "a test")
    with lipass.Session(preset="exact") as session, adoption.drive(session), torch.no_grad():
        subject.drive(4)
    assert held == [None] * 3
    with torch.no_grad():
        subject.drive(3)
    assert [one is None for one in held[3:]] == [True, False]


def test_sage_attention_is_a_lint_and_compilation_of_single_blocks_is_off(subject):
    from hyvideo.commons import infer_state

    state = infer_state.InferState(True, (0, 1), True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(vars(infer_state), "__infer_state", state)
        with lipass.adopt(subject.model) as adoption:
            (lint,) = adoption.lints
            assert "blocks 0, 1 call sageattention" in lint.why
            assert lint.where.startswith("attention.py:")
            assert not state.enable_torch_compile
            assert "left: attention.py:" in adoption.table()
        assert state.enable_torch_compile


def test_states_that_nobody_has_made_are_made_for_one_process(subject):
    from hyvideo.commons import infer_state, parallel_states

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(vars(infer_state), "__infer_state", None)
        patched.setitem(vars(parallel_states), "__parallel_dims", None)
        with pytest.raises(RuntimeError, match="no mesh"):
            parallel_states.get_parallel_state()
        with lipass.adopt(subject.model) as adoption, torch.no_grad():
            places = {one.where for one in adoption.changes if one.name.startswith("__")}
            assert places == {"infer_state.py", "parallel_states.py"}
            assert len(list(subject.rollout(subject.model, None, 1))) == 1
        assert infer_state.get_infer_state() is None


def test_chunks_of_eight_latents_are_one_decision(subject, adoption):
    pipeline = subject.pipeline
    pipeline.chunk_latent_frames = 2 * CHUNK
    options = {**examine.options_of(subject, "all"), "chunk_latents": 2 * CHUNK}
    try:
        with lipass.Session(**options) as session, adoption.drive(session):
            _, calls = counted(subject, lambda: subject.drive(4))
    finally:
        pipeline.chunk_latent_frames = CHUNK
    records = list(report().chunks)[-2:]
    assert [one.plan.history_latents for one in records] == [0, 8]
    assert calls[-1] == 8


@pytest.fixture(scope="module")
def compiled(subject):
    """Return the miniature compiled under `all`, and how it was rolled out."""
    with torch.no_grad(), lipass.adopt(subject.model):
        return examine._rolled(subject, "all", "eager", session=True, chunks=5)


def test_a_rollout_under_all_leaves_out_what_its_receipt_counts(subject, compiled):
    checks = list(examine._truths(subject, compiled))
    assert [one for one in checks if not one.holds] == []
    assert "12 of 40" in checks[1].seen
    assert compiled.looked_up == compiled.ran


def test_no_graph_is_made_behind_the_third_chunk(compiled):
    assert examine._bounded(compiled).holds
    assert compiled.graphs[-1] <= 7


def test_every_call_of_latents_is_a_site_of_its_role(compiled):
    # Of the last layer a prefill only keeps keys, so of one layer it has no attention.
    roles = {one.role: one.segments for one in compiled.receipt.sites.values()}
    assert roles["decode"] == ("text", "history", "current")
    assert roles["self"] == ("text", "current")


def test_exact_equals_the_untouched_model_over_four_chunks(subject, fresh_dynamo):
    with torch.no_grad():
        untouched = list(subject.rollout(subject.model, None, 4))
        with lipass.adopt(subject.model):
            options = {"preset": "exact", "inner": "eager"}
            fast = torch.compile(
                subject.model, backend="light_interaction", options=options, dynamic=True
            )
            found = list(subject.rollout(fast, None, 4))
        again = list(subject.rollout(subject.model, None, 4))
    torch.testing.assert_close(torch.cat(found, 2), torch.cat(untouched, 2), rtol=0, atol=1e-5)
    assert all(map(torch.equal, untouched, again))


def test_undo_puts_back_the_very_objects(subject):
    from hyvideo.models.transformers import worldplay_1_5_transformer as code

    before = dict(vars(code)), dict(vars(subject.model))
    adoption = lipass.adopt(subject.pipeline)
    assert vars(code) != before[0]
    places = [one.where for one in adoption.changes]
    assert all(re.fullmatch(r"\w+\.py:\d+", place) for place in places)
    adoption.undo()
    assert all(vars(code)[name] is found for name, found in before[0].items())
    assert vars(subject.model).keys() == before[1].keys()
    assert subject.model.attn_param is before[1]["attn_param"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_adoptions_are_undone_in_any_order(subject, monkeypatch, order):
    from hyvideo.commons import infer_state, parallel_states
    from hyvideo.models.transformers import worldplay_1_5_transformer as code

    state = infer_state.InferState(False, (), True)
    monkeypatch.setitem(vars(infer_state), "__infer_state", state)
    monkeypatch.setitem(vars(parallel_states), "__parallel_dims", None)
    before = dict(vars(code)), dict(vars(subject.model))
    adoptions = [lipass.adopt(subject.pipeline) for _ in order]
    adoptions[order[0]].undo()
    assert not state.enable_torch_compile
    with lipass.Session(preset="exact") as session, adoptions[order[1]].drive(session):
        assert len(counted(subject, lambda: subject.drive(2))[1]) > 0
    adoptions[order[1]].undo()
    assert state.enable_torch_compile
    assert vars(parallel_states)["__parallel_dims"] is None
    assert all(vars(code)[name] is found for name, found in before[0].items())
    assert vars(subject.model).keys() == before[1].keys()
    assert subject.model.attn_param is before[1]["attn_param"]


def test_the_released_gates_choose_what_the_preset_reference_reads(subject, adoption):
    reset_report()
    options = {"preset": "reference", "chunk_latents": CHUNK}
    with lipass.Session(**options) as session, adoption.drive(session):
        _, calls = counted(subject, lambda: subject.drive(6))
    w2c = there_and_back(6, CHUNK).double()
    for record in report().chunks:
        start = record.plan.history_latents
        gate = gate_chunk(w2c[:start], w2c[start : start + CHUNK])
        assert record.plan.context.indices == list(gate.indices)
        assert bool(record.plan.steps.reused) == gate.reuse
        assert record.plan.steps.form == "lookup"
    assert sum(calls) > 0


def test_a_rollout_that_nobody_knows_is_not_driven(subject):
    with (
        lipass.adopt(subject.model) as adoption,
        lipass.Session(preset="all") as session,
        pytest.raises(lipass.LipassError, match="a rollout must be known to be driven"),
        adoption.drive(session),
    ):
        pass


def test_one_operator_a_call_is_counted():
    assert latents_embedded("aten::conv3d", [[1, 17, 4, 8, 8], [64, 17, 1, 1, 1]]) == 4
    assert latents_embedded("aten::convolution", [[1, 17, 4, 8, 8]]) is None
