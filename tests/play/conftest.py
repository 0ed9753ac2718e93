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

from lipass.play.connection import Limits
from lipass.play.host import Host
from lipass.play.protocol import LONGEST_MESSAGE
from lipass.play.server import application


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
