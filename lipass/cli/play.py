"""Serve a world to browsers: walk in it while it is made, dense and accelerated side by side."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import secrets
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from lipass.cli import OK, UsageError
from lipass.cli.failures import failing
from lipass.cli.importing import import_callable
from lipass.cli.toolchain import check_compiler
from lipass.errors import LipassError

if TYPE_CHECKING:
    from lipass.play.serving import Serving
    from lipass.play.world import World

SUMMARY = "walk in a world while it is made, in a browser, dense and accelerated side by side"

_EXAMPLE = "lipass.examples.tinyworld.live:LiveWorld"
_NEEDED = ("starlette", "uvicorn", "websockets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass play`."""
    parser.add_argument(
        "target",
        nargs="?",
        default=_EXAMPLE,
        metavar="TARGET",
        help="module:callable or file.py:callable that returns a world (docs/play.md); the "
        "trained example if left out",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8700, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--token",
        default="",
        help="what visitors have to know; made up where --host is not of this machine alone",
    )
    parser.add_argument(
        "--visitors", type=int, default=16, metavar="N", help="at once (default: %(default)s)"
    )
    parser.add_argument(
        "--idle", type=float, default=300.0, metavar="S",
        help="seconds after which a visitor who does nothing is sent away (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=float, default=600.0, metavar="S",
        help="seconds for which a visit that ended, or a fork, can be gone on with "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ray", type=int, metavar="N",
        help="serve as a deployment of Ray Serve with at most N replicas, a device each; "
        "--visitors, --threads are of one replica",
    )  # fmt: skip
    parser.add_argument(
        "--no-voice", action="store_true",
        help="hear nobody; words can be spoken where pocketsphinx is installed",
    )  # fmt: skip
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of each side (default: half the cores)",
    )


def run(args: argparse.Namespace) -> int:
    """Load the world, then serve it until interrupted."""
    _check(args)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LipassError(
            f"lipass play needs {', '.join(_NEEDED)}, got no {', '.join(missing)}; run "
            f"{sys.executable} -m pip install 'lipass[play]'"
        )
    if args.ray is not None:
        return _serve_on_ray(args)
    with _listen(args.host, args.port) as listening:
        check_compiler()
        return _serve(args, listening)


def _serve(args: argparse.Namespace, listening: socket.socket) -> int:
    import uvicorn

    from lipass.play.keep import Keep
    from lipass.play.protocol import LONGEST_MESSAGE

    serving = _serving(args)
    host = serving.host(load_world(args.target), keep=Keep(serving.keep_s))
    app = serving.application(host)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws="websockets-sansio",  # waits for who reads slowly
            ws_max_size=LONGEST_MESSAGE,
            ws_per_message_deflate=False,  # pictures of a model hardly shrink, and a core is busy
            limit_concurrency=4 * args.visitors + 32,
            timeout_graceful_shutdown=3,
        )
    )
    host.ended = lambda: setattr(server, "should_exit", True)
    name, port = listening.getsockname()[:2]
    _print_address(name, port, serving.token)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if host.failure is not None:
        raise host.failure
    return OK


def _serve_on_ray(args: argparse.Namespace) -> int:
    from lipass.play import on_ray

    serving, gpus = _serving(args), _gpus()
    scale = on_ray.Scale(most=args.ray, cpus=1.0, gpus=1.0 if gpus else 0.0)
    on_ray.deploy(args.target, serving, scale, args.host, args.port)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # as containers are stopped too
        signal.signal(number, lambda *_: ended.set())
    _print_address(args.host, args.port, serving.token)
    ended.wait()
    on_ray.close()
    return OK


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _serving(args: argparse.Namespace) -> Serving:
    from lipass.play.server import is_loopback
    from lipass.play.serving import Serving

    loopback = is_loopback(args.host)
    return Serving(
        args.visitors,
        args.token or ("" if loopback else secrets.token_urlsafe(16)),
        loopback,
        args.idle,
        args.keep,
        args.threads,
        voice=not args.no_voice,
    )


def _print_address(name: str, port: int, token: str) -> None:
    behind = f"#token={token}" if token else ""
    print(f"http://{_shown(name)}:{port}/{behind}", flush=True)
    print("lipass play: open this address; Ctrl-C ends it", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        UsageError: a number out of its range.
    """
    bounds = (
        ("port", 0, 65535),
        ("visitors", 1, 10_000),
        ("idle", 1, 86_400),
        ("keep", 0, 86_400),
        ("threads", 1, 512),
        ("ray", 1, 10_000),
    )
    for name, low, high in bounds:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name} must be from {low} to {high}, got {value}; see --help")
    if args.ray is not None and args.port == 0:
        raise UsageError("--port must be a number of its own with --ray, got 0; leave it out")


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before the work.

    Raises:
        LipassError: it is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise LipassError(
            f"--host and --port must be free and of this machine, got {host} {port}: "
            f"{error.strerror or error}; --port 0 takes a free port"
        ) from None
    return listening


def load_world(target: str) -> World:
    """Build the world that a target names.

    Raises:
        LipassError: it raises, or returns something else, or one whose names walks cannot hold.
    """
    from lipass.play.vocabulary import Vocabulary
    from lipass.play.world import World

    build = import_callable(target)
    with failing("must build a world", target):
        world = build()
    lacks = [name for name in World.__annotations__ if not hasattr(world, name)]
    lacks += [name for name in ("compile", "visit") if not callable(getattr(world, name, None))]
    if lacks:
        raise LipassError(
            f"{target} must return a lipass.play.world.World, got {type(world).__name__} without "
            f"{', '.join(lacks)}; see docs/play.md"
        )
    Vocabulary.of(world)
    return world


def _shown(name: str) -> str:
    return f"[{name}]" if ":" in name else name
