"""Chunks that are not as long as `chunk_latents` says."""

import pytest

import lipass
from lipass.policy.trajectory import parse_trajectory

W2C = parse_trajectory("w-80")


def lengths(*counts, history=0, preset="context", **options):
    """Open chunks of these lengths, one behind the other."""
    session = lipass.Session(preset=preset, **options)
    for count in counts:
        end = history + count
        poses = W2C[:history] if history else None
        with session.chunk(poses=poses, query=W2C[history:end]):
            pass
        history = end


@pytest.mark.parametrize(
    ("counts", "history"),
    [
        ((16,), 64),
        ((5,), 8),
        ((4, 16), 0),
        ((1, 4, 5), 0),
        ((3, 3), 8),
        ((3, 3), 4),
        ((4, 2, 4), 0),
    ],
)
def test_chunks_of_another_length_are_refused(counts, history):
    with pytest.raises(ValueError, match="a chunk must have chunk_latents latents"):
        lengths(*counts, history=history)


def test_refusal_names_the_length_to_set():
    with pytest.raises(ValueError, match="got 16 for chunk_latents 4; set chunk_latents to 16"):
        lengths(16, history=64)
    lengths(16, history=64, chunk_latents=16)


@pytest.mark.parametrize(
    ("counts", "history"),
    [((4, 4, 4), 0), ((1, 4, 4), 0), ((9, 4, 4), 0), ((4, 4, 2), 0), ((2,), 8), ((3,), 0)],
)
def test_first_and_last_chunks_may_differ(counts, history):
    lengths(*counts, history=history)


@pytest.mark.parametrize("preset", ["off", "sparse", "cache"])
def test_length_is_free_where_nothing_counts_chunks(preset):
    lengths(16, 16, history=32, preset=preset)


def test_release_counts_clips_without_a_context_policy_too():
    with pytest.raises(ValueError, match="got 16 for chunk_latents 4"):
        lengths(16, history=64, preset="reference", context=False)


def test_failed_chunk_is_not_taken_for_the_last():
    session = lipass.Session(preset="context")
    with pytest.raises(RuntimeError, match="lost"), session.chunk(poses=W2C[:8], query=W2C[8:10]):
        raise RuntimeError("lost")
    with session.chunk(poses=W2C[:8], query=W2C[8:12]):
        pass


def test_streams_are_counted_apart():
    session = lipass.Session(preset="context")
    for stream in ("a", "b"):
        with session.chunk(poses=W2C[:8], query=W2C[8:10], stream=stream):
            pass
