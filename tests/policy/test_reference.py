"""The released gates through a session."""

import pytest

import lipass
from lipass.policy.reference_matrixgame import gate_clip
from lipass.policy.trajectory import parse_trajectory

WALK = parse_trajectory("w-176, s-160", step_m=0.1235, step_deg=1.5)
TURN = parse_trajectory("left-176, right-160", step_m=0.1235, step_deg=1.5)
OPTIONS = {
    "preset": "reference",
    "sparse": False,
    "context.mode": "matrix-game",
    "steps.mode": "matrix-game",
    "context.overlap_min": 0.45,
    "steps.overlap_min": 0.45,
}


@pytest.mark.parametrize("path", [WALK, TURN], ids=["walk", "turn"])
def test_session_plans_clips_of_matrix_game_as_the_release(path):
    with lipass.Session(**OPTIONS) as session:
        for clip in range(8):
            end = 57 + 40 * clip
            begin = end - 40 if clip else 0
            poses = path[:begin] if clip else None
            with session.chunk(poses=poses, query=path[begin:end]) as chunk:
                gate = gate_clip(path, clip)
                history = (begin + 3) // 4
                window = range(max(history - 4, 0), history)
                assert chunk.context == sorted({*gate.latents, *window})
                assert chunk.plan.revisit.allowed == gate.reuse
                assert list(chunk.steps((1.0, 0.6, 0.3, 0.0)))


@pytest.mark.parametrize(("history", "new"), [(57, 10), (40, 40), (0, 40), (58, 40)])
def test_cameras_of_no_whole_clip_are_refused(history, new):
    with (
        lipass.Session(**OPTIONS) as session,
        pytest.raises(ValueError, match="plans clips by the cameras of video frames"),
    ):
        session.chunk(poses=WALK[:history] if history else None, query=WALK[:new])


def test_preset_for_matrix_game_plans_as_those_options_and_keeps_the_first_clip_dense():
    plans = []
    for options in (OPTIONS, {"preset": "reference-matrix-game"}):
        with lipass.Session(**options) as session:
            for clip in range(3):
                end = 57 + 40 * clip
                begin = end - 40 if clip else 0
                poses = WALK[:begin] if clip else None
                with session.chunk(poses=poses, query=WALK[begin:end]) as chunk:
                    plans.append(chunk.plan)
    for one, other in zip(plans[:3], plans[3:], strict=True):
        assert (one.context, one.revisit) == (other.context, other.revisit)
    assert [plan.dense_reason for plan in plans[3:]] == [
        "history of 0 chunks < sparse.dense_chunks 1",
        None,
        None,
    ]
