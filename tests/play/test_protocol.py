"""Messages of a browser: what is understood, and that nothing else is."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipass.play.protocol import (
    LONGEST_MESSAGE,
    Choose,
    Compare,
    Enter,
    Film,
    Fork,
    Listen,
    Move,
    Recall,
    Refused,
    Say,
    pack,
    read,
    unpack,
)
from lipass.play.vocabulary import Vocabulary
from lipass.play.walk import LONGEST_WALK, Stride, format_walk, parse_walk
from lipass.play.world import Controls

KNOWN = Vocabulary({"time": ("day", "night"), "air": ("clear", "fog")}, ("all", "exact"), 100)


def said(**message):
    return read(json.dumps(message), KNOWN)


def test_every_kind_is_understood():
    assert said(do="move", number=3, ahead=1, yaw=-7) == Move(3, Controls(ahead=1, yaw=-7))
    assert said(do="say", number=4, words=["fog", "night"]) == Say(4, ("fog", "night"))
    assert said(do="choose", preset="exact") == Choose("exact")
    assert said(do="compare", on=False) == Compare(False)
    assert said(do="walk") == Recall()
    assert said(do="fork") == Fork()
    assert said(do="listen", on=True) == Listen(True)
    assert said(do="film", on=False) == Film(False)
    assert said(do="enter", ticket="t") == Enter(None, (), "", "t")
    assert said(do="enter", room=7, walk="w") == Enter(7, (Stride(Controls(1)),), "")
    assert said(do="enter") == Enter(None, (), "")


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({}, "do must be one of move, say"),
        ({"do": "dance"}, "do must be one of"),
        ({"do": ["move"]}, "do must be one of"),
        ({"do": "move", "ahead": 2}, "ahead must be a whole number from -1 to 1, got 2"),
        ({"do": "move", "ahead": True}, "ahead must be a whole number"),
        ({"do": "move", "yaw": 1e9}, "yaw must be a whole number"),
        ({"do": "move", "up": 1}, "'move' must have no other keys, got 'up'"),
        ({"do": "move", "number": -1}, "number must be"),
        ({"do": "say", "words": ["noon"]}, "a word must be one of day, night, clear, fog"),
        ({"do": "say", "words": [["day"]]}, "a word must be one of"),
        ({"do": "say", "words": "day"}, "words must be a list"),
        ({"do": "say", "words": []}, "words must be a list of 1 to 2"),
        ({"do": "say", "words": ["day", "night"]}, "of different groups"),
        ({"do": "choose", "preset": "../../etc/passwd"}, "preset must be one of all, exact"),
        ({"do": "choose"}, "preset must be one of"),
        ({"do": "compare", "on": 1}, "on must be true or false"),
        ({"do": "enter", "room": 100}, "room must be a whole number from 0 to 99"),
        ({"do": "enter", "walk": "9w,import os"}, "a walk has items like"),
        ({"do": "enter", "walk": "w~noon"}, "says words of the world"),
        ({"do": "enter", "walk": "w~day~night"}, "one word of a group at once"),
        ({"do": "enter", "walk": "w@off"}, "names presets of the world"),
        ({"do": "enter", "walk": "9999w"}, "at most 7200 chunks"),
        ({"do": "enter", "token": 5}, "token, walk and ticket must be text"),
        ({"do": "enter", "ticket": ["a"]}, "token, walk and ticket must be text"),
        ({"do": "enter", "ticket": "t" * 65}, "a ticket must be short, got 65 characters"),
        ({"do": "fork", "ticket": "mine"}, "'fork' must have no other keys"),
        ({"do": "move", "number": 1, "padding": "x" * 600}, "must be shorter than 512"),
    ],
)
def test_what_is_refused_says_why(message, why):
    with pytest.raises(Refused, match=why.replace("..", r"\.\.")):
        said(**message)


@pytest.mark.parametrize(
    "text", [None, b"{}", "", "{", "[]", "7", "NaN", '{"do": NaN}', "[" * 50_000, "x" * 100_000]
)
def test_what_is_no_object_is_refused(text):
    with pytest.raises(Refused):
        read(text, KNOWN)


def malformed(random_, count):
    """Break messages in the ways that strangers do: bytes, nesting, numbers, types, cuts."""
    whole = [
        {"do": "move", "number": 1, "ahead": 1},
        {"do": "say", "number": 1, "words": ["fog"]},
        {"do": "choose", "preset": "all"},
        {"do": "enter", "room": 1, "walk": "2w,r"},
    ]
    odd = [None, -1, 10**30, 1.5, "", "\0", "a" * 300, [], {}, [[]], True, "../x", "__class__"]
    for _ in range(count):
        message = dict(random_.choice(whole))
        message[random_.choice([*message, "more"])] = random_.choice(odd)
        text = json.dumps(message)
        if random_.random() < 0.4:
            at = random_.randrange(len(text))
            text = text[:at] + chr(random_.randrange(1, 0x3000)) + text[at + 1 :]
        yield text[: random_.randrange(len(text))] if random_.random() < 0.3 else text


def test_broken_messages_are_refused_and_never_raise_anything_else():
    refused = []
    for text in malformed(random.Random(0), 3000):
        try:
            read(text, KNOWN)
        except Refused as error:
            refused.append(str(error))
    assert len(refused) > 2500
    assert max(map(len, refused)) < 300


controls = st.builds(
    Controls,
    *[st.integers(-1, 1)] * 3,
    *[st.integers(-99, 99)] * 2,
)
strides = st.builds(
    Stride, controls, st.sampled_from([(), ("fog",), ("night", "clear")]),
    st.sampled_from(["", "exact"]),
)  # fmt: skip


@given(st.lists(st.tuples(strides, st.integers(1, 5))))
def test_walk_is_read_back(runs):
    walk = [stride for stride, times in runs for stride in [stride] * times]
    assert list(parse_walk(format_walk(walk), KNOWN)) == walk


def test_walk_is_short():
    walk = [Stride(Controls(ahead=1))] * 80 + [Stride(Controls(turn=-1), ("fog",))]
    assert format_walk(walk) == "80w,l~fog"
    longest = [Stride(Controls(1, 1, 1, -98 + i % 2, -99)) for i in range(LONGEST_WALK)]
    assert len(format_walk(longest)) < LONGEST_MESSAGE


def test_walk_that_says_much_ends_where_a_link_would_be_too_long():
    words = {f"group-{i}": tuple(f"{end}-{i}".rjust(20, "x") for end in "ab") for i in range(12)}
    known = Vocabulary(words, ("all",), 1)
    every = [tuple(group[i % 2] for group in words.values()) for i in range(LONGEST_WALK)]
    walk = [Stride(Controls(ahead=1), said, "all") for said in every]
    text = format_walk(walk)
    entered = read(json.dumps({"do": "enter", "walk": text, "ticket": "t" * 64}), known)
    assert list(entered.walk) == walk[: len(entered.walk)]
    assert len(entered.walk) > 100


def test_chunk_is_unpacked_as_it_was():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    header, pixels = unpack(pack({"side": "fast"}, frames))
    assert header == {"side": "fast", "shape": [2, 3, 4]}
    assert bytes(pixels) == frames.tobytes()
