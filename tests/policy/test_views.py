import pytest
import torch

from lipass.config import Config
from lipass.kernels.view_overlap.api import point_visibility
from lipass.policy.trajectory import parse_trajectory
from lipass.policy.views import check_poses, score_points

VIEW = Config.resolve("context").context
POSES = parse_trajectory("left-11")
HISTORY, QUERY = POSES[:8], POSES[8:]


def spoiled(value, row=0, column=3, latent=5):
    poses = HISTORY.clone()
    poses[latent, row, column] = value
    return poses


def mirrored():
    poses = HISTORY.clone()
    poses[2, 0] *= -1
    return poses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_passes_and_becomes_float64_on_the_host(dtype):
    history, query = check_poses(HISTORY.to(dtype), QUERY.to(dtype))
    assert history.dtype == query.dtype == torch.float64
    torch.testing.assert_close(history.to(dtype), HISTORY.to(dtype))
    assert query.shape == (4, 4, 4)


def test_no_history_is_an_empty_one():
    history, query = check_poses(None, QUERY)
    assert history.shape == (0, 4, 4)
    assert query.shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("poses", "query", "error", "words"),
    [
        (HISTORY[0], QUERY, ValueError, r"shape \[latents, 4, 4\], got \[4, 4\]; pass one"),
        (HISTORY[None], QUERY, ValueError, "without a batch dimension"),
        (HISTORY[:, :3], QUERY, ValueError, r"got \[8, 3, 4\]"),
        (HISTORY[:0], QUERY, ValueError, "at least one camera, got none; pass .*None for a first"),
        (HISTORY, QUERY[:0], ValueError, "query must hold at least one camera"),
        (HISTORY.long(), QUERY, TypeError, "floating-point tensor, got torch.int64"),
        (HISTORY.tolist(), QUERY, TypeError, "floating-point tensor, got list"),
        (HISTORY.to("meta"), QUERY, ValueError, "poses must hold values, got .* device meta"),
        (HISTORY, QUERY.to("meta"), ValueError, "query must hold values, got .* device meta"),
        (spoiled(float("nan")), QUERY, ValueError, "finite, got NaN or infinity in latent 5"),
        (spoiled(float("inf")), QUERY, ValueError, "finite, got NaN or infinity in latent 5"),
        (HISTORY, QUERY * float("nan"), ValueError, r"query must be finite.* latent 0 \(4 in all"),
        (None, QUERY * float("nan"), ValueError, "query must be finite"),
        (spoiled(2.0, 0, 0), QUERY, ValueError, "rigid .* off by 3.07 at latent 5; remove scale"),
        (spoiled(0.5, 3, 0), QUERY, ValueError, "rigid .* at latent 5"),
        (spoiled(2.0, 3, 3), QUERY, ValueError, "rigid .* at latent 5"),
        (mirrored(), QUERY, ValueError, "rigid .* off by 2 at latent 2"),
        (HISTORY, 2 * QUERY, ValueError, "query must be rigid"),
    ],
)
def test_wrong_cameras_are_refused_with_rule_value_and_remedy(poses, query, error, words):
    with pytest.raises(error, match=words) as raised:
        check_poses(poses, query)
    assert ", got" in str(raised.value)
    assert "; " in str(raised.value)


@pytest.mark.needs_gpu
def test_devices_must_agree():
    with pytest.raises(ValueError, match="one device, got cuda:0 and cpu; move one"):
        check_poses(HISTORY.cuda(), QUERY)


def test_points_average_to_the_overlap():
    view = Config.resolve("all").context
    points = score_points(*check_poses(HISTORY, QUERY), view)
    assert points.shape[:2] == (4, 8)
    overlap = points.mean(-1)
    assert torch.equal(overlap.argmax(1), torch.full((4,), 7))


def test_views_to_other_sides_score_as_if_nothing_was_ruled_out():
    w2c = parse_trajectory("right-60, w-12, left-30", step_deg=6).double()
    query, history = w2c[-4:], w2c[:-4]
    seen = point_visibility(query, history, VIEW.hfov_deg, VIEW.vfov_deg, VIEW.near, VIEW.far)
    assert torch.equal(score_points(history, query, VIEW), seen)
    behind = history[:5]
    assert score_points(behind, history[30:34], VIEW).shape == (4, 5, seen.shape[2])
