"""The socket and its page: who gets in, what is served, who is sent away and harms nobody."""

import contextlib
import http.client
import json
import random
import socket
import time

import numpy as np
import pytest
from painted import PaintedWorld
from test_protocol import malformed
from websockets.exceptions import ConnectionClosed, InvalidStatus


def ended(client, seconds=5.0):
    """Read on until the socket is closed; return code and reason."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            client.receive(end - time.monotonic())
    except ConnectionClosed as closed:
        return closed.rcvd.code, closed.rcvd.reason
    raise TimeoutError("the socket is still open")


def fetch(port, path="/", host=None):
    """Return status and headers of what is served."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as opened:
        opened.request("GET", path, headers={"Host": host} if host else {})
        answer = opened.getresponse()
        return answer.status, answer.headers


def test_keys_move_the_camera_of_both_sides(serve, visit):
    _, port = serve(PaintedWorld())
    client = visit(port)
    welcome = client.enter()
    assert (welcome["room"], welcome["words"]["air"]) == (7, ["clear", "fog"])
    first = client.until(do="chunk", side="fast")
    client.move(1, ahead=1)
    moved = client.until(do="chunk", side="fast", number=1)
    assert moved["camera"][1] > first["camera"][1]
    assert not np.array_equal(moved["frames"], first["frames"])
    client.move(2)
    dense = client.until(do="chunk", side="dense", number=1)
    assert dense["db"] < 100


def test_first_view_comes_before_anything_is_compiled(serve, visit):
    class Slow(PaintedWorld):
        def compile(self, side, say):
            say(f"compiling {side}")
            time.sleep(0.3)

    _, port = serve(Slow())
    client = visit(port)
    client.enter()
    said = client.until(do="status")
    assert said == {"do": "status", "ready": [], "doing": "compiling fast"}
    assert client.until(do="first", side="dense")["shape"] == [1, 4, 6]
    assert client.until(do="status", ready=["fast", "dense"])["doing"] == ""


def test_walk_is_given_for_a_link_and_replayed(serve, visit):
    _, port = serve(PaintedWorld())
    client = visit(port)
    client.enter(room=12)
    client.move(1, ahead=1)
    client.until(do="chunk", side="fast", number=1)
    client.move(2)
    time.sleep(0.05)
    client.send(do="walk")
    told = client.until(do="walk")
    assert told["room"] == 12
    other = visit(port)
    other.enter(room=12, walk=told["walk"])
    assert other.until(do="chunk", side="fast", replays=0)["camera"][1] >= 2


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/film.js", "/record.js"])
def test_page_allows_nothing_from_elsewhere(serve, path):
    _, port = serve(PaintedWorld())
    status, headers = fetch(port, path)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/../host.py", "/page/page.js", "/%2e%2e/host.py", "/socket"])
def test_nothing_else_is_served(serve, path):
    _, port = serve(PaintedWorld())
    assert fetch(port, path)[0] == 404


def test_name_that_points_here_from_elsewhere_is_not_answered(serve):
    _, port = serve(PaintedWorld())
    assert fetch(port, host="evil.example")[0] == 403
    assert fetch(port, host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:1", "null", None, "file://"]
)
def test_pages_of_others_cannot_open_the_socket(serve, visit, origin):
    _, port = serve(PaintedWorld())
    with pytest.raises(InvalidStatus) as refused:
        visit(port, origin=origin)
    assert refused.value.response.status_code == 403


def test_token_is_asked_for(serve, visit):
    _, port = serve(PaintedWorld(), token="sesame", loopback=False)
    for given in ("", "Sesame", "é"):
        client = visit(port)
        client.send(do="enter", token=given)
        assert ended(client)[0] == 1008
    visit(port).enter(token="sesame")


def test_first_message_must_enter_and_come_at_once(serve, visit):
    _, port = serve(PaintedWorld(), enter_s=0.2)
    client = visit(port)
    client.move(1, ahead=1)
    assert "must be 'enter'" in ended(client)[1]
    assert "at once" in ended(visit(port))[1]


def test_who_comes_when_it_is_full_is_told(serve, visit):
    host, port = serve(PaintedWorld(), visitors=2)
    first = visit(port)
    first.enter()
    visit(port).enter()
    late = visit(port)
    late.send(do="enter")
    assert ended(late) == (1013, "2 visitors are in; try again later")
    first.close()
    end = time.monotonic() + 5
    while len(host.visitors) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    visit(port).enter()


def test_who_cannot_be_let_in_is_told(serve, visit):
    class Closed(PaintedWorld):
        def visit(self, room):
            raise RuntimeError("no door")

    host, port = serve(Closed())
    client = visit(port)
    client.send(do="enter")
    assert ended(client) == (1011, "RuntimeError at the entrance")
    assert not host.visitors


def test_who_does_nothing_is_sent_away_and_freed(serve, visit):
    world = PaintedWorld()
    host, port = serve(world, idle_s=0.3)
    client = visit(port)
    client.enter()
    assert ended(client)[0] == 1000
    end = time.monotonic() + 5
    while host.visitors and time.monotonic() < end:
        time.sleep(0.01)
    assert not host.visitors
    assert world.open_sides == 0


def test_too_many_messages_end_a_visit(serve, visit):
    _, port = serve(PaintedWorld(), messages_a_second=20)
    client = visit(port)
    client.enter()
    with contextlib.suppress(ConnectionClosed):
        for number in range(200):
            client.move(number, ahead=1)
    assert "20 messages a second" in ended(client)[1]


def test_too_long_a_message_ends_a_visit(serve, visit):
    _, port = serve(PaintedWorld())
    client = visit(port)
    client.enter()
    with contextlib.suppress(ConnectionClosed):
        client.socket.send("x" * 300_000)
    assert ended(client)[0] == 1009


def half_open(port):
    """Open the socket, enter, and never read or answer again."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.sendall(
        f"GET /socket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    assert b"101" in raw.recv(4096)
    text = json.dumps({"do": "enter", "walk": "5000w"}).encode()
    raw.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
    return raw


def test_strangers_leave_a_walk_as_it_is(serve, visit):
    """A thousand broken messages, and a reader that does not read and is gone."""

    def walk(client):
        frames = []
        client.enter(walk="20w,9r,20wr,9a~fog,22y5")
        while not frames or frames[-1]["replays"]:
            frames.append(client.until(do="chunk", side="fast"))
        return frames

    big = PaintedWorld()
    big.size = (64, 64)
    host, port = serve(big, stall_s=0.5, refusals=10**6, messages_a_second=1e6)
    alone = walk(visit(port))
    gone = half_open(port)
    vandal = visit(port)
    vandal.enter()
    for number, text in enumerate(malformed(random.Random(1), 1000)):
        with contextlib.suppress(ConnectionClosed):
            vandal.socket.send(text)
            if number % 50 == 0:  # not asked for, and cut anywhere
                vandal.socket.send(bytes(number))
                vandal.send(do="listen", on=True)
                vandal.send(do="fork")
                vandal.send(do="film", on=False)
    made = walk(visit(port))
    assert [one["chunk"] for one in made] == [one["chunk"] for one in alone]
    for one, other in zip(made, alone, strict=True):
        assert np.array_equal(one["frames"], other["frames"])
    end = time.monotonic() + 15
    while len(host.visitors) > 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(host.visitors) == 3  # two walks and the vandal
    gone.close()
