"""The compiled form: its precision, what it does with odd inputs, and how it is built."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NO_NATIVE, cases, make_case, masked_dense
from torch.nn import functional as F

from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.api import block_sparse_attention, merge_partials

needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")


def attend(case, plan, **options):
    return block_sparse_attention(
        case.q, case.keys, case.values, plan,
        scale=case.options["scale"], provider="native", **options,
    )  # fmt: skip


@needs_native
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_those_of_dense_attention(dtype, dim):
    case = make_case("decode", 8, (8, 8), 32, (1, 8, 8), dim=dim, dtype=dtype, budget=0.999)
    exact = masked_dense(case, case.plan())[0]
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    dense = F.scaled_dot_product_attention(case.q, k, v)
    allowed = 1.5 * (dense.double() - exact).square().mean().sqrt()
    error = (attend(case, case.plan()).double() - exact).square().mean().sqrt()
    # In fp32 both are rounding only: 1e-7 of values around 0.1.
    assert error <= max(allowed, 1e-7 if dtype == torch.float32 else 0.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(1, 8, 8), (4, 4, 4)])
def test_large_logits_and_one_dominant_key(dtype, tile):
    case = make_case("decode", 8, (8, 8), 5, tile, dim=64, dtype=dtype)
    case.q.mul_(100)
    case.keys[1][:, :, 17].mul_(20)
    plan = case.plan()
    expected = masked_dense(case, plan)[0]
    found = attend(case, plan).double()
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale, dtype):
    case = make_case("decode", 4, (5, 7), 5, (1, 8, 8), dim=16, dtype=dtype)
    case.options["scale"] = 0.3
    plan = case.plan()
    case.options["scale"] = scale
    found = attend(case, plan).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, masked_dense(case, plan)[0], atol=tolerance, rtol=tolerance)


@needs_native
@pytest.mark.parametrize("dim", [2, 6, 7, 20, 40, 74, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims_that_fill_no_tile(dtype, dim):
    case = make_case("decode", 4, (5, 7), 33, (1, 8, 8), dim=dim, dtype=dtype)
    plan = case.plan()
    expected, expected_lse = masked_dense(case, plan)
    out, lse = attend(case, plan, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("growth", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxima_that_grow_from_block_to_block(dtype, growth):
    case = make_case("decode", 12, (8, 16), 0, (1, 8, 16), dim=64, dtype=dtype, budget=0.999)
    plan = case.plan()
    # Logits of block n lie around n * growth for half of the queries, -n * growth for the others.
    case.q[..., 0] = torch.where(torch.arange(case.q.shape[2]) % 2 == 0, 1.0, -1.0)
    for part in case.keys:
        blocks = torch.arange(part.shape[2]) // 128
        part[..., 0] = blocks * growth / case.options["scale"]
    expected, expected_lse = masked_dense(case, plan)
    out, lse = attend(case, plan, return_lse=True)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@needs_native
@settings(max_examples=40)
@given(case=cases(), data=st.data())
def test_any_split_of_the_keys_merges_to_the_whole(case, data):
    plan = case.plan(keep_frames=None)
    expected, expected_lse = masked_dense(case, plan)
    width = plan.indices.shape[-1]
    cuts = data.draw(st.lists(st.integers(0, width), max_size=3).map(sorted))
    outputs, lses = [], []
    for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
        part = plan.indices[..., start:stop]
        counts = torch.full_like(plan.counts, stop - start)
        some = plan._replace(indices=part, counts=counts, shared_segments=())
        out, lse = attend(case, some, return_lse=True)
        outputs.append(out)
        lses.append(lse)
    merged, lse = merge_partials(outputs, lses)
    torch.testing.assert_close(merged.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_is_written_and_nothing_else_is_read(dtype):
    case = make_case("prefill", 5, (5, 7), 33, (2, 4, 4), dim=64, dtype=dtype, budget=0.2)
    plan = case.plan()
    expected = masked_dense(case, plan)[0]
    hidden = ~plan.to_dense_mask().any(2).any(1)[0]
    for parts in (case.keys, case.values):
        whole = torch.cat(parts, 2)
        whole[:, :, hidden] = torch.nan
        parts[:] = whole.split([part.shape[2] for part in parts], 2)
    # Fresh memory is nan in deterministic mode.
    torch.use_deterministic_algorithms(True)
    try:
        found = attend(case, plan).double()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_of_each_head(dtype):
    case = make_case("decode", 8, (8, 8), 33, (1, 8, 8), dim=64, dtype=dtype, batch=2)
    plan, bias = case.plan(), torch.randn(2, 2, 33 + 10 * 64)
    bias[0, 1, 40:300] = -torch.inf
    expected, expected_lse = masked_dense(case, plan, bias)
    out, lse = attend(case, plan, key_bias=bias, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@needs_native
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda case, plan: case.keys.__setitem__(1, case.keys[1][:, :1])),
        ("v", lambda case, plan: case.values.__setitem__(1, case.values[1][..., :4])),
        ("k", lambda case, plan: case.keys.__setitem__(1, case.keys[1][:, :, :9])),
        ("q", lambda case, plan: setattr(case, "q", case.q[:, :, :9])),
        ("indices", lambda case, plan: plan._replace(indices=plan.indices[:, :1])),
        ("counts", lambda case, plan: plan._replace(counts=plan.counts[..., :1])),
        ("key_keep", lambda case, plan: plan._replace(key_keep=torch.ones(1, 9).bool())),
    ],
)
def test_the_library_reads_past_no_end(name, change):
    case = make_case("decode", 4, (8, 8), 32, (1, 8, 8))
    plan = case.plan()
    plan = change(case, plan) or plan
    with pytest.raises(RuntimeError, match=f"^{name} must be .*, got .*; pass what belongs to"):
        native.block_sparse_attention(
            case.q, case.keys, case.values, plan, scale=0.3, key_bias=None
        )


@needs_native
@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 3, 352), (2, 2, 352), (1, 352)])
def test_the_library_reads_past_no_end_of_a_bias(shape):
    case = make_case("decode", 4, (8, 8), 32, (1, 8, 8), new_frames=1)
    with pytest.raises(RuntimeError, match=r"^key_bias must be .*, got .*; "):
        native.block_sparse_attention(
            case.q, case.keys, case.values, case.plan(), scale=0.3, key_bias=torch.zeros(shape)
        )


@needs_native
@pytest.mark.parametrize("unfit", ["one head", "another head dim"])
def test_the_library_plans_no_keys_of_other_heads(unfit):
    q, grid = torch.zeros(1, 8, 64, 16), [1, 8, 8, 1, 4, 4]
    k = q[:, :2] if unfit == "one head" else q[..., :8]
    with pytest.raises(RuntimeError, match=r"^k must be .*, got .*; pass what belongs to"):
        torch.ops.lipass_native.plan(q, k, [*grid, *grid], None, 2, 0, 0, None)
    with pytest.raises(RuntimeError, match=r"^x must be .*, got .*; pass what belongs to"):
        torch.ops.lipass_native.pool_blocks(q, [1, 8, 9, 1, 4, 4])


@needs_native
def test_two_threads_give_what_one_gives():
    case = make_case("decode", 8, (8, 8), 33, (4, 4, 4), dim=64, heads=3)
    expected = attend(case, case.plan())
    torch.set_num_threads(2)
    assert torch.equal(attend(case, case.plan()), expected)


@needs_native
def test_last_axis_with_a_stride():
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4), dim=16)
    expected = attend(case, case.plan())
    case.q, *case.keys = (x.mT.contiguous().mT for x in (case.q, *case.keys))
    assert torch.equal(attend(case, case.plan()), expected)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | environment,
    )


ATTEND = """
import logging, torch
logging.basicConfig()
import lipass.kernels.ops
from lipass.kernels import prepare, registry
from lipass.kernels.block_sparse import native
PREPARE
print(native.why_not_loaded())
q = torch.randn(1, 1, 64, 16)
with registry.force("sparse"):
    torch.ops.lipass.sparse_attention(q, [q], [q], [4, 4, 4], [4, 4, 4], "current",
        [2, 2, 2], 0.5, 0.25, 0, "prefill", None, "site")
print(registry.telemetry()["site"].provider)
"""


def test_a_failed_build_is_logged_once_and_gathering_takes_over(tmp_path):
    done = run(
        ATTEND.replace("PREPARE", "prepare(); prepare()"),
        CXX="false",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    reason, provider = done.stdout.splitlines()
    assert reason.startswith("could not be built: false failed")
    assert provider == "gather"
    assert done.stderr.count("gathering instead") == 1


@needs_native
def test_a_library_that_cannot_be_loaded_is_built_anew(tmp_path):
    broken = tmp_path / "lipass" / native._library().name
    broken.parent.mkdir()
    broken.write_bytes(b"half of a file")
    done = run(
        ATTEND.replace("PREPARE", "print(native.why_not_loaded()); prepare()"),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("could not be loaded: ")
    assert rest == ["None", "native"]
    assert f"prepare(), which builds it anew, or delete {broken}" in done.stderr


def test_a_new_library_that_cannot_be_loaded_is_not_built_again(tmp_path):
    maker, built = tmp_path / "maker", tmp_path / "built"
    maker.write_text(
        f'#!/bin/sh\necho once >> {built}\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo half > "$2"\n'
    )
    maker.chmod(0o755)
    for _ in range(2):
        done = run(
            ATTEND.replace("PREPARE", "prepare(); prepare()"),
            CXX=str(maker),
            XDG_CACHE_HOME=str(tmp_path),
        )
        assert done.returncode == 0, done.stderr
        reason, provider = done.stdout.splitlines()
        assert reason.startswith("could not be loaded: ")
        assert provider == "gather"
        assert done.stderr.count("gathering instead; set XDG_CACHE_HOME to a folder") == 1
    assert built.read_text() == "once\n"


def test_a_user_without_a_home_has_a_folder_of_his_own(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", no_home)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    native._homeless_cache.cache_clear()
    folder = native.cache_folder()
    assert folder == tmp_path / f"cache-{os.getuid()}" / "lipass"
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)
    native._homeless_cache.cache_clear()
    other = native.cache_folder()
    assert other.parent != folder.parent
    assert other.parent.stat().st_mode & 0o777 == 0o700
    assert native.cache_folder() == other
    native._homeless_cache.cache_clear()


def test_a_folder_that_cannot_be_written_to_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run(ATTEND.replace("PREPARE", "prepare()"), XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "gather"
    assert (
        f"{tmp_path / 'file' / 'lipass'}, set XDG_CACHE_HOME to a folder of yours" in done.stderr
    )


def test_a_frame_never_builds(tmp_path):
    done = run(ATTEND.replace("PREPARE", ""), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["not built yet; call lipass.kernels.prepare()", "gather"]
    assert not list(tmp_path.iterdir())


def test_other_sources_and_versions_get_another_library(monkeypatch):
    first = native._library.__wrapped__()
    monkeypatch.setattr(torch, "__version__", "0")
    assert native._library.__wrapped__() != first
