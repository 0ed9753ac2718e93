"""The operator that attends to a merged history, without a session."""

import math

import pytest
import torch

from lipass.kernels import dense, registry
from lipass.kernels.merge.running import MergeRule, query_metric
from lipass.kernels.merged_history import merge_given

LATENT, CHUNK, SCALE = 6, 12, 0.35


def drawn(tokens, heads=2, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, 8, generator=generator).to(dtype)


def pieces(latents=5, heads=2, batch=1, dtype=torch.float32):
    """Text, a history whose latents are all alike, and own keys; and their values."""
    kinds = {"heads": heads, "batch": batch, "dtype": dtype}
    history = drawn(LATENT, **kinds).repeat(1, 1, latents, 1)
    k = [drawn(5, seed=1, **kinds), history, drawn(CHUNK, seed=2, **kinds)]
    return k, [drawn(part.shape[2], seed=n + 3, **kinds) for n, part in enumerate(k)]


def attend(q, k, v, *, threshold=0.9, kv_tokens=None, sink_latents=0, history=1, site="own"):
    return torch.ops.lipass.attend_merged(
        q, k, v, history, LATENT, SCALE, threshold, kv_tokens, sink_latents, site
    )


def attend_all(q, k, v):
    groups = q.shape[1] // k[0].shape[1]
    key, value = (torch.cat(x, 2).repeat_interleave(groups, 1) for x in (k, v))
    return dense.attend_plainly(q, key, value, SCALE, None)[0]


@pytest.fixture(autouse=True)
def _counts():
    registry.reset_telemetry()
    yield
    registry.reset_telemetry()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sink_latents", [0, 1])
def test_latents_that_are_alike_are_read_once(batch, groups, sink_latents):
    (k, v), q = pieces(batch=batch), drawn(CHUNK, 2 * groups, batch, seed=9)
    out = attend(q, k, v, sink_latents=sink_latents)
    assert torch.allclose(out, attend_all(q, k, v), atol=1e-6)
    counts = registry.telemetry()["own"]
    left = (1 + sink_latents) * LATENT
    given = 5 + 5 * LATENT + CHUNK
    assert counts.density == pytest.approx((given - 5 * LATENT + left) / given)
    assert (counts.role, counts.sparse_calls, counts.dense_calls) == ("decode", 1, 0)
    assert counts.score_errors.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("history", [0, 1, 2])
def test_the_history_may_be_any_piece(history):
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    for x in (k, v):
        x.insert(history, x.pop(1))
    assert torch.allclose(attend(q, k, v, history=history), attend_all(q, k, v), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    (k, v), q = pieces(dtype=dtype), drawn(CHUNK, seed=9, dtype=dtype)
    out = attend(q, k, v)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), attend_all(q, k, v).float(), atol=2e-2)


def test_history_that_is_empty_is_none():
    (k, v), q = pieces(0), drawn(CHUNK, seed=9)
    assert torch.allclose(attend(q, k, v), attend_all(q, k, v), atol=1e-6)
    assert registry.telemetry()["own"].density == 1.0


def test_counts_say_what_scores_have_moved_by():
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    k[1] = k[1] + 0.1 * drawn(5 * LATENT, seed=20)
    attend(q, k, v, threshold=0.8)
    metric = query_metric(q, SCALE, 2)
    found = merge_given(k[1], v[1], metric, MergeRule(0.8, None, 0, LATENT, CHUNK))
    most, mean = registry.telemetry()["own"].score_errors.tolist()
    assert most == pytest.approx(SCALE * float(q.norm(dim=3).max() * found.farthest))
    assert mean == pytest.approx(float(found.moved))
    assert 0 < mean < most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5; 1.0 merges equal keys"),
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        ({"threshold": math.nan}, r"threshold must be in \[0, 1\], got nan"),
        ({"kv_tokens": CHUNK - 1}, "sink and one chunk, 0 \\+ 12 tokens, got 11; use at least 12"),
        ({"kv_tokens": CHUNK, "sink_latents": 1}, "6 \\+ 12 tokens, got 12; use at least 18"),
    ],
)
def test_what_nothing_can_be_merged_by_is_refused(options, message):
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, **options)


def test_keys_that_are_no_numbers_are_refused():
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    k[1][0, 0, 4, 2] = math.nan
    with pytest.raises(ValueError, match="must be finite to be merged, got 1 of 30 tokens"):
        attend(q, k, v)


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_more_pieces_than_a_kernel_reads_apart(threshold):
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    expected = attend_all(q, k, v)
    for parts in (k, v):
        parts[:] = [*parts[:2], *parts[2].split(3, 2)]
    out = attend(q, k, v, threshold=threshold)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("latents", [0, 5])
def test_pieces_of_other_heads_than_the_history_are_refused(latents):
    (k, v), q = pieces(latents), drawn(CHUNK, seed=9)
    k[2], v[2] = k[2][:, :1], v[2][:, :1]
    with pytest.raises(ValueError, match="; expand grouped or shared heads first"):
        attend(q, k, v)


def test_who_answers_may_leave_the_history_as_it_is():
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    with registry.answer("merge_history", lambda *_: None):
        out = attend(q, k, v)
    assert torch.allclose(out, attend_all(q, k, v), atol=1e-6)
    assert registry.telemetry()["own"].density == 1.0


def test_operator_is_sound():
    (k, v), q = pieces(), drawn(CHUNK, seed=9)
    given = (q, k, v, 1, LATENT, SCALE, 0.9, None, 0, "own")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lipass.attend_merged.default, given, test_utils=checks)
