"""Lanes: one chunk a turn, nobody twice in a row, and a fast side that waits for nobody."""

import itertools
import os
import sys
import threading
import time

import pytest
from painted import PaintedVisit, PaintedWorld

from lipass.errors import LipassError
from lipass.play.host import Host
from lipass.play.keep import Keep
from lipass.play.lane import Lane
from lipass.play.protocol import Choose, Compare, Enter, Move, Say
from lipass.play.walk import parse_walk
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


def wait(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


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


class Out:
    """Collects chunks; full where told so."""

    def __init__(self):
        self.chunks, self.why, self.is_full = [], "", False

    def full(self):
        return self.is_full

    def chunk(self, header, frames):
        self.chunks.append(header | {"frames": frames})

    def failed(self, why):
        self.why = why

    def of(self, side):
        return [one for one in tuple(self.chunks) if one["side"] == side]


@pytest.fixture
def enter():
    """Return a function that lets a visitor into a host of a painted world."""
    hosts = []

    def start(world, *, walk="", host=None, room=None):
        if host is None:
            host = Host(world, beside=True, threads=1)
            hosts.append(host)
            host.start()
        out = Out()
        strides = parse_walk(walk, host.vocabulary)
        visitor = host.enter(Enter(room, strides, ""), out)
        host.begin(visitor)
        return host, visitor, out

    yield start
    for host in hosts:
        host.close()


def started(world, **options):
    """Start a host that its test closes."""
    host = Host(world, beside=True, threads=1, **options)
    host.start()
    return host


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


def walk_on(visitor, out, chunks):
    """Walk and turn until so many chunks are made on both sides, and stop."""
    for number, controls in enumerate((WALKS, Controls(turn=1), Controls(1, 1, 0, 17))):
        before = len(out.of("fast"))
        visitor.move(Move(number, controls))
        wait(lambda: len(out.of("fast")) >= before + chunks)  # noqa: B023
    visitor.move(Move(9, Controls()))
    wait(lambda: out.of("dense")[-1]["chunk"] == out.of("fast")[-1]["chunk"])


def test_who_comes_back_goes_on_from_the_latest_chunk(enter):
    host, visitor, out = enter(PaintedWorld(), room=12)
    visitor.say(Say(1, ("night",)))
    visitor.choose(Choose("exact"))
    walk_on(visitor, out, 3)
    host.leave(visitor)
    last = out.of("fast")[-1]
    again = Out()
    back = host.enter(Enter(None, (), "", visitor.ticket), again)
    host.begin(back)
    assert (back.room, back.said) == (12, (("night", "clear"), "exact"))
    assert (back.first == last["frames"][-1]).all()
    assert back.ticket != visitor.ticket
    time.sleep(0.05)
    assert not again.chunks  # a still view is not made again
    back.move(Move(1, WALKS))
    wait(lambda: again.of("dense"))
    assert again.of("fast")[0]["chunk"] == last["chunk"] + 1
    assert len(again.of("fast")[0]["memory"]) == min(8, last["chunk"] + 1)
    assert again.of("dense")[0]["missed"] <= 1 + out.of("dense")[-1]["missed"]
    back.move(Move(2, Controls()))
    assert back.walked().startswith(visitor.walked().rsplit(",", 1)[0])


def test_fork_and_its_parent_go_their_own_ways(enter):
    host, visitor, out = enter(PaintedWorld())
    walk_on(visitor, out, 2)
    host.store(visitor, "ticket")
    outs = Out(), Out()
    forks = [host.enter(Enter(None, (), "", "ticket"), one) for one in outs]
    for fork, controls in zip(
        (visitor, *forks), (WALKS, Controls(-1), Controls(turn=1)), strict=True
    ):
        host.begin(fork)
        fork.move(Move(1, controls))
    wait(lambda: all(len(one.of("fast")) > 3 for one in outs))
    start = out.of("fast")[-1]["chunk"]
    cameras = [one.of("fast")[3]["camera"] for one in outs]
    assert cameras[0] != cameras[1]
    assert {one.of("fast")[0]["chunk"] for one in outs} <= set(range(start + 1))


def test_rest_of_a_recorded_walk_is_kept(enter):
    host, visitor, out = enter(PaintedWorld(seconds=0.01), walk="9w,9r,9wl,9s~fog")
    wait(lambda: len(out.of("fast")) >= 12)
    host.leave(visitor)
    again = Out()
    host.begin(host.enter(Enter(None, (), "", visitor.ticket), again))
    wait(lambda: again.chunks and not again.of("fast")[-1]["replays"])
    _, _, whole = enter(None, walk="9w,9r,9wl,9s~fog", host=host)
    wait(lambda: len(whole.of("fast")) == 36)
    assert again.of("fast")[-1]["camera"] == whole.of("fast")[-1]["camera"]
    assert again.of("fast")[-1]["words"] == ("day", "fog")


def test_who_said_a_word_of_each_of_many_groups_comes_back(enter):
    world = PaintedWorld()
    world.words = {f"group-{i}": (f"old-{i}", f"new-{i}") for i in range(11)}
    host, visitor, out = enter(world)
    new = tuple(f"new-{i}" for i in range(11))
    visitor.say(Say(1, new))
    wait(lambda: out.of("fast") and out.of("fast")[-1]["words"] == new)
    host.leave(visitor)
    back = host.enter(Enter(None, (), "", visitor.ticket), Out())
    assert back.said[0] == new
    assert back.walked() == visitor.walked()


def test_each_chunk_is_kept_at_once_where_the_keep_lives_longer():
    keep = Keep()
    hosts = [
        Host(PaintedWorld(), beside=True, threads=1, keep=keep, keep_chunks=True) for _ in "ab"
    ]
    for host in hosts:
        host.start()
    out = Out()
    visitor = hosts[0].enter(Enter(3, (), ""), out)
    hosts[0].begin(visitor)
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) > 5)
    again, newest = Out(), out.of("fast")[-1]["chunk"]
    back = hosts[1].enter(Enter(None, (), "", visitor.ticket), again)  # the first one is not asked
    hosts[1].begin(back)
    back.move(Move(1, WALKS))
    wait(lambda: again.of("fast"))
    assert again.of("fast")[0]["chunk"] >= newest
    for host in hosts:
        host.close()


def test_who_comes_back_before_the_broken_socket_is_noticed_goes_on(enter):
    host, visitor, out = enter(PaintedWorld())
    walk_on(visitor, out, 2)
    back = host.enter(Enter(None, (), "", visitor.ticket), Out())
    assert (back.first == out.of("fast")[-1]["frames"][-1]).all()
    assert host.visitors == {back}  # the one whose socket broke was let go
    assert out.why == "this visit goes on in another window"
    host.leave(visitor)  # as when its socket is noticed at last
    assert host.visitors == {back}
    assert visitor._world.open_sides == 2


def test_who_comes_back_to_a_full_house_takes_the_place_they_still_hold(enter):
    world = PaintedWorld()
    host, visitor, out = enter(world, host=started(world, visitors_max=2))
    _, other, _ = enter(None, host=host)
    walk_on(visitor, out, 2)
    assert host.enter(Enter(None, (), ""), Out()) is None
    assert host.enter(Enter(None, (), "", "no such one"), Out()) is None
    back = host.enter(Enter(None, (), "", visitor.ticket), Out())
    assert (back.first == out.of("fast")[-1]["frames"][-1]).all()
    assert host.visitors == {back, other}
    assert host.enter(Enter(None, (), "", visitor.ticket), Out()) is None  # it is used by now
    host.close()
    assert world.open_sides == 0


def test_visit_that_cannot_be_gone_on_with_leaves_nothing_open(enter):
    class Broken(PaintedVisit):
        def restore(self, state):
            raise ValueError("of another world")

    world = PaintedWorld()
    host, visitor, out = enter(world)
    wait(lambda: out.of("dense"))
    world.visit = lambda room: Broken(world, room)
    with pytest.raises(ValueError, match="of another world"):
        host.enter(Enter(None, (), "", visitor.ticket), Out())
    assert world.open_sides == 0
    assert not host.visitors
    del world.visit
    assert host.enter(Enter(None, (), "", visitor.ticket), Out()) is not None  # it is still kept


def test_ticket_that_is_not_known_any_more_is_refused(enter):
    host, *_ = enter(PaintedWorld())
    with pytest.raises(LipassError, match="a visit that is kept, got an old one"):
        host.enter(Enter(None, (), "", "no such one"), Out())


def test_keep_forgets_what_is_old_or_too_much():
    now = [0.0]
    keep = Keep(seconds=10, most_bytes=100, clock=lambda: now[0])
    keep.put("a", {"fast": b"x" * 40})
    now[0] = 5
    keep.put("b", {"fast": b"x" * 40})
    keep.put("a", {"dense": b"y" * 10})  # other parts stay, and it is the newest now
    assert set(keep.get("a")) == {"fast", "dense"}
    keep.put("c", {"fast": b"x" * 20})
    assert not keep.get("b")
    now[0] = 16
    assert not keep.get("a")
    assert len(keep) == 0


def test_world_that_does_not_say_how_visits_go_on_keeps_none(enter):
    class Simple(PaintedWorld):
        def visit(self, room):
            visit = super().visit(room)

            class Plain:
                camera, plan, first = visit.camera, visit.plan, visit.first
                go, side = visit.go, visit.side

            return Plain()

    host, visitor, out = enter(Simple())
    wait(lambda: len(out.of("dense")) == 1)
    host.leave(visitor)
    assert not visitor.can_be_kept
    assert not host.keep.get(visitor.ticket)


def test_keep_that_is_away_ends_no_visit(enter):
    class Away:
        def put(self, ticket, parts):
            raise ConnectionError("nobody there")

        get = dict

    world = PaintedWorld()
    host = Host(world, beside=True, threads=1, keep=Away(), keep_chunks=True)
    _, visitor, out = enter(world, host=host)
    host.start()
    visitor.move(Move(1, WALKS))
    wait(lambda: len(out.of("fast")) > 5)
    host.leave(visitor)
    host.close()
    assert not out.why
    assert world.open_sides == 0
