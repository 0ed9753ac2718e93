"""`lipass.attend`: eager code gets what a compiled graph gets, and is counted like its sites."""

import pytest
import torch
from torch.nn import functional as F

import lipass
from lipass.errors import LipassError
from lipass.kernels import merge_partials, registry, sparse
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import reset_report

WAY_BACK = parse_trajectory("left-15, right-16")
SPARSE = {"sparse.tile": (1, 4, 4), "sparse.dense_chunks": 0, "sparse.dense_tokens": 0}


@pytest.fixture(autouse=True)
def _fresh_counts():
    reset_report()
    registry.reset_telemetry()


def draw(tokens, heads=2, dim=16, dtype=torch.float32):
    return torch.randn(1, heads, tokens, dim, dtype=dtype)


def decode(history=8, text=5, size=(4, 4), new=4, **kinds):
    """Draw queries and the three runs of keys of one call."""
    area = size[0] * size[1]
    lengths = {"text": text, "history": history * area, "current": new * area}
    grids = {"text": None, "history": (history, *size), "current": (new, *size)}
    runs = [(role, draw(n, **kinds), draw(n, **kinds), grids[role]) for role, n in lengths.items()]
    return draw(new * area, **kinds), runs


def dense(q, runs, **options):
    k, v = (torch.cat([run[i] for run in runs], 2) for i in (1, 2))
    return F.scaled_dot_product_attention(q, k, v, **options)


def chunk_of(session, index):
    start = 4 * index
    return session.chunk(poses=WAY_BACK[:start] if start else None, query=WAY_BACK[start:][:4])


def site(name="layer"):
    return lipass.report().sites[name]


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("roles", [3, 2, 1])
@pytest.mark.parametrize("where", ["no session", "budget 1.0", "off"])
def test_dense_attention_where_nothing_is_left_out(size, roles, where):
    q, runs = decode(size=size)
    runs = runs[-roles:]
    if where == "no session":
        out = lipass.attend(q, runs, site="layer")
    else:
        options = {"preset": "sparse", "sparse.budget": 1.0, **SPARSE}
        with lipass.Session(**(options if where == "budget 1.0" else {"preset": "off"})):
            out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)
    assert site().density == 1.0


def test_tile_budget_and_sink_are_those_of_the_session():
    q, runs = decode(history=9)
    options = {**SPARSE, "sparse.budget_decode": 0.25}
    with lipass.Session(preset="sparse", **options), registry.force("sparse"):
        out = lipass.attend(q, runs, site="layer")
    with registry.force("sparse"):
        expected = torch.ops.lipass.sparse_attention(
            q, [run[1] for run in runs], [run[2] for run in runs], [4, 4, 4],
            [1, 1, 5, 9, 4, 4, 4, 4, 4], "text,history,current", [1, 4, 4], 0.25, 0.25, 1,
            "decode", None, "other",
        )  # fmt: skip
    assert torch.equal(out, expected)
    found = site()
    assert found.density < 1.0
    assert (found.action, found.reason) == ("rewritten", "decode, budget 0.25")
    assert (found.role, found.grid) == ("decode", (4, 4, 4))
    assert found.segments == ("text", "history", "current")
    assert found.source.startswith("test_attend.py:")


def test_a_context_without_history_is_prefill():
    q, runs = decode()
    with lipass.Session(preset="sparse", **SPARSE, **{"sparse.budget_prefill": 0.5}):
        lipass.attend(q, [runs[0], runs[2]], site="layer")
    assert site().reason.startswith("prefill, budget 0.5")


def test_a_chunk_that_stays_dense_is_dense_here_too():
    q, runs = decode(history=4)
    options = {"sparse.dense_chunks": 2, "sparse.dense_tokens": 0, "sparse.budget": 0.1}
    session = lipass.Session(preset="sparse", **options)
    with session, chunk_of(session, 1), registry.force("sparse"):
        out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)
    assert "history of 1 chunks < sparse.dense_chunks 2" in site().reason


def test_dense_layers_are_named_by_number():
    q, runs = decode()
    options = {**SPARSE, "sparse.budget": 0.1, "sparse.dense_layers": (1,)}
    with lipass.Session(preset="sparse", **options), registry.force("sparse"):
        for layer in range(2):
            lipass.attend(q, runs, site=f"layer {layer}", layer=layer)
        with pytest.raises(ValueError, match=r"needs the number of each layer.*pass layer="):
            lipass.attend(q, runs, site="layer 2")
    assert site("layer 0").density < 1.0
    assert site("layer 1").density == 1.0
    assert site("layer 1").reason.startswith("layer 1 is in dense_layers")


def test_first_steps_stay_dense():
    q, runs = decode(history=28)
    options = {**SPARSE, "sparse.budget": 0.1, "sparse.dense_steps": 1}
    with (
        lipass.Session(preset="sparse", **options) as session,
        chunk_of(session, 7) as chunk,
        registry.force("sparse"),
    ):
        for _ in chunk.steps((1.0, 0.5, 0.0)):
            lipass.attend(q, runs, site="layer")
    assert (site().calls, site().dense_calls) == (2, 1)
    assert "denoising step 0 < sparse.dense_steps 1" in site().reason


def test_a_replay_of_a_snapshot_is_as_sparse_as_what_was_recorded():
    """Plans hold no budgets: without the config they came with, attention is dense."""
    q, runs = decode(history=28)

    def attended(session, chunk):
        with chunk, registry.force("sparse"):
            return lipass.attend(q, runs, site="layer")

    with lipass.Session(preset="sparse", **SPARSE, **{"sparse.budget": 0.1}) as session:
        recorded = attended(session, chunk_of(session, 7))
        snapshot = session.snapshot()
    config = session.config
    assert site().density < 1.0
    for again in (
        lipass.Session.replay(snapshot),
        lipass.Session.replay(snapshot.plans, config),
        lipass.Session.replay(snapshot, config),
    ):
        with again:
            assert torch.equal(attended(again, again.chunk()), recorded)
    with lipass.Session.replay(snapshot.plans) as again:
        found = attended(again, again.chunk())
    torch.testing.assert_close(found, dense(q, runs), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"got .*sparse\.budget_decode .* for 0\.1"):
        lipass.Session.replay(snapshot, lipass.Config.resolve("sparse", SPARSE))


def test_blocks_rank_as_the_session_says(monkeypatch):
    asked = []
    plan = sparse.plan_attention
    monkeypatch.setattr(
        sparse, "plan_attention", lambda *a, **k: asked.append(k["planner"]) or plan(*a, **k)
    )
    q, runs = decode(history=28)
    for ranking in ("product", "cosine"):
        options = {**SPARSE, "sparse.budget": 0.1, "sparse.ranking": ranking}
        with lipass.Session(preset="sparse", **options), registry.force("sparse"):
            lipass.attend(q, runs, site=ranking)
    assert asked == ["mean", "cosine"]


@pytest.mark.parametrize("given", ["all latents", "those of the context"])
def test_only_the_context_of_the_session_is_read(given):
    q, runs = decode(history=28)
    with lipass.Session(preset="context") as session, chunk_of(session, 7) as chunk:
        assert 0 < len(chunk.context) < 28
        rows = (torch.tensor(chunk.context)[:, None] * 16 + torch.arange(16)).flatten()
        role, k, v, _ = runs[1]
        chosen = (role, k[:, :, rows], v[:, :, rows], (len(chunk.context), 4, 4))
        expected = dense(q, [runs[0], chosen, runs[2]])
        out = lipass.attend(
            q, runs if given == "all latents" else [runs[0], chosen, runs[2]], site="layer"
        )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    told = f"{28 - len(chunk.context)} of 28 history latents are not in the context"
    assert (told in site().reason) == (given == "all latents")


@pytest.mark.parametrize("held", [[*range(14, 28), *range(14)], [*range(20, 28), *range(9)]])
def test_latents_lie_in_the_order_in_which_they_are_held(held):
    q, runs = decode(history=len(held))
    with (
        lipass.Session(preset="context") as session,
        session.chunk(poses=WAY_BACK[:28], query=WAY_BACK[28:32], held=held) as chunk,
    ):
        assert 0 < len(chunk.context) < len(held)
        rows = torch.tensor([held.index(latent) for latent in chunk.context])
        rows = (rows[:, None] * 16 + torch.arange(16)).flatten()
        role, k, v, _ = runs[1]
        chosen = (role, k[:, :, rows], v[:, :, rows], (len(chunk.context), 4, 4))
        out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, dense(q, [runs[0], chosen, runs[2]]), atol=1e-5, rtol=1e-5)


def test_a_history_that_is_neither_is_told_and_refused_under_strict():
    q, runs = decode(history=27)
    for strict in (False, True):
        with lipass.Session(preset="context", strict=strict) as session, chunk_of(session, 7):
            if strict:
                with pytest.raises(LipassError, match=r"strict: .* all 28 that .* got 27; pass"):
                    lipass.attend(q, runs, site="layer")
            else:
                out = lipass.attend(q, runs, site="layer")
                torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)
    assert "none is left out: history must hold" in site().reason


@pytest.mark.parametrize("shape", [(3, 1, 5), (1, 3, 5)])
def test_a_bias_of_another_batch_or_of_other_heads_is_refused(shape):
    q, runs = decode(heads=4)
    runs[0] = (*runs[0], torch.zeros(shape))
    with pytest.raises(ValueError, match=r"bias of text must be .* as q has, got \[.*; write"):
        lipass.attend(q, runs, site="layer")


def test_a_bias_on_another_device_is_refused():
    q, runs = decode(heads=4)
    runs[0] = (*runs[0], torch.zeros(5, device="meta"))
    with pytest.raises(ValueError, match="bias of text must be on cpu as q is, got meta; move it"):
        lipass.attend(q, runs, site="layer")


def test_shared_heads_a_bias_and_parts_that_are_merged():
    q, runs = decode(heads=1)
    q = draw(64, heads=4)
    bias = torch.randn(1, 4, 5)
    runs[0] = (*runs[0], bias)
    whole = torch.cat([bias, torch.zeros(1, 4, 12 * 16)], 2)[:, :, None]
    expected = dense(
        q,
        [(run[0], *(x.expand(-1, 4, -1, -1) for x in run[1:3])) for run in runs],
        attn_mask=whole,
    )
    out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    found = [
        lipass.attend(q, part, site="layer", q_grid=(4, 4), return_lse=True)
        for part in (runs[:1], runs[1:2], runs[2:])
    ]
    merged, _ = merge_partials(*map(list, zip(*found, strict=True)))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_a_grid_of_one_latent_gives_the_number_of_latents():
    q, runs = decode(history=6)
    runs = [(role, k, v, grid and grid[1:]) for role, k, v, grid in runs]
    out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)
    assert site().grid == (4, 4, 4)


def test_the_first_chunk_has_an_empty_history():
    q, runs = decode(history=0)
    with lipass.Session(preset="sparse", **SPARSE):
        out = lipass.attend(q, runs, site="layer")
    torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    q, runs = decode(dtype=dtype)
    out = lipass.attend(q, runs, site="layer", scale=0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out, dense(q, runs, scale=0.3), atol=2e-2, rtol=2e-2)


def changed(number, place, value):
    def change(runs):
        runs[number] = (*runs[number][:place], value, *runs[number][place + 1 :])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(1, 0, "memory"), "roles text, history, current, each at most once, got"),
        (changed(1, 0, "text"), "join keys of one role first"),
        (changed(1, 1, draw(128, heads=3)), "heads of keys of history must divide the 2 of q"),
        (changed(1, 1, draw(128, dim=8)), r"keys of history must be \[B, H, L, D\] with B = 1"),
        (changed(1, 2, draw(127)), "keys and values of history must have one shape"),
        (changed(1, 2, draw(128).half()), "values of history must be torch.float32 on cpu"),
        (changed(1, 3, (7, 4, 4)), "grid of history must be .* of 128 tokens, got"),
        (changed(1, 3, None), "grid of history must be"),
        (changed(2, 3, (5, 8)), r"grid of current must be .* of 64 tokens, got \(5, 8\)"),
        (lambda runs: runs.pop(), "q_grid must be given where no segment is current"),
        (lambda runs: runs.clear(), "must have the roles"),
        (lambda runs: runs.insert(0, (*runs.pop(0), torch.zeros(2, 5))), r"as \[1, H, L\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, runs = decode()
    change(runs)
    with pytest.raises(ValueError, match=message):
        lipass.attend(q, runs, site="layer")


def test_current_keys_are_those_of_the_queries():
    q, runs = decode()
    with pytest.raises(ValueError, match="grid of current, which is that of q, must be"):
        lipass.attend(q[:, :, 1:], runs, site="layer")


@pytest.mark.parametrize("name", ["", "a,b"])
def test_sites_have_one_name(name):
    q, runs = decode()
    with pytest.raises(ValueError, match="a name without commas"):
        lipass.attend(q, runs, site=name)


def test_a_gradient_is_refused_and_not_lost():
    q, runs = decode()
    q.requires_grad_()
    with pytest.raises(LipassError, match=r"call it under torch\.no_grad"):
        lipass.attend(q, runs, site="layer")
    with torch.no_grad():
        lipass.attend(q, runs, site="layer")


def test_sites_are_counted_by_their_names_and_the_table_shows_them():
    q, runs = decode()
    for name in ("first", "second", "second"):
        lipass.attend(q, runs, site=name)
    calls = {name: counts.calls for name, counts in registry.telemetry().items()}
    assert calls == {"first": 1, "second": 2}
    assert "no session is open" in lipass.report().table()


@pytest.mark.parametrize("lse", [False, True])
def test_a_plain_compiler_takes_it_as_one_dense_call(lse):
    q, runs = decode()
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def model(q, text, history, current):
        runs = [
            ("text", *text),
            ("history", *history, (4, 4)),
            ("current", *current, (4, 4, 4)),
        ]
        return lipass.attend(q, runs, site="layer", return_lse=lse)

    with torch.no_grad():
        for history in (8, 9):
            q, runs = decode(history=history)
            found = model(q, *(run[1:3] for run in runs))
            out = found[0] if lse else found
            torch.testing.assert_close(out, dense(q, runs), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


class Planted(torch.nn.Module):
    """A model whose adapter calls `lipass.attend`."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x, text, history, name="mine"):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        latents = history[0].shape[2] // 16
        runs = [
            ("text", *text),
            ("history", *history, (latents, 4, 4)),
            ("current", k, v, (4, 4, 4)),
        ]
        return lipass.attend(q, runs, site=name).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_in_a_compiled_model_it_is_a_site_of_the_graph(budget):
    torch._dynamo.reset()
    model = Planted().eval()
    options = {"preset": "sparse", "sparse.budget": budget, **SPARSE}
    compiled = torch.compile(
        model, backend="light_interaction", options={**options, "inner": "eager"}, dynamic=True
    )
    with torch.no_grad(), registry.force("sparse"):
        for latents in (8, 9):
            x, (_, runs) = torch.randn(1, 64, 32), decode(history=latents)
            out = compiled(x, runs[0][1:3], runs[1][1:3])
            expected = model(x, runs[0][1:3], runs[1][1:3], "eager")
            if budget == 1.0:
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    found = site("mine")
    assert found.reason.startswith(f"decode, budget {budget:g}")
    assert (found.role, found.action) == ("decode", "rewritten")
    assert found.segments == ("text", "history", "current")
    assert registry.telemetry()["mine"].calls == 2
    assert registry.telemetry()["mine"].sparse_calls == (2 if budget < 1 else 0)


def test_in_a_compiled_model_a_dense_chunk_is_dense():
    torch._dynamo.reset()
    model = Planted().eval()
    options = {"sparse.dense_chunks": 3, "sparse.dense_tokens": 0, "sparse.budget": 0.1}
    compiled = torch.compile(
        model,
        backend="light_interaction",
        options={"preset": "sparse", **options, "inner": "eager"},
    )
    x, (_, runs) = torch.randn(1, 64, 32), decode()
    session = lipass.Session(preset="sparse", **options)
    with torch.no_grad(), session, chunk_of(session, 2), registry.force("sparse"):
        out = compiled(x, runs[0][1:3], runs[1][1:3])
    assert registry.telemetry()["mine"].calls == 1
    assert registry.telemetry()["mine"].dense_calls == 1
    with torch.no_grad():
        torch.testing.assert_close(
            out, model(x, runs[0][1:3], runs[1][1:3], "eager"), atol=1e-5, rtol=1e-5
        )
