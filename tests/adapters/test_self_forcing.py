"""Self-Forcing's call structure, in miniature: adopted, compiled, driven, counted, undone."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import lipass
from lipass.adapters.checkouts.examine import examine
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.self_forcing import OPTIONS, build
from lipass.adapters.checkouts.self_forcing_loop import CHUNK, Given, new_caches
from lipass.kernels import registry
from lipass.policy.convention import inverted
from lipass.receipt import report

CONTRACT = Path(__file__).parent / "contracts" / "self_forcing"
ROOTS = ("wan", "pipeline", "utils")


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
    yield build(CONTRACT, layers=1)
    sys.path.remove(str(CONTRACT))
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        del sys.modules[name]


@pytest.fixture
def pipeline(subject, fresh_dynamo):
    """Yield the pipeline, whose model is compiled by nobody before and behind the test."""
    subject.model.requires_grad_(False)
    yield subject.pipeline
    subject.model._compiled_call_impl = None


def _compile(pipeline, preset, **options):
    options = {"preset": preset, "inner": "eager", **options}
    pipeline.generator.model.compile(backend="light_interaction", options=options)


def _roll(pipeline, blocks=5, room=24, **given):
    """Run the pipeline from fresh caches; count the calls of each block by a hook."""
    calls = []
    hook = pipeline.generator.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["current_start"] // pipeline.frame_seq_length // CHUNK, kwargs["timestep"])
        ),
        with_kwargs=True,
    )
    model = pipeline.generator.model
    pipeline.kv_cache1, pipeline.crossattn_cache = new_caches(model)
    for layer in pipeline.kv_cache1:
        for name in ("k", "v"):
            layer[name] = layer[name][:, : room * pipeline.frame_seq_length].clone()
    torch.manual_seed(7)
    with contextlib.closing(_Closing(hook)):
        _, latents = pipeline.inference(Given(blocks).noise, ["x"], return_latents=True, **given)
    blocks_called = [block for block, _ in calls]
    return latents, [blocks_called.count(i) for i in range(max(blocks_called) + 1)], calls


class _Closing:
    def __init__(self, hook):
        self.close = hook.remove


@pytest.fixture
def untouched(pipeline):
    """Return a rollout as released, without adoption, in which nothing is compiled."""

    def roll(**given):
        with lipass.adopt(pipeline.generator.model, family="any"):
            return _roll(pipeline, **given)

    return roll


@pytest.mark.slow
def test_everything_an_examination_asks_for_holds(subject, fresh_dynamo):
    found = examine(subject)
    assert [(one.name, one.seen) for one in found.checks if not one.holds] == []
    places = {one.partition(":")[0] for one in found.changes}
    assert places == {"attention.py", "causal_model.py"}


def test_noise_is_added_at_the_level_of_the_next_computed_step(pipeline, monkeypatch):
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="cache", chunk_latents=CHUNK) as session,
        adoption.drive(session),
    ):
        driven, counts, calls = _roll(pipeline, poses=there_and_back(5, CHUNK))
    assert counts == [5, 5, 3, 3, 3]  # a refresh behind each block's steps
    assert all(float(level.max()) == 0 for block, level in calls[4::5][:2])
    chunks = list(report().chunks)[-5:]
    assert [one.plan.steps.total - one.steps_skipped + 1 for one in chunks] == counts
    by_hand = _with_levels_by_hand(pipeline, counts)
    assert torch.equal(driven, by_hand)


def _with_levels_by_hand(pipeline, counts):
    """Give the loop another list for each block that has fewer steps, as one would by hand."""
    full = pipeline.denoising_step_list
    lists = iter([full if count == 5 else full[[0, 3]] for count in counts])

    class Each:
        def __iter__(self):
            self.now = next(lists)
            return iter(self.now)

        def __len__(self):
            return len(self.now)

        def __getitem__(self, index):
            return self.now[index]

    pipeline.denoising_step_list = Each()
    try:
        with lipass.adopt(pipeline.generator.model, family="any"):
            return _roll(pipeline)[0]
    finally:
        pipeline.denoising_step_list = full


def test_a_rolled_cache_with_a_sink_is_exact_and_its_lost_latents_are_not_chosen(
    pipeline, untouched
):
    options = {**_of("context"), "context.memory_latents": 0}
    attention = pipeline.generator.model.blocks[0].self_attn
    attention.local_attn_size, attention.sink_size = 9, 1
    attention.max_attention_size = 9 * pipeline.frame_seq_length
    try:
        expected = untouched(room=9)[0]
        with lipass.adopt(pipeline) as adoption:
            _compile(pipeline, "context", **options)
            found = _roll(pipeline, room=9)[0]  # outside of sessions nothing is left out
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            with lipass.Session(preset="context", **options) as session, adoption.drive(session):
                _roll(pipeline, room=9, poses=there_and_back(5, CHUNK))
    finally:
        attention.local_attn_size, attention.sink_size = -1, 0
        attention.max_attention_size = 32760
    last = list(report().chunks)[-1]
    reasons = {frame.index: frame.reason for frame in last.plan.context.frames}
    assert [i for i, why in reasons.items() if "does not hold" in why] == list(range(1, 7))
    assert last.latents_read == len(last.plan.context.indices) == 4
    assert report().graphs <= 5
    assert not report().left_eager


def _of(section):
    return {
        key: value for key, value in OPTIONS.items() if key.startswith(section) or "." not in key
    }


def test_without_cameras_the_window_follows_the_latents(pipeline):
    with lipass.adopt(pipeline) as adoption:
        _compile(pipeline, "all", **OPTIONS)
        with lipass.Session(preset="all", **OPTIONS) as session, adoption.drive(session):
            _, counts, _ = _roll(pipeline)
    assert counts == [5, 5, 5, 5, 5]
    chunks = list(report().chunks)[-5:]
    assert [one.latents_read for one in chunks[2:]] == [4, 4, 4]
    assert chunks[-1].plan.revisit.reason == "no cameras, so no view is known to be seen again"
    assert registry.telemetry()["blocks.0.self_attn:decode"].dropped_latents > 0


def test_latents_that_were_given_are_history(pipeline):
    first = torch.randn(1, CHUNK, *Given(1).noise.shape[2:])
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="cache", chunk_latents=CHUNK, **{"steps.overlap_min": 0}) as session,
        adoption.drive(session),
    ):
        _, counts, _ = _roll(pipeline, blocks=2, initial_latent=first)
    assert counts == [1, 3, 3]
    assert [one.plan.history_latents for one in list(report().chunks)[-2:]] == [3, 6]


@pytest.mark.slow
def test_looked_up_steps_compute_and_are_counted_so(pipeline):
    options = {"chunk_latents": CHUNK, "steps.form": "lookup"}
    with lipass.adopt(pipeline) as adoption:
        _compile(pipeline, "cache", **options)
        with lipass.Session(preset="cache", **options) as session, adoption.drive(session):
            _, counts, _ = _roll(pipeline, blocks=3, poses=there_and_back(3, CHUNK))
    assert counts == [5] * 3
    last = list(report().chunks)[-1]
    assert last.plan.steps.reused == (1, 2)
    assert last.steps_skipped == 0


def test_cameras_that_the_model_takes_are_those_of_the_session(subject, fresh_dynamo, monkeypatch):
    """As in minWM, which attends from cameras too, with a cache of their own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = build(CONTRACT, layers=1, family="minwm", has_cameras=True)
    expected = list(made.rollout(made.model, None, 2))
    options = {"preset": "sparse", "inner": "eager", "sparse.budget": 1.0}
    made.model.requires_grad_(False).compile(backend="light_interaction", options=options)
    with (
        lipass.adopt(made.pipeline) as adoption,
        lipass.Session(preset="cache", chunk_latents=CHUNK) as session,
        adoption.drive(session),
    ):
        found = made.drive(3)
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [one.steps_skipped for one in list(report().chunks)[-3:]] == [0, 0, 2]
    sites = {name: site.action for name, site in report().sites.items() if site.role == "decode"}
    names = [f"blocks.0.self_attn#{i}:decode" for i in (1, 2)]
    assert sites == dict.fromkeys(names, "rewritten")


@pytest.mark.parametrize("by_position", [True, False])
def test_cameras_of_the_model_are_known_in_a_session_of_camera_to_world(
    subject, fresh_dynamo, monkeypatch, by_position
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = build(CONTRACT, layers=1, family="minwm", has_cameras=True)
    with (
        lipass.adopt(made.pipeline) as adoption,
        lipass.Session(preset="cache", chunk_latents=CHUNK, convention="c2w") as session,
        adoption.drive(session),
    ):
        if by_position:
            driven = made.pipeline.inference

            def inference(noise, text, *, return_latents, viewmats, Ks):
                return driven(noise, text, None, return_latents, viewmats, Ks)

            monkeypatch.setitem(vars(made.pipeline), "inference", inference)
        given, own = [], session.chunk
        monkeypatch.setattr(session, "chunk", lambda **told: given.append(told) or own(**told))
        made.drive(3)
    cameras = torch.cat([told["query"] for told in given])
    torch.testing.assert_close(inverted(cameras).float(), there_and_back(3, CHUNK))


def test_each_rollout_of_a_session_is_a_stream(pipeline):
    options = {"preset": "cache", "chunk_latents": CHUNK, "steps.overlap_min": 0}
    with lipass.adopt(pipeline) as adoption, lipass.Session(**options) as session:
        for _ in range(2):
            with adoption.drive(session):
                _roll(pipeline, blocks=2)
    streams = [one.plan.stream for one in list(report().chunks)[-4:]]
    assert streams == ["main"] * 2 + ["main-2"] * 2


def test_blocks_that_are_not_chunk_latents_long_are_refused_without_cameras_too(pipeline):
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="context", chunk_latents=CHUNK + 1) as session,
        adoption.drive(session),
        pytest.raises(ValueError, match="got 3 for chunk_latents 4; set chunk_latents to 3"),
    ):
        _roll(pipeline, blocks=3)


def test_too_few_cameras_are_refused_and_the_pipeline_goes_on(pipeline):
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="cache", chunk_latents=CHUNK) as session,
        adoption.drive(session),
    ):
        with pytest.raises(ValueError, match="poses must hold a camera for each latent"):
            _roll(pipeline, blocks=2, poses=there_and_back(1, CHUNK))
        assert _roll(pipeline, blocks=2, poses=there_and_back(2, CHUNK))[1] == [5, 5]


def test_all_is_put_back(pipeline, untouched):
    levels, model = pipeline.denoising_step_list, pipeline.generator.model
    expected, adoption = untouched()[0], lipass.adopt(pipeline)
    with (
        lipass.Session(preset="exact") as session,
        adoption.drive(session),
    ):
        _roll(pipeline)
    assert "forward" not in vars(pipeline.generator)
    assert "inference" not in vars(pipeline)
    assert pipeline.denoising_step_list is levels
    adoption.undo()
    assert "forward" not in vars(model)
    assert "__call__" not in vars(type(model))
    ends = [layer["global_end_index"] for layer in pipeline.kv_cache1]
    assert [end.tolist() for end in ends] == [[5 * CHUNK * pipeline.frame_seq_length]]
    assert torch.equal(untouched()[0], expected)


def names_of(pipeline):
    """What is bound to each name of the code, the classes and the objects of a pipeline."""
    model = pipeline.generator.model
    code = [one for name, one in sorted(sys.modules.items()) if name.startswith("wan.")]
    places = enumerate([*code, type(model), model, pipeline.generator, pipeline])
    found = {(i, name): one for i, place in places for name, one in vars(place).items()}
    return {key: one for key, one in found.items() if "cache" not in key[1]}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cell_that_adopts_and_is_run_twice_is_undone(pipeline, order):
    before = names_of(pipeline)
    adoptions = [lipass.adopt(pipeline) for _ in order]
    expected = _roll(pipeline, blocks=2)[0]
    first, last = (adoptions[i] for i in order)
    first.undo()
    with lipass.Session(preset="exact") as session, last.drive(session):
        assert torch.equal(_roll(pipeline, blocks=2)[0], expected)
    last.undo()
    ends = [layer["global_end_index"] for layer in pipeline.kv_cache1]
    assert [end.tolist() for end in ends] == [[2 * CHUNK * pipeline.frame_seq_length]]
    now = names_of(pipeline)
    assert [name for name in before | now if before.get(name) is not now.get(name)] == []


def test_ends_of_a_cache_made_under_inference_mode_are_put_back_outside_of_it(pipeline):
    adoption = lipass.adopt(pipeline)
    with torch.inference_mode():
        _roll(pipeline, blocks=1)
    adoption.undo()
    ends = [layer["global_end_index"] for layer in pipeline.kv_cache1]
    assert [end.tolist() for end in ends] == [[CHUNK * pipeline.frame_seq_length]]
    assert {(end.dtype, end.is_inference()) for end in ends} == {(torch.long, False)}


def test_the_model_alone_has_no_loop_to_drive(pipeline):
    with (
        lipass.adopt(pipeline.generator.model) as adoption,
        lipass.Session(preset="all") as session,
        pytest.raises(lipass.LipassError, match="a rollout must be known to be driven"),
        adoption.drive(session),
    ):
        pass


@pytest.mark.parametrize("name", ["kv_cache1", "denoising_step_list"])
def test_a_pipeline_that_rolls_out_otherwise_is_not_driven(pipeline, monkeypatch, name):
    # others have the file and class name of this transformer, and another loop around it
    monkeypatch.delattr(pipeline, name)
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="all", **OPTIONS) as session,
        pytest.raises(lipass.LipassError, match=f"got CausalInferencePipeline without {name}"),
        adoption.drive(session),
    ):
        pass


def test_attention_of_another_window_is_not_driven(pipeline, monkeypatch):
    monkeypatch.delattr(pipeline.generator.model.blocks[0].self_attn, "max_attention_size")
    with (
        lipass.adopt(pipeline) as adoption,
        lipass.Session(preset="all", **OPTIONS) as session,
        pytest.raises(lipass.LipassError, match="without max_attention_size; open chunks"),
        adoption.drive(session),
    ):
        pass


def test_ends_of_caches_stay_tensors_where_attention_is_of_others(pipeline, monkeypatch):
    # StreamDiffusionV2 fills the end of each sample in place: `cache["local_end_index"][i].fill_`
    monkeypatch.delattr(pipeline.generator.model.blocks[0].self_attn, "max_attention_size")
    model = pipeline.generator.model
    with lipass.adopt(pipeline) as adoption:
        assert adoption.family == "self_forcing"
        assert "forward" not in vars(model)
        assert "__call__" not in vars(type(model))
        assert {one.name for one in adoption.changes} >= {"attention", "torch"}
