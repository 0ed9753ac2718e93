"""The page in a real browser: keys move the camera, both pictures change, it fits a phone."""

import json

import pytest
from browser import browser
from painted import PaintedWorld

from lipass.play.film import Films

SEEN = "[...document.querySelectorAll('.screen canvas')].map((one) => one.toDataURL())"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def entered(page, port, behind="", **window):
    page.said.clear()
    page.open(f"http://127.0.0.1:{port}/{behind}", **window)
    page.until("window.lipass?.fast && window.lipass.dense && window.lipass.ready.length == 2")


def test_keys_move_the_camera_and_both_pictures_change(page, serve):
    world = PaintedWorld(dense_seconds=0.02)
    world.fps = 40.0
    _, port = serve(world)
    entered(page, port)
    before, camera = page.ask(SEEN), page.ask("lipass.camera")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 12")
    assert page.ask("document.querySelector('[data-key=w]').className") == "held"
    page.key("KeyW", down=False)
    page.key("ArrowRight", down=True)
    page.until("lipass.camera[2] > 0")
    page.key("ArrowRight", down=False)
    page.until("lipass.dense.chunk == lipass.fast.chunk")
    page.ask("document.querySelector('[data-choice=night]').click()")
    page.until("lipass.fast.words[0] == 'night'")
    after = page.ask(SEEN)
    assert page.ask("lipass.camera")[1] > camera[1]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert page.ask("document.getElementById('latency').textContent").endswith("ms")
    assert "as fast as" in page.ask("document.getElementById('result').textContent")
    assert page.said == []


def test_link_replays_the_walk(page, serve):
    _, port = serve(PaintedWorld())
    entered(page, port)
    page.key("KeyD", down=True)
    page.until("lipass.camera[0] > 3")
    page.key("KeyD", down=False)
    page.ask("document.getElementById('link').click()")
    link = page.until("location.hash && location.href")
    assert "room=7&walk=" in link
    page.open("about:blank")
    page.open(link)
    page.until("window.lipass?.camera && window.lipass.camera[0] > 3 && !lipass.fast.replays")


def test_film_of_both_pictures_is_recorded(page, serve):
    _, port = serve(PaintedWorld())
    entered(page, port)
    record = "document.getElementById('record')"
    page.ask(f"{record}.click()")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 20")
    page.key("KeyW", down=False)
    assert page.ask(f"{record}.textContent") == "end the film"
    page.ask(f"{record}.click()")
    assert page.until("lipass.film && lipass.film.size") > 500
    assert page.ask("lipass.film.type").startswith("video/")
    assert page.said == []


def test_page_says_why_it_ended(page, serve):
    _, port = serve(PaintedWorld(), idle_s=0.5)
    entered(page, port)
    said = page.until("lipass.gone && document.getElementById('status').textContent")
    assert said == "Ended: nothing came for 0 s. Any key goes on from here."


def test_visit_goes_on_after_its_socket_broke_or_it_was_idle(page, serve):
    host, port = serve(PaintedWorld(), idle_s=0.7)
    entered(page, port)
    page.ask("document.querySelector('[data-choice=night]').click()")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 4 && lipass.fast.words[0] == 'night'")
    page.key("KeyW", down=False)
    chunk = page.until("lipass.gone && lipass.fast.chunk")
    page.key("KeyW", down=True)
    page.until(f"!lipass.gone && lipass.fast?.chunk > {chunk}")
    assert page.ask("lipass.camera[1]") > 5
    assert page.ask("document.querySelector('[data-choice=night]').ariaPressed") == "true"
    chunk = page.ask("lipass.fast.chunk")
    page.ask("lipass.broken = lipass.world")
    for connection in tuple(host.visitors):
        connection._out._socket._send = None  # nothing more can be sent, as by a dead process
    page.until(f"lipass.world != lipass.broken && lipass.fast?.chunk > {chunk}")
    page.key("KeyW", down=False)


def test_who_comes_back_to_a_full_server_waits_for_a_place(page, serve):
    host, port = serve(PaintedWorld(), idle_s=0.7)
    entered(page, port)
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 4")
    page.key("KeyW", down=False)
    page.until("lipass.gone")
    places, host.visitors_max = host.visitors_max, 0
    page.key("KeyW", down=True)
    said = "document.getElementById('status').textContent"
    page.until(f"{said}.startsWith('Waiting for a place: 0 visitors are in')")
    host.visitors_max = places
    page.until("lipass.fast?.camera[1] > 5")
    page.key("KeyW", down=False)
    page.said.clear()


def test_dense_side_stays_switched_off_in_another_room(page, serve):
    host, port = serve(PaintedWorld())
    entered(page, port)
    page.ask("document.getElementById('compare').click()")
    page.ask("lipass.before = lipass.world; document.getElementById('another').click()")
    page.until("lipass.world != lipass.before")
    page.ask("document.querySelector('[data-choice=night]').click()")
    page.until("lipass.fast?.words[0] == 'night'")
    assert [one._compare for one in host.visitors if one.room != 7] == [False]
    assert page.until("document.getElementById('dense-veil').textContent") == "not running"


def test_fork_opens_where_the_visit_is_behind_a_token_too(page, serve):
    _, port = serve(PaintedWorld(), token="sesame", loopback=False)
    entered(page, port, "#token=sesame")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 4")
    page.key("KeyW", down=False)
    page.ask("window.open = (address) => { lipass.opened = address; }")
    page.ask("document.getElementById('fork').click()")
    fork = page.until("lipass.opened")
    assert "#ticket=" in fork
    page.ask("document.getElementById('link').click()")
    assert "sesame" not in page.until("location.hash.includes('walk') && location.href")
    chunk = page.ask("lipass.fast.chunk")
    page.ask("sessionStorage.clear()")  # a new tab has one of its own
    page.open("about:blank")
    page.open(fork)
    page.until("window.lipass?.camera && lipass.camera[1] > 4 && lipass.welcome")
    page.key("KeyW", down=True)
    page.until(f"lipass.fast?.chunk > {chunk}")
    page.key("KeyW", down=False)
    assert page.ask("location.hash") == ""
    page.ask("sessionStorage.clear()")


@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_its_window(page, serve, width):
    _, port = serve(PaintedWorld())
    entered(page, port, width=width, mobile=width < 500)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.ask(wide) == 0
    boxes = page.ask(
        "['fast', 'dense', 'map', 'chunks'].map((id) => {"
        "const { left, right, width } = document.getElementById(id).getBoundingClientRect();"
        "return [left, right, width]; })"
    )
    for left, right, shown in boxes:
        assert 0 <= left < right <= width
        assert shown > 100, json.dumps(boxes)
    assert page.said == []


def test_film_that_the_server_makes_is_fetched(page, serve):
    pytest.importorskip("av")
    _, port = serve(PaintedWorld(), films=Films(200.0))
    entered(page, port)
    record = "document.getElementById('record')"
    page.ask(f"{record}.click()")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 20")
    page.key("KeyW", down=False)
    page.ask(f"{record}.click()")
    assert page.until("lipass.film").startswith("film/")
    assert page.ask(f"{record}.textContent") == "record a film"
    assert page.said == []


def test_film_is_fetched_before_another_visit_and_lost_with_its_socket(page, serve):
    pytest.importorskip("av")
    host, port = serve(PaintedWorld(), films=Films(200.0))
    entered(page, port)
    record = "document.getElementById('record')"
    page.ask(f"{record}.click()")
    page.key("KeyW", down=True)
    page.until("lipass.camera[1] > 8")
    page.key("KeyW", down=False)
    page.ask("lipass.before = lipass.world; document.getElementById('another').click()")
    page.until("lipass.world != lipass.before && lipass.fast")
    assert page.ask("lipass.film").startswith("film/")
    assert page.ask(f"{record}.ariaPressed") == "false"
    page.ask(f"{record}.click()")
    assert page.ask(f"{record}.ariaPressed") == "true"
    page.until("lipass.ready.length == 2")
    for visitor in tuple(host.visitors):
        visitor._out._socket._send = None
    page.key("KeyW", down=True)
    page.until(f"{record}.textContent == 'the film was lost with its visit'")
    page.key("KeyW", down=False)
    assert page.ask(f"{record}.ariaPressed") == "false"
