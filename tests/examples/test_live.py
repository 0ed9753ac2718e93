"""The example as it is served: walls stop, memory is bounded, visitors do not mix."""

import random
import threading
import time

import pytest
import torch

pytest.importorskip("uvicorn")

import lipass
from benchmarks.long_rollout import resident_mb
from lipass.examples.tinyworld import live
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.live import LiveWorld, kept
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.examples.tinyworld.world import is_free
from lipass.play.host import Host
from lipass.play.protocol import Enter
from lipass.play.walk import parse_walk
from lipass.play.world import Controls
from lipass.policy.trajectory import parse_trajectory
from lipass.runtime.tree_file import checked, from_bytes, to_bytes

WORDS = ("day", "clear", "plain")


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(width=48, heads=1, blocks=1, rows=4, columns=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codec = Codec(width=4)
    return LiveWorld(
        "eager", (model.eval().requires_grad_(False), codec.eval().requires_grad_(False))
    )


@pytest.fixture(scope="module")
def compiled(world):
    torch._dynamo.reset()
    for side in ("fast", "dense"):
        world.compile(side, lambda doing: None)
    return world


def test_walls_and_furniture_stop_who_walks(world):
    visit = world.visit(9004)
    for controls in [Controls(ahead=1)] * 30 + [Controls(1, 1, 1)] * 30:
        visit.go(controls)
        assert is_free(visit.room, visit.camera.x, visit.camera.z)


def test_sliding_along_a_wall_goes_on(world):
    visit = world.visit(9004)
    for _ in range(40):
        visit.go(Controls(ahead=1))
    before = visit.camera
    visit.go(Controls(turn=1))
    visit.go(Controls(turn=1))
    visit.go(Controls(ahead=1))
    assert visit.camera[:2] != before[:2]


def test_looking_up_ends_somewhere(world):
    visit = world.visit(9004)
    stretch = [visit.go(Controls(pitch=36)) for _ in range(3)][-1]
    up = torch.rad2deg(torch.asin(-torch.linalg.inv(stretch.w2c)[-1, 1, 2]))
    assert float(up) == pytest.approx(15.0, abs=0.01)


def test_what_is_shown_elsewhere_is_forgotten_first():
    first = parse_trajectory(f"left-{live._RECORDED - 1}", step_deg=3)
    there = parse_trajectory("right-3, w-20, left-20", step_m=0.3, step_deg=8)
    w2c = torch.cat([first, there])
    keep = kept(w2c, len(w2c) - 4)
    gone = sorted(set(range(len(w2c))) - set(keep))
    assert len(gone) == 4
    assert gone[0] % 4 == 0
    assert live._RECORDED <= gone[0] < len(w2c) - 4 * live._LATEST_CHUNKS


def test_memory_is_bounded_and_the_recording_stays(world, monkeypatch):
    monkeypatch.setattr(live, "_HISTORY_LATENTS", live._RECORDED + 24)
    visit = world.visit(9004)
    side = visit.side("fast")
    for chunk in range(12):
        made = side.make(chunk, visit.go(Controls(turn=1)), WORDS, "all")
    assert len(made.memory) == live._RECORDED + 24
    assert [one.camera for one in made.memory[: live._RECORDED]] == list(visit.recorded.cameras)
    assert made.memory[-1].camera.yaw == pytest.approx(
        (visit.camera.yaw - 4 * live._TURN_DEG) % 360
    )
    side.close()


def test_preset_changes_what_is_read_from_the_next_chunk_on(world):
    visit = world.visit(9004)
    side = visit.side("fast")
    read = {}
    for chunk, preset in enumerate(("all", "cache", "all", "exact")):
        read[preset] = side.make(chunk, visit.go(Controls(turn=1)), WORDS, preset).read
    assert read["all"] < read["cache"] == read["exact"] == 20
    side.close()


def test_preset_changes_and_what_was_shown_stays_known(world):
    """Steps of a view that was made at day are not reused at night, and a change goes on."""
    visit = world.visit(7)
    side = visit.side("fast")
    night = ("night", *WORDS[1:])
    for chunk, (words, preset) in enumerate(
        [(WORDS, "all"), (night, "all"), (night, "cache"), (night, "cache")]
    ):
        side.make(chunk, visit.go(Controls(turn=1)), words, preset)
    told = [one.plan for one in lipass.report().chunks][-4:]
    assert [one.index for one in told] == [0, 1, 2, 3]
    assert [one.steering.place for one in told] == [0, 1, 2, 3]


# A latent of the tiny model has 16 tokens, so nothing is sparse, which is told.
@pytest.mark.filterwarnings("ignore:an approximate session must leave something out")
def test_presets_are_parts_of_one_compiled_model(compiled):
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    steps = {}
    for preset in compiled.presets:
        visit = compiled.visit(9004)
        side = visit.side("fast")
        for chunk, turn in enumerate((1, 1, -1, -1, -1)):
            made = side.make(chunk, visit.go(Controls(turn=turn)), WORDS, preset)
        steps[preset] = made.steps
        side.close()
    assert steps == {"all": 2, "context": 4, "sparse": 4, "cache": 2, "exact": 4}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_words_change_the_picture(world):
    frames = []
    for words in (WORDS, ("night", "fog", "cool")):
        visit = world.visit(9004)
        side = visit.side("fast")
        frames.append(side.make(0, visit.go(Controls(ahead=1)), words, "all").frames)
        side.close()
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("preset", ["all", "cache"])
def test_visit_that_is_stopped_goes_on_to_the_bit(world, preset):
    """Latents, cameras, session and all: as if it had never been stopped."""
    walk = [Controls(turn=1)] * 2 + [Controls(ahead=1, yaw=7)] + [Controls(turn=-1, pitch=5)] * 4

    def go_on(visit, sides, chunks):
        for chunk in chunks:
            stretch, words = visit.go(walk[chunk]), ("night", *WORDS[1:]) if chunk > 1 else WORDS
            made = [side.make(chunk, stretch, words, preset) for side in sides]
        return made

    names = ("fast", "dense")
    visit = world.visit(9004)
    whole = go_on(visit, [visit.side(name) for name in names], range(7))
    visit = world.visit(9004)
    sides = [visit.side(name) for name in names]
    go_on(visit, sides, range(4))
    kept = {"visit": visit.state(), "sides": [side.state() for side in sides]}
    kept = from_bytes(to_bytes(checked(kept, "a visit"), "test", 1), "test", 1)
    visit = world.visit(9004)
    visit.restore(kept["visit"])
    sides = [visit.side(name) for name in names]
    for side, state in zip(sides, kept["sides"], strict=True):
        side.restore(state)
    for one, other in zip(go_on(visit, sides, range(4, 7)), whole, strict=True):
        assert (one.frames == other.frames).all()
        assert one.memory == other.memory
        assert (one.steps, one.why) == (other.steps, other.why)
    for side in sides:
        side.close()


class Out:
    def __init__(self):
        self.frames, self.why, self.left = {"fast": [], "dense": []}, "", 0

    def full(self):
        return False

    def chunk(self, header, frames):
        self.frames[header["side"]].append((header["chunk"], frames))
        self.left = header["replays"]

    def failed(self, why):
        self.why = why


def test_sixteen_visitors_of_one_compiled_model_see_what_they_would_alone(compiled, monkeypatch):
    """All at once, side by side with the dense side, to the bit."""
    monkeypatch.setattr(live, "_RECORDED", 8)
    walks = ("2w,2r", "3r,l", "2ws,wr~night,w", "w,3r@cache")
    walks = {9001 + i: f"{i + 1}y{i},{walks[i % 4]}" for i in range(16)}
    host = Host(compiled, beside=True, threads=1)
    for lane in host._lanes:
        lane.start()
    outs = {room: Out() for room in walks}
    for room, out in outs.items():
        walk = parse_walk(walks[room], host.vocabulary)[:4]
        host.begin(host.enter(Enter(room, walk, ""), out))
    end = time.monotonic() + 60
    while any(len(out.frames["fast"]) < 4 for out in outs.values()):
        assert time.monotonic() < end
        assert {out.why for out in outs.values()} == {""}
        time.sleep(0.01)
    for lane in host._lanes:
        lane.close()
    for visitor in tuple(host.visitors):
        host.leave(visitor)
    for room, out in outs.items():
        visit = compiled.visit(room)
        side, words, preset = visit.side("fast"), WORDS, "all"
        for chunk, stride in enumerate(parse_walk(walks[room], host.vocabulary)[:4]):
            words = ("night", *WORDS[1:]) if "night" in stride.words else words
            preset = stride.preset or preset
            alone = side.make(chunk, visit.go(stride.controls), words, preset).frames
            assert (alone == out.frames["fast"][chunk][1]).all(), (room, chunk)
        side.close()
    assert threading.active_count() < 12


def test_long_random_walk_grows_nothing_and_compiles_nothing(compiled):
    """As long as it takes to fill the memory, and twice as long again."""
    choose = random.Random(0)
    visit = compiled.visit(9004)
    side = visit.side("fast")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    lengths, resident, sizes = [], [], []
    for chunk in range(90):
        keys = Controls(*(choose.randrange(-1, 2) for _ in range(3)))
        words = (choose.choice(["day", "night"]), "clear", "plain")
        made = side.make(chunk, visit.go(keys), words, choose.choice(["all", "all", "context"]))
        lengths.append(len(made.memory))
        resident.append(resident_mb())
        if chunk in (40, 89):
            sizes.append(len(to_bytes(checked(side.state(), "a side"), "test", 1)))
    side.close()
    assert sizes[1] < 1.02 * sizes[0]  # what a session knows does not grow either
    assert lengths[30:] == [live._HISTORY_LATENTS] * 60
    assert resident[-1] - resident[30] < 25
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_both_sides_run_one_model_when_nothing_is_left_out(compiled):
    visit = compiled.visit(9004)
    fast, dense = visit.side("fast"), visit.side("dense")
    for chunk in range(2):
        stretch = visit.go(Controls(turn=1))
        exact, off = (side.make(chunk, stretch, WORDS, "exact").frames for side in (fast, dense))
        assert abs(exact.astype(int) - off.astype(int)).max() <= 1
    fast.close()
    dense.close()


@pytest.mark.filterwarnings("ignore:an approximate session must leave something out")
def test_a_word_is_walked_to_and_memory_keeps_its_own(world, monkeypatch):
    """Chunks of a change count as made under the word before, until nothing of it is left."""
    monkeypatch.setattr(live, "_HISTORY_LATENTS", live._RECORDED + 24)
    asked = []
    run_chunk = live.run_chunk

    def watched(*args):
        asked.append([len(kept) for _, kept in args[-1]])
        return run_chunk(*args)

    monkeypatch.setattr(live, "run_chunk", watched)
    visit = world.visit(9004)
    side = visit.side("fast")
    night = ("night", *WORDS[1:])
    weights = []
    for chunk in range(9):
        side.make(chunk, visit.go(Controls()), night if chunk else WORDS, "exact")
        blend = side._session.prompts._told["main"].change.blend
        weights.append(blend.weight)
    assert weights == [1.0, *live.lipass.Steering().weights(), 1.0, 1.0, 1.0, 1.0]
    assert side._shown[: live._RECORDED] == [WORDS] * live._RECORDED
    assert side._shown.count(night) == 4 * 5
    assert asked[4] == [20]
    assert asked[5] == [16, 4]
    assert blend.since < live._RECORDED + 4
    side.close()
