"""What a cache is said to hold is held to where its chunks were written."""

import pytest

from lipass.runtime.written_slots import Placed, WrittenSlots, why_unsaid


def ring(slot, capacity=8, new=2):
    """A ring around the slot that is written to."""
    return Placed(capacity, ((0, slot), (slot + new, capacity)), slot, False)


@pytest.fixture
def written():
    """Chunk 4 of two latents each was written to the first slot."""
    slots = WrittenSlots()
    slots.add("main", 4, ring(0), 8)
    return slots


def test_slots_in_their_order_are_taken(written):
    assert written.why_not("main", 5, ring(2), [8, 9, 4, 5, 6, 7]) == ""


def test_order_of_time_is_not_that_of_a_ring(written):
    why = written.why_not("main", 5, ring(2), [4, 5, 6, 7, 8, 9])
    assert "latent 8 was written to place 0 of what is read, got 4 there" in why


@pytest.mark.parametrize(
    ("stream", "chunk", "placed"),
    [
        pytest.param("other", 5, ring(2), id="another stream"),
        pytest.param("main", 6, ring(4), id="a chunk between them"),
        pytest.param("main", 5, ring(2, capacity=10), id="another cache"),
        pytest.param("main", 5, ring(0), id="written over"),
        pytest.param("main", 5, ring(2)._replace(moved=True), id="moved by the call"),
    ],
)
def test_what_is_not_known_is_not_refused(written, stream, chunk, placed):
    held = list(range(sum(last - first for first, last in placed.reads)))
    assert written.why_not(stream, chunk, placed, held) == ""


def test_two_latest_chunks_are_remembered():
    slots = WrittenSlots()
    for chunk in range(9):
        slots.add("main", chunk, ring(chunk % 4 * 2), chunk * 2)
    assert sorted(slots._written["main", 8]) == [7, 8]
    slots.clear()
    assert not slots._written


def test_history_in_front_of_what_is_written_is_in_the_order_of_time():
    assert why_unsaid(Placed(8, ((0, 1), (3, 6)), 6, False)) == ""
    for placed in (ring(2), Placed(8, ((4, 6), (0, 2)), 6, False), None):
        assert "which latent each place of a cache holds" in why_unsaid(placed)
