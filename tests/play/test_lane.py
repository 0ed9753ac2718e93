"""Lanes: one chunk a turn, nobody twice in a row, and a fast side that waits for nobody."""

import itertools
import os
import sys
import threading
import time

import pytest
from painted import PaintedWorld
from visits import Out, wait

from lipass.play.host import Host
from lipass.play.lane import Lane
from lipass.play.protocol import Choose, Compare, Enter, Move, Say
from lipass.play.world import Controls

WALKS = Controls(ahead=1)


class Worker:
    """Waits for so many chunks, and notes whose turn it was."""

    def __init__(self, name, turns, chunks):
        self.name, self.turns, self.chunks = name, turns, chunks

    def due(self, side):
        return 0.0 if self.chunks else None

    def make(self, side):
        self.chunks -= 1
        self.turns.append(self.name)
        time.sleep(0.001)


def test_who_waits_longest_is_next():
    lane, turns = Lane(["fast"]), []
    workers = [Worker(name, turns, count) for name, count in (("a", 9), ("b", 3), ("c", 6))]
    for worker in workers:
        lane.add(worker)
    lane.start()
    wait(lambda: not any(worker.chunks for worker in workers))
    lane.close()
    assert turns == [*"abc" * 3, *"ac" * 3, *"aaa"]


def test_one_lane_takes_turns_between_sides():
    lane, turns = Lane(["fast", "dense"]), []

    class Both(Worker):
        def make(self, side):
            super().make(side)
            turns[-1] = side

    both = Both("", turns, 6)
    lane.add(both)
    lane.start()
    wait(lambda: not both.chunks)
    lane.close()
    assert turns == ["fast", "dense"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
@pytest.mark.parametrize("yields", [False, True], ids=["keeps", "yields"])
def test_a_lane_that_yields_is_the_only_thread_of_lower_priority(yields):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    lane, found = Lane(["dense"], yields=yields), []

    class Asks(Worker):
        def make(self, side):
            super().make(side)
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    asks = Asks("", [], 1)
    lane.add(asks)
    lane.start()
    wait(lambda: not asks.chunks)
    lane.close()
    assert (found[0] > before) == yields
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_only_the_dense_side_yields_and_only_in_a_lane_of_its_own():
    beside, together = (Host(PaintedWorld(), beside=one)._lanes for one in (True, False))
    assert [(lane.sides, lane._yields) for lane in beside] == [
        (("fast",), False), (("dense",), True),
    ]  # fmt: skip
    assert [lane._yields for lane in together] == [False]


def test_fast_side_does_not_wait_for_the_dense_one(enter):
    _, visitor, out = enter(PaintedWorld(dense_seconds=0.1))
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("dense")) >= 4)
    visitor.move(Move(2, Controls()))
    fast, dense = len(out.of("fast")), out.of("dense")
    assert fast > 3 * len(dense)
    assert dense[-1]["missed"] > 0
    assert dense[-1]["behind"] > 0
    assert [one["chunk"] for one in out.of("fast")] == list(range(fast))


def test_both_sides_end_on_the_same_view(enter):
    _, visitor, out = enter(PaintedWorld(dense_seconds=0.02))
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) >= 20)
    visitor.move(Move(2, Controls()))
    wait(lambda: out.of("dense")[-1]["chunk"] == out.of("fast")[-1]["chunk"])
    assert out.of("dense")[-1]["camera"] == out.of("fast")[-1]["camera"]
    assert out.of("dense")[-1]["db"] < 100


def test_still_view_costs_nothing(enter):
    world = PaintedWorld()
    _, visitor, out = enter(world)
    wait(lambda: len(out.of("dense")) == 1)
    time.sleep(0.05)
    assert len(world.made) == 2  # the view of the entrance, once a side
    visitor.say(Say(1, ("night",)))
    wait(lambda: len(out.of("fast")) == 5)
    time.sleep(0.05)
    assert len(out.of("fast")) == 5
    assert world.made[-1][3] == ("night", "clear")


def said(world, side, word):
    return [one for one in tuple(world.made) if one[0] == side and word in one[3]]


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "in turns"])
def test_each_side_makes_the_chunks_that_its_own_change_of_words_takes(beside):
    world, out = PaintedWorld(dense_seconds=0.03), Out()
    host = Host(world, beside=beside, threads=1)
    host.start()
    visitor = host.enter(Enter(None, (), ""), out)
    host.begin(visitor)
    wait(lambda: len(out.of("dense")) == 1)
    visitor.say(Say(1, ("night",)))
    wait(lambda: len(said(world, "dense", "night")) == 4)
    time.sleep(0.1)
    host.close()
    assert len(said(world, "fast", "night")) == 4
    assert len(said(world, "dense", "night")) == 4
    assert out.of("dense")[-1]["chunk"] == out.of("fast")[-1]["chunk"]
    assert out.of("dense")[-1]["db"] is not None
    made = [one["chunk"] for one in out.of("dense")]
    assert out.of("dense")[-1]["missed"] == made[-1] + 1 - len(set(made))


def test_dense_side_makes_its_change_of_words_after_a_walk_too(enter):
    world = PaintedWorld(dense_seconds=0.05)
    _, visitor, out = enter(world)
    wait(lambda: len(out.of("dense")) == 1)
    visitor.move(Move(1, WALKS))
    visitor.say(Say(2, ("night",)))
    wait(lambda: len(said(world, "fast", "night")) >= 6)  # its own change is over
    visitor.move(Move(3, Controls()))
    wait(lambda: len(said(world, "dense", "night")) == 4)
    time.sleep(0.15)
    assert len(said(world, "dense", "night")) == 4
    assert out.of("dense")[-1]["camera"] == out.of("fast")[-1]["camera"]


def test_no_chunk_is_made_again_while_somebody_walks_and_words_change(enter):
    _, visitor, out = enter(PaintedWorld(seconds=0.02))
    visitor.move(Move(1, WALKS))
    for number, word in enumerate(("night", "fog", "day", "clear")):
        visitor.say(Say(number, (word,)))
        seen = len(out.of("fast"))
        wait(lambda: len(out.of("fast")) > seen + 2)  # noqa: B023
    made = [one["chunk"] for one in out.of("dense")]
    assert len(made) == len(set(made))


def test_walk_that_ends_with_a_word_is_replayed_to_the_end_of_its_change(enter):
    world = PaintedWorld()
    enter(world, walk="3w,w~night")
    wait(lambda: len(said(world, "fast", "night")) == 4)
    time.sleep(0.05)
    assert len(said(world, "fast", "night")) == 4


def test_change_of_words_goes_on_after_a_socket_broke():
    world = PaintedWorld()
    host = Host(world, beside=True, threads=1)  # not started: chunks are made by hand
    visitor = host.enter(Enter(None, (), ""), Out())
    visitor.make("fast")
    visitor.say(Say(1, ("night",)))
    for side in ("fast", "fast", "dense"):
        visitor.make(side)
    back = host.enter(Enter(None, (), "", visitor.ticket), Out())
    for _ in range(9):
        for side in ("fast", "dense"):
            if back.due(side) is not None:
                back.make(side)
    assert len(said(world, "fast", "night")) == 4
    assert len(said(world, "dense", "night")) == 4


def test_dense_side_that_was_behind_when_a_socket_broke_catches_up():
    host = Host(PaintedWorld(), beside=True, threads=1)
    visitor, out = host.enter(Enter(None, (), ""), Out()), Out()
    for side in ("fast", "dense", "fast", "fast"):
        visitor.make(side)
    back = host.enter(Enter(None, (), "", visitor.ticket), out)
    for _ in range(9):
        for side in ("fast", "dense"):
            if back.due(side) is not None:
                back.make(side)
    assert [one["chunk"] for one in out.of("fast")] == [3]
    assert [one["chunk"] for one in out.of("dense")] == [3]


def test_chunks_come_no_faster_than_the_motion_is_natural(enter):
    _, visitor, out = enter(PaintedWorld())
    begin = time.monotonic()
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) >= 20)
    assert time.monotonic() - begin > 18 * PaintedWorld.chunk_frames / PaintedWorld.fps


def test_dense_side_can_be_left_out(enter):
    _, visitor, out = enter(PaintedWorld())
    visitor.compare(Compare(False))
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) >= 10)
    assert len(out.of("dense")) <= 1


def test_looking_is_spread_over_chunks_and_ends(enter):
    _, visitor, out = enter(PaintedWorld())
    wait(lambda: len(out.of("fast")) == 1)
    visitor.move(Move(1, Controls(yaw=50)))
    wait(lambda: len(out.of("fast")) == 3)
    time.sleep(0.05)
    assert [one["camera"][2] for one in out.of("fast")] == [0, 30, 50]


def test_key_that_is_let_go_at_once_moves_a_chunk_all_the_same(enter):
    _, visitor, out = enter(PaintedWorld(seconds=0.05))
    wait(lambda: len(out.of("fast")) == 1)
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) == 2)  # a chunk of it is being made
    visitor.move(Move(2, Controls(aside=1)))
    visitor.move(Move(3, Controls()))
    visitor.say(Say(4, ("night",)))
    visitor.say(Say(5, ("fog",)))
    wait(lambda: out.of("fast")[-1]["words"] == ("night", "fog"))
    assert out.of("fast")[-1]["camera"][0] == 2.0


def test_preset_reaches_the_fast_side(enter):
    world = PaintedWorld()
    _, visitor, out = enter(world)
    wait(lambda: len(out.of("fast")) == 1)
    visitor.choose(Choose("exact"))
    wait(lambda: len(out.of("fast")) == 2)
    assert out.of("fast")[-1]["preset"] == "exact"


def test_walk_replays_to_the_same_frames(enter):
    host, visitor, out = enter(PaintedWorld())
    for number, controls in enumerate((WALKS, Controls(turn=1), Controls(1, 1, 0, 17))):
        visitor.move(Move(number, controls))
        seen = len(out.of("fast"))
        wait(lambda: len(out.of("fast")) > seen + 2)  # noqa: B023
    visitor.say(Say(9, ("fog",)))
    visitor.move(Move(9, Controls()))
    before = -1
    while before != (before := len(out.of("fast"))):
        time.sleep(0.1)
    _, _, again = enter(None, walk=visitor.walked(), host=host)
    wait(lambda: len(again.of("fast")) >= before)
    for one, other in zip(out.of("fast"), again.of("fast"), strict=False):
        assert one["camera"] == other["camera"]
        assert one["words"] == other["words"]
        assert (one["frames"] == other["frames"]).all()


def test_slow_reader_waits_and_nobody_else_does(enter):
    host, slow, slow_out = enter(PaintedWorld())
    _, quick, quick_out = enter(None, host=host)
    slow_out.is_full = True
    slow.move(Move(1, WALKS))
    quick.move(Move(1, WALKS))
    wait(lambda: len(quick_out.of("fast")) >= 20)
    assert len(slow_out.of("fast")) <= 2
    slow_out.is_full = False
    host.wake()
    wait(lambda: len(slow_out.of("fast")) >= 5)


def test_failure_ends_one_visit_alone(enter):
    world = PaintedWorld(fails_at=(13, 3))
    host, broken, broken_out = enter(world, room=13)
    _, whole, whole_out = enter(None, host=host, room=14)
    for visitor in (broken, whole):
        visitor.move(Move(1, WALKS))
    wait(lambda: len(whole_out.of("fast")) >= 20)
    assert broken_out.why == "RuntimeError in the fast side"
    assert len(broken_out.of("fast")) == 3
    assert not whole_out.why


def test_who_leaves_is_freed(enter):
    world = PaintedWorld(seconds=0.02, dense_seconds=0.02)
    host, visitor, _ = enter(world)
    visitor.move(Move(1, WALKS))
    time.sleep(0.05)
    host.leave(visitor)
    assert world.open_sides == 0
    assert not host.visitors
    made = len(world.made)
    time.sleep(0.06)
    assert len(world.made) == made


def test_sides_that_share_the_cores_take_turns():
    world, out = PaintedWorld(dense_seconds=0.01), Out()
    host = Host(world, beside=False, threads=1)
    host.start()
    visitor = host.enter(Enter(None, (), ""), out)
    host.begin(visitor)
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) >= 10)
    host.close()
    sides = [side for side, *_ in world.made]
    assert all(one != other for one, other in itertools.pairwise(sides[:16]))


def test_world_that_does_not_compile_is_told_and_ends(enter):
    class Broken(PaintedWorld):
        def compile(self, side, say):
            raise ValueError("no such graph")

    host = Host(Broken(), beside=True, threads=1)
    ended = threading.Event()
    host.ended = ended.set
    host.start()
    assert ended.wait(5)
    host.close()
    assert "raised ValueError" in str(host.failure)
    assert "no such graph" in host.status.doing
