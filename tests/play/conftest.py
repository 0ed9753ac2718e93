"""A server in a thread, and visitors."""

import contextlib
import socket
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
sys.path.insert(0, str(Path(__file__).parent))

import uvicorn
from painted import Client
from visits import Out

from lipass.play.connection import Limits
from lipass.play.host import Host
from lipass.play.protocol import LONGEST_MESSAGE, Enter
from lipass.play.server import application
from lipass.play.walk import parse_walk


@pytest.fixture
def serve():
    """Return a function that serves a world and gives host and port; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            world,
            *,
            visitors=16,
            beside=True,
            token="",
            loopback=True,
            voice=None,
            films=None,
            **limits,
        ):
            host = Host(world, visitors, beside=beside, threads=1, voice=voice, films=films)
            app = application(host, token=token, loopback=loopback, limits=Limits(**limits))
            config = uvicorn.Config(
                app, log_level="warning", ws="websockets-sansio", ws_max_size=LONGEST_MESSAGE
            )
            server = uvicorn.Server(config)
            listening = socket.create_server(("127.0.0.1", 0))
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()

            def stop():
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()
                assert not host.visitors

            stack.callback(stop)
            return host, listening.getsockname()[1]

        yield start


@pytest.fixture
def visit():
    """Return a function that opens a visitor's socket on a port."""
    with contextlib.ExitStack() as stack:

        def open_(port, **options):
            client = Client(port, **options)
            stack.callback(client.close)
            return client

        yield open_


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
