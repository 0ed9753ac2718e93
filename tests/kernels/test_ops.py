"""The registered operator: exactness at full budget, dropped frames, the gate and its counts."""

import inspect

import pytest
import torch
from kernel_cases import NO_NATIVE, arguments, dense, frame_rows, make_case, masked_dense
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lipass.kernels.ops
from lipass.kernels import calibration, planning, registry
from lipass.kernels.block_sparse import gather, native
from lipass.kernels.calibration import Form, Rates
from lipass.kernels.plan import BlockGrid
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select import vectorized

sparse_attention = torch.ops.lipass.sparse_attention


@pytest.fixture(autouse=True)
def _fresh_counts():
    registry.reset_telemetry()


@pytest.fixture
def joins(monkeypatch):
    """Let dense attention be SDPA, which tests compare to the bit, and sparse never pay."""
    slow, fast = Form(1.0, 1e3, 1e3), Form(0.0, 1e9, 1e9)
    rates = Rates(joined=fast, apart=slow, sparse=slow)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_full_budget_is_exactly_dense(role, size, joins):
    case = make_case(role, 5, size, 7, (4, 4, 4), budget=1.0)
    assert torch.equal(sparse_attention(*arguments(case)), dense(case))
    counts = registry.telemetry()["site"]
    assert (counts.dense_calls, counts.provider, counts.density) == (1, "sdpa", 1.0)
    assert counts.reason == "budget 1.0 visits every block"


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_forced_sparse_equals_masked_dense_of_its_plan(role, size):
    case = make_case(role, 9, size, 7, (1, 4, 4), dim=16)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case))
    plan = case.plan()
    torch.testing.assert_close(out.double(), masked_dense(case, plan)[0], atol=1e-5, rtol=1e-5)
    counts = registry.telemetry()["site"]
    provider = "gather" if NO_NATIVE else "native"
    assert (counts.sparse_calls, counts.provider, counts.role) == (1, provider, role)
    assert counts.density == pytest.approx(float(plan.density()))
    assert counts.density < 1.0


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_ranks_no_blocks_is_dense(scale, joins):
    case = make_case("decode", 9, (8, 8), 7, (1, 4, 4))
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case, scale=scale))
    key, value = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    expected = F.scaled_dot_product_attention(case.q, key, value, scale=scale)
    torch.testing.assert_close(out, expected)
    reason = f"blocks are ranked by a positive scale, got {scale:g}"
    assert registry.telemetry()["site"].reason == reason


def test_query_tile_of_its_own():
    case = make_case("decode", 8, (4, 4), 3, (1, 4, 4), q_tile=(2, 4, 4))
    call = list(arguments(case))
    call[6] = [1, 4, 4, 2, 4, 4]
    with registry.force("sparse"):
        out = sparse_attention(*call)
    expected = masked_dense(case, case.plan())[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("route", ["sparse", "dense", None])
def test_dropped_history_is_not_seen(route):
    keep = torch.tensor([[True, False, False, True, True, False]])
    case = make_case("decode", 6, (4, 4), 3, (2, 4, 4), budget=0.999, keep_frames=keep)
    with registry.force(route):
        out = sparse_attention(*arguments(case))
    torch.testing.assert_close(out, dense(case, frame_rows(case, keep[0])), atol=1e-5, rtol=1e-5)
    counts = registry.telemetry()["site"]
    assert counts.dropped_latents == 3
    assert counts.visited_blocks < counts.total_blocks


@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_dropped_context_is_not_seen_and_stays_finite(route):
    keep = torch.tensor([[True, False, True, True, False]])
    case = make_case("prefill", 5, (4, 4), 3, (1, 4, 4), budget=0.999, keep_frames=keep)
    with registry.force(route):
        out = sparse_attention(*arguments(case))
    kept = keep[0].repeat_interleave(16)
    expected = dense(case, frame_rows(case, keep[0]))
    torch.testing.assert_close(out[:, :, kept], expected[:, :, kept], atol=1e-5, rtol=1e-5)
    own = torch.arange(3 + 16, 3 + 32)  # text and the dropped frame itself
    rows = torch.zeros(case.layout.tokens, dtype=torch.bool)
    rows[:3], rows[own] = True, True
    torch.testing.assert_close(
        out[:, :, 16:32], dense(case, rows)[:, :, 16:32], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_batch_items_drop_their_own_frames(role, route):
    keep = torch.tensor([[True, False, True, True], [True, True, False, True]])
    case = make_case(
        role, 4, (4, 4), 3, (1, 4, 4), budget=0.999, keep_frames=keep, batch=2, sink_latents=0
    )
    with registry.force(route):
        out = sparse_attention(*arguments(case))
    for item in range(2):
        expected = dense(case, frame_rows(case, keep[item]))[item]
        rows = slice(None) if role == "decode" else keep[item].repeat_interleave(16)
        torch.testing.assert_close(out[item][:, rows], expected[:, rows], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out).all()


def test_all_frames_dropped_leaves_text_and_current():
    keep = torch.zeros(1, 6, dtype=torch.bool)
    case = make_case("decode", 6, (4, 4), 3, (2, 4, 4), keep_frames=keep)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case))
    torch.testing.assert_close(out, dense(case, frame_rows(case, keep[0])), atol=1e-5, rtol=1e-5)
    case = make_case("prefill", 6, (4, 4), 3, (2, 4, 4), keep_frames=keep)
    assert torch.isfinite(sparse_attention(*arguments(case))).all()


def test_kept_frames_leave_the_result_as_it_was():
    case = make_case("decode", 6, (4, 4), 3, (2, 4, 4))
    everything = torch.ones(1, 6, dtype=torch.bool)
    with registry.force("sparse"):
        expected = sparse_attention(*arguments(case))
        assert torch.equal(sparse_attention(*arguments(case, keep_frames=everything)), expected)


@pytest.mark.parametrize("dense_in_pieces", [False, True])
def test_dropped_frames_cost_no_work(dense_in_pieces, monkeypatch):
    if dense_in_pieces and NO_NATIVE:
        pytest.skip(NO_NATIVE)

    slow, fast = Form(1.0, 1e3, 1e3), Form(0.0, 1e9, 1e9)
    rates = Rates(slow, fast, fast) if dense_in_pieces else Rates(fast, slow, slow)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)
    case = make_case("decode", 16, (8, 8), 32, (4, 4, 4), dim=64)
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[:, ::4] = True
    with registry.force("sparse"):
        flops = [work(case, keep_frames=frames) for frames in (None, keep)]
    assert flops[1] < 0.8 * flops[0]
    with registry.force("dense"):
        flops = [work(case, keep_frames=frames) for frames in (None, keep)]
    # Text and current stay: 32 + 4 * 64 + 128 keys of 32 + 16 * 64 + 128.
    assert flops[1] * 1184 == flops[0] * 416


def work(case, **changes):
    """Count products of the attention calls inside one operator call."""
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal products
            if "scaled_dot_product" in str(func):
                q, k = args[0], args[1]
                products += q.shape[:-1].numel() * k.shape[2] * q.shape[3]
            if "lipass_native.attend" in str(func):
                products += native_products(*args[:6])
            return func(*args, **(kwargs or {}))

    with Count():
        lipass.kernels.ops._sparse_attention(*arguments(case, **changes))
    assert products
    return products


def native_products(q, keys, values, indices, counts, numbers):
    """Count the products of a call of the compiled kernel, for blocks of any size."""
    q_grid, *grids = (
        BlockGrid(tuple(numbers[n : n + 3]), tuple(numbers[n + 3 : n + 6]))
        for n in range(0, len(numbers), 6)
    )
    key_tokens = torch.cat([grid.lengths() for grid in grids])
    visited = torch.arange(indices.shape[-1]) < counts[..., None]
    per_query = (key_tokens[indices.clamp_min(0)] * visited).sum(-1)
    return int((per_query * q_grid.lengths()).sum()) * q.shape[3]


def test_hot_code_reads_nothing_back():
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func._opname not in ("_local_scalar_dense", "nonzero", "unique", "equal"), func
            return func(*args, **(kwargs or {}))

    keep = torch.tensor([[True, False, True, True]])
    for frames in (None, keep):
        case = make_case("decode", 4, (4, 4), 3, (1, 4, 4), keep_frames=frames)
        case.plan()  # tables that follow from shapes alone are built on the first call
        with NoSync():
            plan = case.plan()
            for module in (gather, native):
                if module is native and NO_NATIVE:
                    continue
                module.block_sparse_attention(
                    case.q, case.keys, case.values, plan, scale=1.0, key_bias=None
                )
    for module in (planning, gather, native):
        assert not any(
            read in inspect.getsource(module) for read in (".item(", ".cpu(", ".tolist(")
        )
    assert ".item(" not in inspect.getsource(vectorized)


def test_gate_keeps_dense_what_would_be_slower(joins):
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4), budget=0.1)
    out = sparse_attention(*arguments(case))
    assert torch.equal(out, dense(case))
    reason = registry.telemetry()["site"].reason
    assert reason.startswith("predicted ")
    assert "ms sparse vs" in reason


def test_gate_takes_sparse_where_it_pays(monkeypatch):
    rates = Rates(*[Form(0.0, 1e6, 1e12)] * 3)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)
    case = make_case("decode", 16, (4, 4), 3, (1, 4, 4), budget=0.1)
    sparse_attention(*arguments(case))
    assert registry.telemetry()["site"].sparse_calls == 1


def test_plan_that_visits_everything_stays_dense(joins):
    case = make_case("decode", 2, (4, 4), 3, (2, 4, 4), budget=0.1)  # the sink is all history
    assert torch.equal(sparse_attention(*arguments(case)), dense(case))
    assert "visit every block" in registry.telemetry()["site"].reason


def test_first_chunk_has_no_history(joins):
    case = make_case("decode", 0, (4, 4), 3, (2, 4, 4))
    assert torch.equal(sparse_attention(*arguments(case)), dense(case))


def test_route_is_restored_and_checked():
    with registry.force("dense"), registry.force("sparse"):
        assert registry.forced_route() == "sparse"
    assert registry.forced_route() is None
    with pytest.raises(ValueError, match="got 'fast'"), registry.force("fast"):
        pass


def test_sites_are_counted_apart(caplog):
    case = make_case("decode", 2, (4, 4), 3, (1, 4, 4), budget=0.1)
    with caplog.at_level("INFO"):
        for site in ("first", "second", "second"):
            sparse_attention(*arguments(case, site=site))
    calls = {name: counts.calls for name, counts in registry.telemetry().items()}
    assert calls == {"first": 1, "second": 2}
    assert sum("kept dense" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_operator_is_well_formed(role):
    case = make_case(role, 8, (4, 4), 3, (1, 4, 4))
    tests = ("test_schema", "test_faketensor")
    with registry.force("sparse"):
        torch.library.opcheck(sparse_attention.default, arguments(case), test_utils=tests)


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_output_lies_token_by_token_whatever_the_layout_of_q(layout):
    case = make_case("decode", 8, (4, 4), 3, (1, 4, 4))
    case.q = case.q.permute(layout).contiguous().permute(layout)
    for route in ("sparse", "dense"):
        with registry.force(route):
            assert sparse_attention(*arguments(case)).transpose(1, 2).is_contiguous()


def test_compiles_once_for_all_history_lengths():
    frames = []

    def backend(module, inputs):
        frames.append(module)
        return module.forward

    @torch.compile(backend=backend, dynamic=True)
    def attend(q, k_text, k_history, k_current):
        n = k_history.shape[2] // 16
        keys = [k_text, k_history, k_current]
        grids = [1, 1, k_text.shape[2], n, 4, 4, 2, 4, 4]
        return sparse_attention(
            q, keys, keys, [2, 4, 4], grids, "text,history,current", [1, 4, 4], 0.5, 0.3, 1,
            "decode", None, "site",
        )  # fmt: skip

    with registry.force("sparse"):
        for n in (4, 5, 8):
            case = make_case("decode", n, (4, 4), 3, (1, 4, 4), budget=0.5)
            case.options["scale"] = 0.3
            case.values = case.keys
            expected = masked_dense(case, case.plan())[0]
            out = attend(case.q, *case.keys)
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 2, 5, 8), "q must hold 32 tokens"),
        (1, [], "k must hold"),
        (3, [3, 4, 4], "as q_grid"),
        (4, [1, 1, 3], "3 numbers per role"),
        (5, "text,past,current", "role must be one of"),
        (6, [1, 4], "tile must be 3 sizes, or 6"),
        (7, 0.0, r"budget must be in \(0, 1\], got 0.0"),
        (10, "cross", "got 'cross'"),
        (11, torch.ones(1, 3, dtype=torch.bool), r"\[1, 4\], got \[1, 3\]"),
    ],
)
def test_wrong_calls_are_refused(position, value, message):
    call = list(arguments(make_case("decode", 4, (4, 4), 3, (1, 4, 4))))
    call[position] = value
    with pytest.raises(ValueError, match=message):
        sparse_attention(*call)


UNFIT = {
    "one head": lambda part: part[:, :1],
    "another batch": lambda part: part.repeat(2, 1, 1, 1),
    "another head dim": lambda part: part[..., :4],
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_keys_that_do_not_go_with_the_queries_are_refused(unfit, name, route):
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4))
    parts = getattr(case, name)
    parts[1] = UNFIT[unfit](parts[1])
    with registry.force(route), pytest.raises(ValueError, match="expand grouped or shared heads"):
        sparse_attention(*arguments(case))


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_plan_of_keys_that_do_not_go_with_the_queries_is_refused(unfit):
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4))
    case.keys[1] = UNFIT[unfit](case.keys[1])
    with pytest.raises(ValueError, match=r"k must have the batch, heads and head dim .*; expand"):
        case.plan()


def test_a_plan_of_too_few_keys_is_refused():
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4))
    case.keys[1] = case.keys[1][:, :, :5]
    with pytest.raises(ValueError, match=r"\[3, 64, 32\] tokens by segment, got \[3, 5, 32\]; "):
        case.plan()


@pytest.mark.parametrize("tile", [(1, 4, 4), (2, 4, 4)])
@pytest.mark.parametrize("dropped", [(), (1, 4)])
def test_means_of_the_history_may_be_given(tile, dropped):
    keep = torch.ones(1, 6, dtype=torch.bool)
    keep[0, list(dropped)] = False
    case = make_case("decode", 6, (4, 8), 3, tile, budget=0.4, keep_frames=keep)
    history = case.layout.segments[1].grid
    means = torch.ops.lipass.pool_blocks(case.keys[1], list(history.grid), list(tile))
    with registry.force("sparse"):
        expected = sparse_attention(*arguments(case))
        out = sparse_attention(*arguments(case), history_means=means)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


@pytest.mark.skipif(bool(NO_NATIVE), reason=str(NO_NATIVE))
def test_given_means_are_what_blocks_are_chosen_by():
    case = make_case("decode", 6, (4, 8), 3, (1, 4, 8), budget=0.2, sink_latents=0, dim=16)
    means = torch.randn(*case.q.shape[:2], 6, 16)
    plan = case.plan(candidate_means=means)
    score = torch.einsum("bhqd,bhkd->bhqk", pool_blocks(case.q, case.q_grid), means)
    chosen = score.topk(2).indices.sort().values + 1
    torch.testing.assert_close(plan.indices[..., 1:3], chosen.int())


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        ("prefill", (1, 3, 4, 16), "must come with role 'decode'"),
        ("decode", (1, 3, 5, 16), "pool the keys with the tile of the call"),
    ],
)
def test_means_that_do_not_fit_are_refused(role, shape, message):
    case = make_case(role, 4, (4, 4), 3, (1, 4, 4), heads=3, dim=16)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments(case), history_means=torch.zeros(shape))


@pytest.mark.parametrize("means", [torch.zeros(1, 3, 3, 16), torch.zeros(1, 3, 4, 16).half()])
def test_means_that_do_not_fit_never_reach_a_kernel(means):
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4), heads=3, dim=16)
    with pytest.raises(ValueError, match=r"\[1, 3, 4, 16\] fp32, got"):
        case.plan(candidate_means=means)


def test_pooling_passes_opcheck():
    x = torch.randn(1, 2, 24, 8)
    torch.library.opcheck(torch.ops.lipass.pool_blocks.default, (x, [2, 3, 4], [1, 2, 4]))


def test_roles_that_a_route_leaves_out_keep_the_one_around():
    with registry.force("sparse"), registry.force("dense", "a reason", but_roles=("self",)):
        assert (registry.forced_route("self"), registry.forced_route("decode")) == (
            "sparse",
            "dense",
        )
    with registry.force("dense", but_roles=("self",)):
        assert registry.forced_route("self") is None
