"""Compare ways to bound the history of the streaming model: all roll out at once, a chunk in turn.

Every contender generates the same chunk with the same noise before any goes on to the next, so a
machine that drifts drifts for all, and the same chunk of each is timed next to the others'.
"""

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lipass
from lipass.kernels import registry

from .camera import FOV_DEG
from .codec import Codec
from .metrics import psnr_db
from .model import CHUNK_LATENTS, KeyValue, tokenize
from .stream import StreamWorld
from .stream_rollout import GrownCache, StreamedChunk, chunks_of
from .stream_walks import out_and_back
from .train_batches import prompt_of
from .world import Attributes, make_room, render

# Set by hand, not tuned.
_VIEW = {"hfov_deg": FOV_DEG, "vfov_deg": FOV_DEG}
_ENDS = {"context.sink_latents": 1, "context.window_chunks_max": 1}
_CHUNKS = {**_VIEW, **_ENDS, "context.memory_chunks": 8}
_MORE_CHUNKS = {**_CHUNKS, "context.memory_chunks": 20}
_LATENTS = {**_VIEW, **_ENDS, "context.memory_latents": 8}
# What poses have chosen is not thinned a second time: tiles of it cost more than they save.
_UNTHINNED = {"sparse.dense_tokens": 8192}
HELD_CHUNKS = 32
MORE_HELD_CHUNKS = 48
DENSE = "dense"
# Windows that read less than that, as much, and more; their first chunk is a sink.
WINDOWS_CHUNKS = 4, 10, 20
# Chunks whose times are one figure: the median of the first of them that are generated, or last.
_TIMED_CHUNKS = 4


@dataclass(frozen=True)
class Method:
    """One way to bound the history.

    Attributes:
        name: in tables.
        options: flat options of the backend and the session; a preset of `off` or `exact` has no
            session.
        limit_chunks: chunks that the cache holds at most; None holds all.
        sink_chunks: first chunks that a window keeps.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    limit_chunks: int | None = None
    sink_chunks: int = 0


METHODS = {
    method.name: method
    for method in (
        Method(DENSE, {"preset": "off"}),
        *(Method(f"window {n}", {"preset": "off"}, n, 1) for n in WINDOWS_CHUNKS),
        Method("keep-kv", {"preset": "context", **_CHUNKS}),
        Method("keep-kv, 32 chunks held", {"preset": "context", **_CHUNKS}, HELD_CHUNKS),
        Method("keep-kv by latents", {"preset": "context", **_LATENTS}, HELD_CHUNKS),
        Method("all", {"preset": "all", **_CHUNKS, **_UNTHINNED}, HELD_CHUNKS),
        Method(
            "all, 20 of 48 chunks",
            {"preset": "all", **_MORE_CHUNKS, **_UNTHINNED},
            MORE_HELD_CHUNKS,
        ),
        Method("merge-history", {"preset": "exact", "merge": True, "merge.threshold": 0.7}),
    )
}


@dataclass(frozen=True)
class Walk:
    """A walk with loops whose second half leads back over the first, which is given.

    `given [1, C, F/2, Y, X]`, `w2c [F, 4, 4]`, `truth [F/2, 3, H, W]` of the way back.
    """

    room: int
    given: Tensor
    w2c: Tensor
    truth: Tensor


@torch.no_grad()
def make_walk(room: int, chunks: int, codec: Codec) -> Walk:
    """Draw, render and encode a walk of `chunks` chunks in a room."""
    drawn = make_room(room)
    w2c = out_and_back(drawn, chunks * CHUNK_LATENTS)
    out = render(drawn, w2c[: len(w2c) // 2], [Attributes()])[0]
    return Walk(room, codec.encode(out).transpose(0, 1)[None], w2c, out.flip(0))


class StreamContender:
    """The streaming model compiled with the options of a method."""

    def __init__(self, method: Method, model: StreamWorld, inner: str) -> None:
        self.method = method
        self.options = {**method.options, "inner": inner}
        self.compiled = torch.compile(
            copy.deepcopy(model), backend="light_interaction", options=self.options
        )
        self.recompiles = 0

    def __call__(
        self,
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        cache,
        *args,
        **how,
    ) -> Any:
        """Call the compiled model; the length of the cache is the one dimension that varies."""
        for tensor in (t for pair in cache or () for t in pair):
            torch._dynamo.mark_dynamic(tensor, 2)
        graphs = _graphs_compiled()
        made = self.compiled(latents, sigma, w2c, text, cache, *args, **how)
        self.recompiles += _graphs_compiled() - graphs
        return made

    def session(self) -> "lipass.Session | None":
        """A new session for one rollout; none where nothing may change."""
        chosen = lipass.Config.resolve(None, self.options)
        approximates = chosen.context or chosen.steps or chosen.sparse or chosen.merge
        return lipass.Session(chosen) if approximates else None

    def warm_up(self, walk: Walk, text: list[KeyValue]) -> float:
        """Compile on the first chunks of a walk; returns seconds. What compiles later counts."""
        begin = time.perf_counter()
        # One recorded chunk, then three: none, one and several chunks of history.
        first = Walk(walk.room, walk.given[:, :, :CHUNK_LATENTS], walk.w2c[:16], walk.truth)
        with warnings.catch_warnings():
            # So short a walk leaves nothing out, which a session tells.
            warnings.filterwarnings("ignore", category=lipass.LipassWarning)
            Run(self, first, text).finish()
        self.recompiles = 0
        return time.perf_counter() - begin


class Run:
    """One rollout of a contender, a chunk at a time.

    Attributes:
        chunks: those so far, the given ones first.
        kv_bytes_peak: most bytes that the cache held.
    """

    def __init__(self, contender: StreamContender, walk: Walk, text: list[KeyValue]) -> None:
        method = contender.method
        self.contender, self.walk = contender, walk
        self.cache = GrownCache(method.limit_chunks, method.sink_chunks)
        self.session = contender.session()
        self.chunks: list[StreamedChunk] = []
        self.kv_bytes_peak = 0
        self._visited = self._blocks = self._samples = 0
        self._mass = 0.0
        self._rest = chunks_of(
            contender, text, walk.given, walk.w2c[None],
            seed=walk.room, cache=self.cache, session=self.session,
        )  # fmt: skip

    def advance(self) -> None:
        """Enter or generate the next chunk."""
        registry.reset_telemetry()
        with torch.no_grad():
            self.chunks.append(next(self._rest))
        for counted in registry.telemetry().values():
            self._visited += counted.visited_blocks
            self._blocks += counted.total_blocks
            self._samples += counted.mass_samples
            self._mass += counted.kept_mass
        assert self.cache.pairs is not None
        held = sum(t.numel() * t.element_size() for pair in self.cache.pairs for t in pair)
        self.kv_bytes_peak = max(self.kv_bytes_peak, held)

    def finish(self) -> None:
        """Go on to the end of the walk."""
        while len(self.chunks) * CHUNK_LATENTS < len(self.walk.w2c):
            self.advance()
        self.close()

    def close(self) -> None:
        """Forget the session and the cache."""
        if self.session is not None:
            self.session.close()
        self._rest.close()

    @property
    def generated(self) -> list[StreamedChunk]:
        """The chunks of the way back so far."""
        given = self.walk.given.shape[2]
        return [chunk for chunk in self.chunks if chunk.start >= given]

    @property
    def density(self) -> float:
        """Share of key blocks visited by calls of ours; 1 where there were none."""
        return self._visited / self._blocks if self._blocks else 1.0

    @property
    def kept_mass(self) -> float | None:
        """Attention that visited keys held, of sampled queries; None where none were."""
        return self._mass / self._samples if self._samples else None

    def frames(self, codec: Codec) -> Tensor:
        """Decode the way back: `[F/2, 3, H, W]`."""
        latents = torch.cat([chunk.latents for chunk in self.generated], 2)
        return codec.decode(latents[0].transpose(0, 1))


def compare(
    contenders: list[StreamContender],
    walk: Walk,
    text: list[KeyValue],
    progress: Callable[[str], None],
) -> list[Run]:
    """Roll out all contenders along a walk, a chunk of each in turn."""
    runs = [Run(contender, walk, text) for contender in contenders]
    chunks = len(walk.w2c) // CHUNK_LATENTS
    for index in range(chunks):
        for run in runs:
            run.advance()
        progress(f"chunk {index + 1} of {chunks}")
    for run in runs:
        run.close()
    return runs


def rows(runs: list[Run], codec: Codec) -> list[dict[str, Any]]:
    """Give the figures of each run; times and pictures are compared with those of `dense`.

    Where it is not among them, what compares with it is None.
    """
    dense = next((run for run in runs if run.contender.method.name == DENSE), None)
    shown = None if dense is None else dense.frames(codec)
    return [_row(run, dense, run.frames(codec), shown) for run in runs]


def _row(run: Run, dense: Run | None, shown: Tensor, wanted: Tensor | None) -> dict[str, Any]:
    generated = run.generated
    seconds = [chunk.seconds for chunk in generated]
    row = {
        "model": "stream",
        "method": run.contender.method.name,
        "room": run.walk.room,
        "chunks": len(run.chunks),
        "kv_tokens": len(generated[-1].context) * math.prod(run.walk.given.shape[-2:]),
        "chunk_s_first": statistics.median(seconds[:_TIMED_CHUNKS]),
        "chunk_s_last": statistics.median(seconds[-_TIMED_CHUNKS:]),
        "speedup_vs_dense": None,
        "psnr_vs_dense_db": None,
        "psnr_vs_truth_db": psnr_db(shown, run.walk.truth),
        "density": run.density,
        "kv_bytes_peak": run.kv_bytes_peak,
        "steps_computed": sum(chunk.steps_computed for chunk in generated),
        "recompiles_after_warmup": run.contender.recompiles,
    }
    if dense is not None and wanted is not None and run is not dense:
        pairs = zip(dense.generated, generated, strict=True)
        ratios = [slow.seconds / fast.seconds for slow, fast in pairs]
        row["speedup_vs_dense"] = statistics.median(ratios[-_TIMED_CHUNKS:])
        row["psnr_vs_dense_db"] = psnr_db(shown, wanted)
    return row


def _graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def text_of(model: StreamWorld) -> list[KeyValue]:
    """Encode the prompt of the walks."""
    with torch.no_grad():
        return model.text(tokenize(prompt_of(Attributes()))[None])
