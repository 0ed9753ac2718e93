import json
import time

import pytest
import torch

from lipass.config import Config
from lipass.policy.plan import ChunkPlan, plan_chunk, with_steps
from lipass.policy.steps import plan_steps
from lipass.policy.trajectory import parse_trajectory
from lipass.policy.views import check_poses
from lipass.presets import PRESETS

WAY_BACK = parse_trajectory("left-31, right-32")
FORWARD = parse_trajectory("w-63")


def plan(preset, history, poses=WAY_BACK, **changed):
    past = poses[:history] if history else None
    checked, query = check_poses(past, poses[history : history + 4])
    call = {
        "poses": checked,
        "query": query,
        "latents": None,
        "own_context": None,
        "stream": "main",
        "index": history // 4,
        **{key: changed.pop(key) for key in ("latents", "own_context") if key in changed},
    }
    return plan_chunk(Config.resolve(preset, changed), **call)


# its cameras are of video frames, in clips
LATENTWISE = [preset for preset in PRESETS if preset != "reference-matrix-game"]


@pytest.mark.parametrize("preset", LATENTWISE)
@pytest.mark.parametrize("history", [0, 1, 4, 30, 60])
def test_every_preset_accounts_for_every_latent_and_survives_json(preset, history):
    made = plan(preset, history)
    assert made.history_latents == history
    assert all(frame.reason for frame in made.context.frames)
    assert made.revisit.reason
    assert ChunkPlan.from_json(made.to_json()) == made


def test_json_holds_the_steps_once_they_are_known():
    made = plan("all", 48)
    steps = plan_steps(4, Config.resolve("all").steps, allowed=True, reason="x")
    complete = with_steps(made, steps)
    assert ChunkPlan.from_json(complete.to_json()) == complete
    assert json.loads(complete.to_json())["steps"]["reused"] == [1, 2]


def test_json_of_another_version_is_refused():
    data = {**plan("all", 8).to_dict(), "schema_version": 99}
    with pytest.raises(ValueError, match="schema_version 1, got 99; record it again"):
        ChunkPlan.from_dict(data)


def test_reference_preset_reproduces_the_released_tables():
    turn = [plan("reference", 4 * chunk) for chunk in range(1, 16)]
    assert [p.index for p in turn if p.revisit.allowed] == list(range(8, 16))
    assert [len(p.context.indices) for p in turn] == [4, 8] + [8] * 5 + [12] * 8
    walk = [plan("reference", 4 * chunk, FORWARD) for chunk in range(1, 16)]
    assert [p.index for p in walk if p.revisit.allowed] == list(range(3, 16))


def test_reference_steps_alone_use_the_released_cache_context():
    changed = {"steps": True, "context": False}
    turn = [plan("reference", 4 * chunk, **changed) for chunk in range(1, 16)]
    assert [p.index for p in turn if p.revisit.allowed] == list(range(9, 16))
    assert all(len(p.context.indices) == p.history_latents for p in turn)


def test_reference_reasons_name_scores_and_rules():
    dropped = plan("reference", 20).context.frames
    assert [dropped[i].reason for i in (0, 16)] == ["sink", "window"]
    assert dropped[8].reason == "dropped: overlap 0.57 < 0.70"
    joined = plan("reference", 32).context.frames
    assert joined[25].reason.startswith("memory 0.8")
    assert joined[8].reason == "dropped: clip 24 shows more"
    assert plan("reference", 8).context.frames[6].reason == "window"


def test_policies_are_independent():
    both, context, steps = plan("all", 48), plan("context", 48), plan("cache", 48)
    assert both.context == context.context
    assert both.revisit == steps.revisit
    assert context.revisit.reason == "step policy is off"
    assert steps.context.indices == list(range(48))


def test_mixed_modes():
    changed = {"context.mode": "reference", "context.overlap_min": 0.7}
    mixed = plan("all", 48, **changed)
    assert mixed.revisit == plan("all", 48).revisit
    assert mixed.context.frames[0].overlap is None


def test_own_context_is_used_only_without_the_policy():
    assert plan("off", 8, own_context=[0, 5]).context.indices == [0, 5]
    assert plan("all", 48, own_context=[0]).context == plan("all", 48).context


def test_early_chunks_stay_dense_by_rule():
    assert plan("reference", 8).dense_reason == "history of 2 chunks < sparse.dense_chunks 3"
    assert plan("reference", 12).dense_reason is None
    assert plan("sparse", 12).dense_reason is None


def test_a_shorter_last_chunk_makes_no_more_chunks_of_its_history():
    poses, query = check_poses(WAY_BACK[:8], WAY_BACK[8:9])
    made = plan_chunk(
        Config.resolve("all", {"sparse.dense_chunks": 3}),
        poses=poses,
        query=query,
        latents=None,
        own_context=None,
        stream="main",
        index=2,
    )
    assert made.dense_reason == "history of 2 chunks < sparse.dense_chunks 3"


def test_planning_leaves_its_inputs_and_the_generator_alone():
    before, state = WAY_BACK.clone(), torch.get_rng_state()
    plan("all", 48)
    plan("reference", 48)
    assert torch.equal(before, WAY_BACK)
    assert torch.equal(state, torch.get_rng_state())


def test_planning_64_candidates_is_cheap():
    """About 2 ms of one core; the bound leaves room for slow machines."""
    poses = parse_trajectory("left-31, right-40")
    config = Config.resolve("all")
    best = float("inf")
    for _ in range(12):
        begin = time.process_time()
        plan_chunk(
            config,
            poses=poses[:64].double(),
            query=poses[64:68].double(),
            latents=None,
            own_context=None,
            stream="main",
            index=16,
        )
        best = min(best, time.process_time() - begin)
    assert best < 0.020


def without_cameras(history, held=None, **options):
    """Plan a chunk of a model that has latents and no cameras."""
    made = plan_chunk(
        Config.resolve("context", options),
        poses=None,
        query=None,
        latents=torch.randn(history, 2, 2, 2),
        own_context=None,
        stream="main",
        index=history // 4,
        held=held,
    )
    return made.context


def test_window_of_a_fixed_length_needs_no_cameras():
    context = without_cameras(20, **{"context.window_latents": 2})
    assert context.indices == [0, 18, 19]
    assert context.window_chunks is None


def test_without_cameras_sink_and_window_are_of_what_is_held():
    context = without_cameras(20, held=[9, 8, 4, 5, 6, 7], **{"context.window_latents": 2})
    assert context.indices == [4, 8, 9]
    reasons = {frame.reason for frame in context.frames if frame.index not in (4, 5, 6, 7, 8, 9)}
    assert reasons == {"dropped: the model does not hold it"}
    assert without_cameras(8, held=[]).indices == []
