"""What decides by device, tried with tensors that only say they are on a GPU."""

import pytest
import torch
from kernel_cases import arguments, dense, frame_rows, make_case, masked_dense
from pretend_gpu import DEVICE, kernels, on_gpu, watched

import lipass.kernels.ops as ops
from lipass.kernels import chip, dense_call, registry
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.block_sparse.kind import kind_of

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """Let the Triton kernels run, by their definition; give the list of their calls."""
    registry.reset_telemetry()
    return kernels(monkeypatch, "tma", "triton")


def attend(case, lse=False, **changes):
    run = ops._sparse_attention_lse if lse else ops._sparse_attention
    return run(*arguments(case, **changes))


REFUSED = {
    "fp32": ({"dtype": torch.float32, "dim": 64}, (1, 4, 8), "takes bf16 and fp16"),
    "odd head dim": ({"dtype": BF16, "dim": 72}, (1, 4, 8), "takes head dims"),
    "odd volume": ({"dtype": BF16, "dim": 64}, (3, 4, 8), "takes tile volumes"),
    "small tiles": ({"dtype": BF16, "dim": 64}, (1, 4, 4), "takes tile volumes"),
}


@pytest.mark.parametrize("route", ["sparse", None])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_takes_is_dense_and_says_why(name, route, ran):
    shape, tile, reason = REFUSED[name]
    case = make_case("decode", 6, (4, 8), 5, tile, **shape)
    expected = dense(case)
    on_gpu(case)
    with watched() as seen, registry.force(route):
        out = attend(case)
    torch.testing.assert_close(out.held, expected, atol=2e-2, rtol=2e-2)
    assert (ran, seen.reads) == ([], [])
    counts = registry.telemetry()["site"]
    assert (counts.dense_calls, counts.provider) == (1, "sdpa")
    assert counts.reason.startswith("no kernel takes it: tma")
    assert reason in counts.reason
    assert [line.partition(":")[0] for line in counts.refusals] == ["tma", "triton"]


@pytest.mark.parametrize(("tile", "provider"), [((2, 4, 8), "tma"), ((1, 4, 8), "triton")])
def test_what_a_kernel_takes_runs_there(tile, provider, ran):
    case = make_case("decode", 6, (4, 8), 5, tile, dtype=BF16, dim=64)
    expected = masked_dense(case, case.plan())[0]
    on_gpu(case)
    with watched() as seen, registry.force("sparse"):
        out = attend(case)
    torch.testing.assert_close(out.held.double(), expected, atol=2e-2, rtol=2e-2)
    assert (ran, seen.reads) == ([provider], [])
    assert registry.telemetry()["site"].provider == provider


def test_gradients_are_recorded_by_dense_attention():
    case = make_case("decode", 4, (4, 8), 0, (1, 4, 8), dtype=BF16, dim=64)
    kind = kind_of(case.q.requires_grad_(), case.q_grid, case.layout)._replace(device=DEVICE)
    found = registry.find("block_sparse", DEVICE, lambda module: module.why_not(kind))
    assert found.reason.endswith("has no backward, and q, k, v or a bias requires one")


def test_definition_runs_on_a_gpu_only_where_it_is_asked_for():
    case = make_case("decode", 4, (4, 8), 5, (1, 4, 8), dim=16)
    expected, plan = masked_dense(case, case.plan())[0], case.plan()
    on_gpu(case)
    plan = type(plan)(on_gpu(plan.indices), on_gpu(plan.counts), plan.q_grid, plan.kv)
    call = (case.q, case.keys, case.values, plan)
    with watched():
        message = "tma, triton: takes bf16 and fp16, got torch.float32; try provider='reference'"
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*call)
        out = block_sparse_attention(*call, provider="reference")
    torch.testing.assert_close(out.held.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_kernels_are_told_of(device):
    found = registry.find("block_sparse", torch.device(device), lambda module: None)
    assert found.reason == f"no kernel takes it: none for {device}"


@pytest.mark.parametrize(
    ("found", "hip", "message"),
    [((7, 5), None, "compute capability 8.0, which bf16 does too, got 7.5"),
     ((9, 4), "7.1", "made for NVIDIA GPUs, got ROCm 7.1"), ((8, 9), None, None)],
)  # fmt: skip
def test_chips_that_the_kernels_are_not_made_for(found, hip, message, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(chip, "capability", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    why = chip.why_not.__wrapped__(DEVICE)
    assert why is None if message is None else message in why


KEEP = torch.tensor(
    [[True, False, True, True, False, True], [True, True, True, False, False, True]]
)


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize("route", ["dense", "sparse"])
def test_dropped_frames_are_hidden_by_key_wherever_the_mask_is(route, role, lse, where, ran):
    case = make_case(role, 6, (16, 16), 5, (1, 4, 8), dtype=BF16, dim=64, heads=1, batch=2,
                     keep_frames=KEEP, budget=0.999)  # fmt: skip
    rows = [slice(None) if role == "decode" else KEEP[n].repeat_interleave(256) for n in (0, 1)]
    expected = [dense(case, frame_rows(case, KEEP[n]))[n][:, rows[n]] for n in (0, 1)]
    keys = case.layout.tokens
    on_gpu(case)
    keep = KEEP if where == "host" else on_gpu(KEEP)
    with watched() as seen, registry.force(route):
        out = attend(case, lse, keep_frames=keep)
    out = out[0] if lse else out
    for n in (0, 1):
        torch.testing.assert_close(out.held[n][:, rows[n]], expected[n], atol=3e-2, rtol=3e-2)
    assert torch.isfinite(out.held).all()
    assert seen.reads == []
    assert bool(ran) == (route == "sparse" or lse)
    if route == "dense" and not lse:
        # A mask of queries and keys would be the largest tensor there is.
        queries = out.shape[2]
        assert seen.largest < 2 * queries * keys


@pytest.mark.parametrize("route", ["dense", "sparse"])
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_frames_that_leave_for_all_items_leave_before_tiling(route, role):
    keep = torch.tensor([[True, False, True, True]])
    case = make_case(role, 4, (4, 8), 5, (1, 4, 8), dtype=BF16, dim=64, keep_frames=keep)
    case.options["budget"] = 0.999
    expected = dense(case, frame_rows(case, keep[0]))
    on_gpu(case)
    with watched(), registry.force(route):
        out = attend(case).held
    rows = slice(None) if role == "decode" else keep[0].repeat_interleave(32)
    torch.testing.assert_close(out[:, :, rows], expected[:, :, rows], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_items_without_a_kept_frame_stay_finite(role):
    keep = torch.tensor([[True, False, True, True], [False] * 4])
    case = on_gpu(make_case(role, 4, (4, 8), 0, (1, 4, 8), dtype=BF16, dim=64, batch=2))
    with watched(), registry.force("dense"):
        out = attend(case, keep_frames=on_gpu(keep))
    assert torch.isfinite(out.held).all()


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_over_latents_is_applied_latent_by_latent_where_it_is_large(
    causal, lse, where, monkeypatch
):
    case = make_case("prefill", 4, (4, 8), 5, (1, 4, 8), dtype=torch.float32, dim=16)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    if not causal:
        mask[0, :, 1], mask[0, 1, 1] = False, True
    expected, log_sums = masked_dense(case, case.plan(budget=1.0, latent_mask=mask))
    on_gpu(case)
    monkeypatch.setattr(dense_call, "_MASK_ENTRIES", 0)
    with watched() as seen, registry.force("dense"):
        run = ops._sparse_attention_lse if lse else ops._sparse_attention
        given = mask if where == "host" else on_gpu(mask)
        out = run(*arguments(case), latent_mask=given)
    assert seen.reads == []
    if lse:
        torch.testing.assert_close(out[1].held.double(), log_sums, atol=1e-5, rtol=1e-5)
        out = out[0]
    torch.testing.assert_close(out.held.double(), expected, atol=1e-5, rtol=1e-5)


def test_mask_over_latents_on_the_host_plans_on_a_gpu(ran):
    case = make_case("prefill", 4, (4, 8), 5, (1, 4, 8), dtype=BF16, dim=64)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    expected = masked_dense(case, case.plan(latent_mask=mask))[0]
    on_gpu(case)
    with watched() as seen, registry.force("sparse"):
        out = ops._sparse_attention(*arguments(case), latent_mask=mask)
    torch.testing.assert_close(out.held.double(), expected, atol=3e-2, rtol=3e-2)
    assert (ran, seen.reads) == (["triton"], [])
