"""What tests of visits without a socket stand on: an end of the socket, and a host that runs."""

import time

from lipass.play.host import Host


def wait(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


class Out:
    """Collects chunks; full where told so."""

    def __init__(self):
        self.chunks, self.why, self.is_full = [], "", False

    def full(self):
        return self.is_full

    def chunk(self, header, frames):
        self.chunks.append(header | {"frames": frames})

    def failed(self, why):
        self.why = why

    def of(self, side):
        return [one for one in tuple(self.chunks) if one["side"] == side]


def started(world, **options):
    """Start a host that its test closes."""
    host = Host(world, beside=True, threads=1, **options)
    host.start()
    return host
