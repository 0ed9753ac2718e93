"""The same application on several devices or machines, as a deployment of Ray Serve.

A replica has a device, the world compiled on it, and a few visitors. A socket stays with its
replica as long as it is open, so sessions are where their sockets are. More replicas begin when
more sockets are open than the ones there want. What a visit knows is kept behind each chunk in an
actor beside the replicas: where one dies, its sockets break, pages come back by themselves, and
whichever replica they reach goes on from the latest chunk.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import Any

from lipass.errors import LipassError
from lipass.play.keep import Keep
from lipass.play.serving import Serving

log = logging.getLogger(__name__)

APPLICATION = "lipass-play"
# In the environment, seconds that a proxy may take to begin.
PROXY_BEGINS = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
_KEEPER = "lipass-play-keep"
# Of its most visitors, a replica wants so many; then another one begins.
_WANTED = 0.75
# How long somebody who comes back waits for what is kept.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Scale:
    """How many replicas there are.

    Attributes:
        fewest: that are always there.
        most: that there may be.
        cpus: of one replica.
        gpus: of one replica.
    """

    fewest: int = 1
    most: int = 2
    cpus: float = 1.0
    gpus: float = 0.0


class RayKeep:
    """Keeps visits in an actor, for who comes back to another replica."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._sent: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, ticket: str, parts: dict[str, bytes]) -> None:
        """Send parts on their way; a chunk does not wait for it, but for the one before."""
        import ray

        name = f"{ticket}/{'-'.join(sorted(parts))}"
        with self._lock:
            before = self._sent.pop(name, None)
        if before is not None:  # never more than one part of a kind is under way
            ray.wait([before], timeout=_ANSWER_S)
        sent = self._actor.put.remote(ticket, parts)
        with self._lock:
            self._sent[name] = sent
            while len(self._sent) > 1024:
                self._sent.pop(next(iter(self._sent)))

    def get(self, ticket: str) -> dict[str, bytes]:
        """Ask for the parts of a visit."""
        import ray

        found: dict[str, bytes] = ray.get(self._actor.get.remote(ticket), timeout=_ANSWER_S)
        return found


def deploy(target: str, serving: Serving, scale: Scale, host: str, port: int) -> None:
    """Run a world on the Ray cluster that is there, or on one of this machine.

    Args:
        target: what `lipass play` takes; must be there on all machines of the cluster.
        serving: who may come; `visitors` are those of one replica.
        scale: how many replicas.
        host: address to listen at.
        port: a number of its own; Ray takes no free one.

    Raises:
        LipassError: Ray Serve is not installed.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise LipassError(
            "--ray needs Ray Serve, got none; run pip install 'lipass[ray]'"
        ) from None
    if not ray.is_initialized():
        # A proxy that is slower to begin is killed and begun anew: on busy cores without end.
        os.environ.setdefault(*PROXY_BEGINS)
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    # Films lie in the replica that made them, and a link may reach any.
    serving = replace(serving, films=False)
    keeper = ray.remote(num_cpus=0, max_restarts=-1, lifetime="detached")(Keep)
    keeper.options(name=_KEEPER, namespace=_KEEPER, get_if_exists=True).remote(serving.keep_s)

    def build() -> Any:
        actor = ray.get_actor(_KEEPER, namespace=_KEEPER)
        return _replica(target, serving, actor)

    serve.start(http_options={"host": host, "port": port})
    replicas = serve.deployment(
        serve.ingress(build)(_Replica),
        # Who finds all replicas full waits for one; two places are for what a page loads.
        max_ongoing_requests=serving.visitors + 2,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        autoscaling_config={
            "min_replicas": scale.fewest,
            "max_replicas": scale.most,
            "target_ongoing_requests": max(1.0, _WANTED * serving.visitors),
            "metrics_interval_s": 2.0,
            "look_back_period_s": 6.0,
            "upscale_delay_s": 5.0,
        },
        graceful_shutdown_timeout_s=3,
    )
    serve.run(replicas.bind(), name=APPLICATION, route_prefix="/")


class _Replica:
    """What Ray calls the application; all of it is in the application."""


def _replica(target: str, serving: Serving, actor: Any) -> Any:
    """Build the application of one replica, in it."""
    from ray import serve

    from lipass.cli.play import load_world

    world = load_world(target)
    host = serving.host(world, keep=RayKeep(actor), keep_chunks=True)
    host.name = serve.get_replica_context().replica_id.unique_id
    # A world that does not compile ends its replica, and Ray begins another one.
    host.ended = lambda: os._exit(1)
    return serving.application(host)


def close() -> None:
    """End the deployment, and the cluster if it is of this process."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.kill(ray.get_actor(_KEEPER, namespace=_KEEPER))
    ray.shutdown()
