"""Films of a visit: both pictures, as mp4, fetched once and never too many."""

import contextlib
import http.client
import io

import numpy as np
import pytest
from painted import PaintedWorld

from lipass.play import film as films_module
from lipass.play.film import Films

av = pytest.importorskip("av")


def fetched(port, ticket):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as opened:
        opened.request("GET", f"/film/{ticket}")
        answer = opened.getresponse()
        return answer.status, answer.headers, answer.read()


def test_film_shows_both_sides_and_is_fetched_once(serve, visit):
    world = PaintedWorld()
    world.size = (16, 16)
    _, port = serve(world, films=Films(world.fps))
    client = visit(port)
    assert client.enter()["films"]
    client.until(do="chunk", side="dense")
    client.send(do="film", on=True)
    client.move(1, turn=1)
    while client.until(do="chunk", side="fast")["camera"][2] < 200:
        pass
    client.move(2)
    client.send(do="film", on=False)
    told = client.until(do="film")
    status, headers, data = fetched(port, told["ticket"])
    assert (status, headers["Content-Type"]) == (200, "video/mp4")
    assert "attachment" in headers["Content-Disposition"]
    with av.open(io.BytesIO(data)) as opened:
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    assert len(frames) == told["frames"] >= 30
    assert frames[0].shape == (256, 520, 3)
    last = frames[-1].astype(int)
    blue, darker = last[:, 20:200, 2].mean(), last[:, 320:500, 2].mean()
    assert blue > 1.5 * darker  # the painted dense side is half as bright
    assert fetched(port, told["ticket"])[0] == 404
    assert fetched(port, "..%2f..%2fetc%2fpasswd")[0] == 404


def test_film_is_asked_for_where_none_is_made(serve, visit):
    _, port = serve(PaintedWorld())
    client = visit(port)
    assert not client.enter()["films"]
    client.send(do="film", on=True)
    assert "no films are made here" in client.until(do="refused")["why"]
    assert fetched(port, "any")[0] == 404


def test_film_that_ends_beside_a_fork_is_not_lost(serve, visit):
    world = PaintedWorld()
    _, port = serve(world, films=Films(world.fps))
    client = visit(port)
    client.enter()
    client.send(do="film", on=True)
    client.send(do="fork")
    client.until(do="forked")
    client.send(do="film", on=False)
    assert client.until(do="film")["ticket"]


def test_film_has_a_longest_length(monkeypatch):
    monkeypatch.setattr(films_module, "LONGEST_FRAMES", 6)
    made = Films(20.0)
    film, chunk = made.begin(), np.zeros((4, 8, 8, 3), np.uint8)
    for _ in range(5):
        film.add(chunk, chunk)
    assert film.frames == 8
    assert made.thread.submit(film.end).result()


def test_films_that_nobody_fetches_are_forgotten():
    now = [0.0]
    films = Films(20.0, clock=lambda: now[0])
    tickets = [films.end(films.begin()) for _ in range(9)]
    assert films.take(tickets[0]) is None  # only eight wait
    assert films.take(tickets[1]) == b""
    now[0] = 121
    assert films.take(tickets[2]) is None
