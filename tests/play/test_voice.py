"""Words of a world are heard, and no more audio is taken than somebody speaks."""

import contextlib
import time
import wave

import numpy as np
import pytest

pytest.importorskip("pocketsphinx")
pytest.importorskip("espeakng_loader")

from browser import browser
from painted import PaintedWorld
from speech import RATE, speech
from websockets.exceptions import ConnectionClosed

from lipass.errors import LipassError
from lipass.play.voice import Ear, Recogniser, Voice, language_of

WORDS = {
    "time": ("day", "dusk", "night"),
    "air": ("clear", "haze", "fog"),
    "light": ("plain", "warm", "cool"),
}


class SpokenWorld(PaintedWorld):
    words = WORDS


@pytest.fixture(scope="module")
def recogniser():
    return Recogniser(WORDS)


def said(recogniser, text, voice="en-us"):
    (utterance,) = Ear().hear(speech(text, voice).tobytes())
    return recogniser.hear(utterance)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("room at night in fog", ("night", "fog")),
        ("day, clear, plain", ("day", "clear", "plain")),
        ("night", ("night",)),
        ("warm light", ("warm",)),
    ],
)
def test_words_of_the_world_are_heard(recogniser, text, words):
    assert said(recogniser, text).words == words


def test_most_of_what_robots_say_is_heard(recogniser):
    """A synthesiser speaks worse than people do."""
    right = total = 0
    for text in ("room at night in fog", "day clear warm", "dusk and cool light", "in clear air"):
        for voice in ("en-us", "en-us+f3", "en-us+m3"):
            asked = {word for group in WORDS.values() for word in group} & set(text.split())
            total += len(asked)
            right += len(asked & set(said(recogniser, text, voice).words))
    assert right >= 0.75 * total


def test_utterances_end_where_somebody_is_silent(recogniser):
    pcm = speech("night").tobytes() + speech("fog").tobytes()
    ear, found = Ear(), []
    for start in range(0, len(pcm), 1000):  # as it comes, in pieces of any length
        found += ear.hear(pcm[start : start + 1000])
    assert [recogniser.hear(one).words for one in found] == [("night",), ("fog",)]
    assert not ear.hear(bytes(32_000))


def test_endless_sound_is_cut():
    ear = Ear()
    found = ear.hear(speech("room " * 40).tobytes())
    assert found
    assert max(map(len, found)) < 2 * 16_000 * 9
    assert len(ear._said) < 2 * 16_000 * 9


def test_language_has_only_words_of_the_world():
    text = language_of(WORDS, {"a", "room", "at", "in", "and", "light", "day", "night"})
    pairs = [line.split()[1:] for line in text.split("\\2-grams:")[1].splitlines() if " " in line]
    assert ["warm", "light"] in pairs
    assert ["warm", "air"] not in pairs  # its sound is not known
    assert ["night", "day"] not in pairs  # one of a group


def test_world_whose_words_nobody_knows_cannot_be_heard(caplog):
    with pytest.raises(LipassError, match="got zyxgle; use plain English words, or --no-voice"):
        Recogniser({"mood": ("zyxgle",)})


def test_spoken_words_change_what_is_made(serve, visit):
    _, port = serve(SpokenWorld(), voice=Voice(WORDS))
    client = visit(port)
    assert client.enter()["voice"]
    client.send(do="listen", on=True)
    pcm = speech("room at night in fog").tobytes()
    for start in range(0, len(pcm), 3200):
        client.socket.send(pcm[start : start + 3200])
    heard = client.until(do="heard", seconds=20)
    assert heard["words"] == ["night", "fog"]
    spoken = client.until(do="chunk", side="fast", words=["night", "fog", "plain"])
    assert spoken["words"] == ["night", "fog", "plain"]


def test_who_speaks_is_not_idle_and_an_open_microphone_is(serve, visit):
    _, port = serve(SpokenWorld(), voice=Voice(WORDS), idle_s=3.0)
    client = visit(port)
    client.enter()
    client.send(do="listen", on=True)
    begin, pcm = time.monotonic(), speech("fog").tobytes()
    for part in (bytes(2 * RATE), pcm):
        time.sleep(0.7)
        client.socket.send(part)
    assert client.until(do="heard")["words"] == ["fog"]
    bye = client.until(do="bye", seconds=20)
    assert bye["why"] == "nothing came for 3 s"
    assert time.monotonic() - begin > 4


def test_audio_is_refused_where_nobody_listens(serve, visit):
    _, port = serve(SpokenWorld())
    client = visit(port)
    assert not client.enter()["voice"]
    client.send(do="listen", on=True)
    assert "nobody listens here" in client.until(do="refused")["why"]
    client.socket.send(bytes(3200))
    assert "must be JSON text, got bytes" in client.until(do="refused")["why"]


def test_who_cannot_be_understood_is_told_once_and_walks_on(serve, visit):
    class Mumbled(PaintedWorld):
        words = {"mood": ("zyxgle", "qwrtz")}  # noqa: RUF012

    _, port = serve(Mumbled(), voice=Voice(Mumbled.words), refusals=3)
    client = visit(port)
    client.enter()
    client.send(do="listen", on=True)
    client.socket.send(speech("night").tobytes())
    refused = client.until(do="refused", seconds=20)
    assert refused["what"] == "listen"
    assert "use plain English words" in refused["why"]
    for _ in range(30):  # as a page does that has not read it yet
        client.socket.send(bytes(640))
    client.send(do="walk")
    while (told := client.receive())["do"] != "walk":
        assert told["do"] != "refused"
    client.send(do="listen", on=True)  # by now it is known
    assert client.until(do="refused")["why"] == refused["why"]


def test_utterance_that_breaks_the_recogniser_is_told(serve, visit, monkeypatch):
    voice = Voice(WORDS)
    monkeypatch.setattr(voice, "hear", lambda pcm: 1 / 0)
    _, port = serve(SpokenWorld(), voice=voice)
    client = visit(port)
    client.enter()
    client.send(do="listen", on=True)
    client.socket.send(speech("night").tobytes())
    assert "ZeroDivisionError while listening" in client.until(do="refused")["why"]


def test_audio_behind_the_end_of_listening_is_dropped(serve, visit):
    _, port = serve(SpokenWorld(), voice=Voice(WORDS), refusals=0)
    client = visit(port)
    client.enter()
    client.send(do="listen", on=True)
    client.send(do="listen", on=False)
    client.socket.send(bytes(3200))
    client.send(do="walk")
    client.until(do="walk")


def test_audio_that_comes_too_fast_ends_a_visit(serve, visit):
    _, port = serve(SpokenWorld(), voice=Voice(WORDS))
    client = visit(port)
    client.enter()
    client.send(do="listen", on=True)
    with contextlib.suppress(ConnectionClosed):
        for _ in range(40):
            client.socket.send(bytes(8000))
    with pytest.raises(ConnectionClosed) as closed:
        client.until(do="never")
    assert "no faster than it is spoken" in closed.value.rcvd.reason


def test_microphone_of_a_page_is_heard(serve, tmp_path):
    pcm = np.concatenate([np.zeros(16_000, "<i2"), speech("room at night in fog")] * 2)
    with wave.open(str(tmp_path / "said.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(pcm.tobytes())
    voice = Voice(WORDS)
    _, port = serve(SpokenWorld(), voice=voice)
    options = (
        "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'said.wav'}",
    )  # fmt: skip
    with browser(tmp_path / "profile", *options) as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.until("window.lipass?.fast && lipass.ready.length == 2")
        page.ask("document.getElementById('speak').click()")
        page.until("lipass.fast.words.includes('fog')", seconds=40)
        assert "heard: " in page.ask("document.getElementById('heard').textContent")
        assert page.ask("document.querySelector('[data-choice=fog]').ariaPressed") == "true"
        page.ask("document.getElementById('speak').click()")
        assert page.ask("document.getElementById('speak').textContent") == "speak"
        assert page.said == []
        voice.failure = "nobody can be heard"  # the microphone is switched off again
        page.ask("document.getElementById('speak').click()")
        page.until("document.getElementById('heard').textContent == 'nobody can be heard'")
        assert page.ask("document.getElementById('speak').ariaPressed") == "false"
