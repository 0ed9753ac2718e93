"""The catalogue, its recogniser and the judge: what is named, what is not, and how sharp it is."""

import json

import pytest
import torch

from lipass.examples.tinyworld import imagined, recogniser
from lipass.examples.tinyworld.catalogue import (
    CATALOGUE_HELD_OUT_SEED,
    NAMES,
    PICTURES,
    THINGS,
    WALLS,
    choose,
    furnished,
    size_of,
)
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.data import draw
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.examples.tinyworld.world import is_free, make_room

ROOM = CATALOGUE_HELD_OUT_SEED
TINY = ModelConfig(width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec().eval().requires_grad_(False)


def test_rooms_of_other_seeds_are_as_they_were():
    """The weights that ship were trained on them."""
    room = make_room(9001)
    assert room.layout != "catalogue"
    assert float(room.surfaces.double().sum()) == pytest.approx(-0.97754, abs=1e-4)


def test_a_room_of_the_catalogue_is_what_was_chosen_for_it():
    room, choice = make_room(ROOM), choose(ROOM)
    assert torch.equal(room.size_m, make_room(ROOM).size_m)
    hung = [float(room.surfaces[wall, 16]) > 0 for wall in WALLS]
    assert hung == [name is not None for name in choice.pictures]
    assert len(room.boxes) == sum(name is not None for name in choice.things)
    assert (room.boxes[:, 0, [0, 2]] >= 0).all()
    assert (room.boxes[:, 1] <= room.size_m * torch.tensor([1.0, 0.0, 1.0])).all()
    middle = float(room.size_m[0]) / 2, float(room.size_m[2]) / 2
    assert is_free(room, *middle)


def test_all_names_occur_and_some_places_are_empty():
    drawn = [choose(seed) for seed in range(ROOM, ROOM + 60)]
    pictures = {name for choice in drawn for name in choice.pictures}
    things = {name for choice in drawn for name in choice.things}
    assert pictures == {*PICTURES, None}
    assert things == {*THINGS, None}
    assert len({choice.wallpaper for choice in drawn}) == 4


def test_an_empty_room_has_no_boxes():
    choice = choose(ROOM)
    bare = type(choice)(choice.wallpaper, (None,) * 4, (None,) * 4)
    boxes, surfaces = furnished(size_of(ROOM), bare)
    assert boxes.shape == (0, 2, 3)
    assert surfaces.shape == (6, 29)


def test_shares_are_those_of_what_hangs_and_stands_there():
    w2c = draw(ROOM).w2c[::4]
    found, choice = recogniser.shares(ROOM, w2c), choose(ROOM)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found.sum(1) <= 1 + 1e-6).all()
    there = {choice.wallpaper, *choice.pictures, *choice.things} - {None}
    shown = {name for name, share in zip(NAMES, found.amax(0), strict=True) if share > 0}
    assert shown <= there
    walls, corners = recogniser.slots(ROOM, w2c)
    assert walls.shape == corners.shape == (len(w2c), 4)
    # Nothing hides a picture more than what stands in front of it.
    columns = [NAMES.index(name) for name in PICTURES]
    assert (found[:, columns].sum(1) <= walls.sum(1) + 1e-6).all()


def test_a_recogniser_learns_what_is_plain_to_see():
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(128, 3, 16, 16, generator=generator) * 0.2
    named = torch.zeros(128, len(NAMES))
    named[::2, 4] = 0.5
    frames[::2, 0] += 0.7
    model = recogniser.train(frames, (named >= recogniser.SHOWN_SHARE).float(), steps=60)
    found = recogniser.accuracy(model, frames, named)
    assert found["right"] > 0.95
    assert found[NAMES[4]] > 0.95
    assert found["balanced"] <= 1


def test_a_recogniser_is_trained_once_and_kept(tmp_path, codec, monkeypatch):
    path = tmp_path / "below/recogniser.safetensors"
    first = recogniser.recogniser_at(path, codec, rooms=1)
    monkeypatch.setattr(recogniser, "train", None)
    again = recogniser.recogniser_at(path, codec)
    frames = torch.rand(2, 3, 64, 64)
    assert torch.equal(first(frames), again(frames))
    found = recogniser.examined(again, codec, rooms=1)
    assert set(found) == {"rendered", "codec"}
    assert set(found["codec"]) == {"right", "balanced", *NAMES}


def test_blur_lowers_the_spectrum_and_a_copy_does_not():
    frames = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert set(imagined.spectral_gap_db(frames, frames).values()) == {0.0}
    blurred = torch.nn.functional.avg_pool2d(frames, 5, 1, 2)
    gap = imagined.spectral_gap_db(blurred, frames)
    assert gap["fine"] < gap["middle"] < min(0, gap["coarse"])
    noisy = imagined.spectral_gap_db(frames + 0.5 * torch.rand_like(frames), frames)
    assert noisy["fine"] > 0


def test_a_grating_has_its_power_where_its_cycles_are():
    x = torch.arange(64) / 64
    grating = (0.5 + 0.4 * torch.sin(2 * torch.pi * 9 * x)).expand(1, 3, 64, 64)
    assert int(imagined.spectrum(grating).argmax()) == 9


def asked(likely, places, given=0):
    probabilities = torch.zeros(len(likely), len(NAMES))
    probabilities[:, [NAMES.index(name) for name in PICTURES]] = torch.tensor(likely)
    return imagined.answers(probabilities, torch.tensor(places), given, PICTURES, 7).views


SURE = [0.95, 0.0, 0.0, 0.0, 0.0, 0.0]
HALF = [0.5, 0.4, 0.0, 0.0, 0.0, 0.0]
NONE = [0.01] * 6


def test_a_place_is_named_empty_or_unsure():
    views = asked([SURE, HALF, NONE], [[0.1, 0.0]] * 3)
    assert views == [((7, 0), PICTURES[0]), ((7, 0), None), ((7, 0), "none")]


@pytest.mark.parametrize(
    "places",
    [
        [[0.015, 0.0]],  # too little of a view
        [[0.1, 0.02]],  # two places could be meant
        [[0.1, 0.0], [0.1, 0.0]],  # a given view shows it
    ],
)
def test_what_nobody_imagined_or_could_tell_is_not_asked_for(places):
    assert asked([SURE] * len(places), places, given=len(places) - 1) == []


def test_figures_count_names_and_what_keeps_its_name():
    a, b = PICTURES[:2]
    views = [((1, 0), a), ((1, 0), a), ((1, 0), b), ((1, 1), b), ((2, 0), None), ((2, 1), "none")]
    found = imagined.Answers(views).figures()
    assert found["views"] == 6
    assert found["named"] == pytest.approx(4 / 6, abs=1e-3)
    assert (found["none"], found["unsure"]) == (0.167, 0.167)
    assert found["names"] == 2.0
    assert found["kept"] == pytest.approx(2 / 3, abs=1e-3)


def test_nothing_asked_is_nothing_named():
    found = imagined.Answers([]).figures()
    assert found == {
        "views": 0, "named": 0.0, "none": 0.0, "unsure": 0.0, "names": 0.0, "kept": 0.0,
    }  # fmt: skip


def test_a_model_is_judged_by_steps_beside_renderer_and_codec(codec):
    torch.manual_seed(0)
    model = TinyWorld(TINY).eval()
    who, told = recogniser.Recogniser().eval(), []
    found = imagined.judge(
        model, codec, who, [ROOM], [1, 2], lambda steps, room: told.append((steps, room))
    )
    assert list(found) == ["renderer", "codec", "1 steps", "2 steps"]
    assert told == [(1, ROOM), (2, ROOM)]
    assert set(found["renderer"]["spectrum_db"].values()) == {0.0}
    asked_for = {name: row["pictures"]["views"] for name, row in found.items()}
    assert len(set(asked_for.values())) == 1
    assert asked_for["renderer"] > 0
    json.dumps(found)


def test_lists_of_steps_begin_with_noise_and_end_with_none():
    for count, sigmas in imagined.STEPS.items():
        assert len(sigmas) == count + 1
        assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
        assert list(sigmas) == sorted(sigmas, reverse=True)
