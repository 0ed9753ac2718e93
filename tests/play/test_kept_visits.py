"""Visits that are kept: who comes back, or forks, goes on from the latest chunk."""

import time

import pytest
from painted import PaintedVisit, PaintedWorld
from visits import Out, started, wait

from lipass.errors import LipassError
from lipass.play.host import Host
from lipass.play.keep import Keep
from lipass.play.protocol import Choose, Enter, Move, Say
from lipass.play.world import Controls

WALKS = Controls(ahead=1)


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
