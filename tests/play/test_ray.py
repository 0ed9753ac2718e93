"""Two replicas on one machine: sockets stay with theirs, and visits go on where one dies."""

import os
import socket
import time
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from lipass.play import on_ray
from lipass.play.serving import Serving

ray = pytest.importorskip("ray", reason="needs Ray Serve: pip install 'lipass[ray]'")

WORLD = f"{Path(__file__).with_name('painted.py')}:PaintedWorld"
# Ray's own sockets, files and loops outlive their owners in this process.
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
    os.environ.setdefault(*on_ray.PROXY_BEGINS)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    on_ray.deploy(
        WORLD, Serving(visitors=4, voice=False, threads=1), on_ray.Scale(fewest=2, most=2),
        "127.0.0.1", number,
    )  # fmt: skip
    yield number
    on_ray.close()


def test_visits_of_a_replica_that_dies_go_on_from_their_latest_chunk(port, visit):
    clients, homes = [], {}
    end = time.monotonic() + 60
    while len(homes) < 2:
        assert time.monotonic() < end, "one replica got all sockets"
        client = visit(port)
        welcome = client.enter(room=len(clients))
        clients.append((client, welcome))
        homes.setdefault(welcome["replica"], []).append(len(clients) - 1)
    latest = {}
    for number, (client, _) in enumerate(clients):
        client.move(1, ahead=1)
        latest[number] = client.until(do="chunk", side="fast", chunk=6, seconds=20)
        client.move(2)
    dead, alive = homes
    name = next(
        one for one in ray.util.list_named_actors(all_namespaces=True) if dead in one["name"]
    )
    ray.kill(ray.get_actor(**name), no_restart=True)
    for number in homes[alive]:  # nothing happens to others
        client, _ = clients[number]
        client.move(3, turn=1)
        assert client.until(do="chunk", side="fast", number=3)["chunk"] > 6
    for number in homes[dead]:
        client, before = clients[number]
        with pytest.raises(ConnectionClosed):
            client.until(do="never", seconds=20)
        again = visit(port)
        welcome = again.enter(ticket=before["ticket"])
        assert welcome["replica"] != dead
        assert welcome["room"] == number
        shown = again.until(do="first", side="fast")
        assert shown["camera"][1] >= latest[number]["camera"][1]
        again.move(1, ahead=1)
        went_on = again.until(do="chunk", side="fast", seconds=20)
        assert went_on["chunk"] > latest[number]["chunk"]
        assert went_on["camera"][1] > shown["camera"][1]


def test_page_is_served_by_any_replica(port):
    import http.client

    opened = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    opened.request("GET", "/")
    answer = opened.getresponse()
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    opened.close()
