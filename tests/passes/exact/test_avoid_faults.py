"""Forms that Inductor computes wrongly, and the torch that no longer does."""

import dataclasses
import random

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

import lipass.backend
from lipass.passes.exact import avoid_faults
from lipass.passes.exact.avoid_faults import FAULTS
from lipass.passes.graph.compat import stages_skipped
from lipass.passes.graph.inductor_probe import goes_wrong, passes_only
from lipass.passes.graph.marks import skipped_stages
from lipass.receipt import current_report, reset_report
from lipass.testing import graph_diff, run_passes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

TEXT = "canonicalize,avoid-faults"
ROWS = torch.tensor([3, 1, 2, 0])
COPIES, SCATTERS, ORDERS, FUSION = FAULTS


def shift(c):
    c[1:] = c[:-1].clone()


def shift_back(c):
    c[:-1] = c[1:].clone()


def shift_columns(c):
    c[:, 2:].copy_(c[:, :-2].contiguous().clone())


def shift_through_a_new_tensor(c):
    moved = torch.empty(c.shape[0] - 1, c.shape[1])
    moved.copy_(c[:-1])
    c[1:] = moved


def shift_by_a_cat_of_one(c):
    c[1:] = torch.cat([c[:-1]])


def shift_one_row_by_a_stack(c):
    c[1:2] = torch.stack([c[0]])


def shift_twice(c):
    c[1:] = c[:-1].clone()
    c[1:] = c[:-1].clone()
    return c * 2


def shift_of_a_flat_view(c):
    c.view(-1)[1:] = c.reshape(-1)[:-1].clone()


def shift_of_an_intermediate(c):
    made = c * 2
    made[1:] = made[:-1].clone()
    return made


def window(c, k):
    """Evict rows behind a sink, append new ones, and read: a rolling cache."""
    c[2:-8] = c[6:-4].clone()
    c[-8:-4] = k
    return (c[:-4] * 2).sum(0)


def rows_by_index(c):
    c[ROWS] = c[:4].clone()


def index_copy_of_itself(c):
    c.index_copy_(0, ROWS, c[:4].clone())


def index_add_of_itself(c):
    c.index_add_(0, ROWS, c[:4].clone())


def snapshot(old, c, k):
    old[:] = c.clone()
    c[-4:] = k


def snapshot_as_a_result(c, k):
    old = c.clone()
    c[-4:] = k
    return old, c - old


def copy_then_add(old, c):
    old[0:, :] = c[0:, :]
    c.add_(1)


def swap(a, b):
    a[:], b[:] = b.clone(), a.clone()


def swap_of_halves(a, b):
    kept = a[:4].clone()
    a[:4] = b[4:8]
    b[4:8] = kept


def rotation(a, b, c):
    kept = a.clone()
    a.copy_(b)
    b.copy_(c)
    c.copy_(kept)


def write_to_a_copy(c):
    copy = c.clone()
    copy[1:3] = 7
    c.zero_()
    return copy


def scatter_in_front_of_a_write(c, k):
    new = torch.slice_scatter(c, k, 0, 1, 5)
    c.zero_()
    return new


def index_copy_in_front_of_a_write(c, k):
    new = c.index_copy(0, ROWS, k)
    c.zero_()
    return new


def diagonal_in_front_of_a_write(c):
    new = torch.diagonal_scatter(c, c.diagonal())
    c.fill_(2)
    return new


def evict(c):
    """Roll a cache `[B, H, L, D]` behind its sink, as causal attention does when it is full."""
    c[:, :, 2:-3] = c[:, :, 5:].clone()


def evict_tokens_first(c):
    c[:, 2:-3] = c[:, 5:].clone()


def evict_to_the_end(c):
    c[:, :, 5:] = c[:, :, 2:-3].clone()


def evict_by_narrow(c):
    tokens = c.shape[2] - 5
    c.narrow(2, 2, tokens).copy_(c.narrow(2, 5, tokens).clone())


def evict_by_roll(c):
    c.copy_(torch.roll(c, -3, 2))


def evict_by_positions(c):
    to = torch.arange(2, c.shape[2] - 3)
    c[:, :, to] = c[:, :, to + 3]


def evict_by_index_copy(c):
    to = torch.arange(5, c.shape[2])
    c.index_copy_(2, to, c.index_select(2, to - 3))


def evict_by_gather(c):
    to = torch.arange(5, c.shape[2])[None, None, :, None].expand(*c.shape[:2], -1, c.shape[3])
    c[:, :, 2:-3] = c.gather(2, to)


def evict_by_a_cat(c):
    c.copy_(torch.cat([c[:, :, :2], c[:, :, 5:], c[:, :, -3:]], 2))


def evict_and_attend(k, v, new):
    """Roll keys and values, write new ones behind them, and attend to all."""
    for c in (k, v):
        c[:, :, 2:-4] = c[:, :, 6:].clone()
        c[:, :, -4:] = new
    return F.scaled_dot_product_attention(new, k, v)


def flip_of_axes(c):
    c.copy_(c.transpose(1, 2).flip(1).transpose(1, 2))


def flip_to_axes(c):
    heads_first = c.transpose(1, 2)
    heads_first[:] = heads_first.flip(2)


def flip_of_a_view(c):
    c.copy_(c.view(2, -1).flip(1).view_as(c))


def part_of_a_flip(c):
    c[:, 1:].copy_(c.transpose(0, 1).flip(1).transpose(0, 1)[:, 1:] + 1)


def roll_of_axes(c):
    heads_first = c.transpose(1, 2)
    heads_first.copy_(torch.roll(heads_first, -3, 2))


def rows_to_axes(c):
    heads_first = c.transpose(1, 2)
    heads_first.copy_(heads_first[:, :, torch.arange(heads_first.shape[2]).flip(0)] * 2)


ORDERS_OF_ITSELF = (
    *(flip_of_axes, flip_to_axes, flip_of_a_view, part_of_a_flip, roll_of_axes, rows_to_axes),
)
CACHE, NEW = (16, 8), (4, 8)
KEYS = (1, 16, 12, 8)
EVICTIONS = (
    *(evict, evict_tokens_first, evict_to_the_end, evict_by_narrow, evict_by_roll),
    *(evict_by_positions, evict_by_index_copy, evict_by_gather, evict_by_a_cat),
)
WRITES = {
    **{shift: (CACHE,), shift_back: (CACHE,), shift_columns: (CACHE,), shift_twice: (CACHE,)},
    **{shift_through_a_new_tensor: (CACHE,), shift_by_a_cat_of_one: (CACHE,)},
    **{shift_one_row_by_a_stack: (CACHE,), shift_of_a_flat_view: (CACHE,)},
    **{shift_of_an_intermediate: (CACHE,), window: (CACHE, NEW), rows_by_index: (CACHE,)},
    **{index_copy_of_itself: (CACHE,), index_add_of_itself: (CACHE,)},
    **{snapshot: (CACHE, CACHE, NEW), snapshot_as_a_result: (CACHE, NEW)},
    **{copy_then_add: (CACHE, CACHE), swap: (CACHE, CACHE), swap_of_halves: (CACHE, CACHE)},
    **{rotation: (CACHE, CACHE, CACHE), write_to_a_copy: (CACHE,)},
    **{scatter_in_front_of_a_write: (CACHE, NEW), index_copy_in_front_of_a_write: (CACHE, NEW)},
    **{diagonal_in_front_of_a_write: (CACHE,)},
    **dict.fromkeys(EVICTIONS, (KEYS,)),
    **dict.fromkeys(ORDERS_OF_ITSELF, (KEYS,)),
    **{evict_and_attend: (KEYS, KEYS, (1, 16, 4, 8))},
}


def scores(q, k):
    return q @ k.mT * 0.2


SOFTMAXES = {
    "over_queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "over_queries_divided": lambda q, k, v: (q @ k.mT / 5).softmax(-2) @ v,
    "over_queries_in_fp32": lambda q, k, v: (
        F.softmax(scores(q, k), dim=-2, dtype=torch.float32) @ v
    ),
    "over_queries_with_dropout_0": lambda q, k, v: (
        F.dropout(scores(q, k).softmax(-2), 0.0, training=False) @ v
    ),
    "over_queries_with_a_mask": lambda q, k, v: (
        (q @ k.mT / 5 + q.new_ones(q.shape[0], 1, q.shape[2], k.shape[2])).softmax(-2) @ v
    ),
    "over_heads": lambda q, k, v: scores(q, k).softmax(1) @ v,
    "over_the_batch": lambda q, k, v: scores(q, k).softmax(0) @ v,
    "over_heads_of_a_token": lambda q, k, v: (
        scores(q.transpose(1, 2), k.transpose(1, 2)).softmax(-2) @ v.transpose(1, 2)
    ),
    "by_hand": lambda q, k, v: (scores(q, k).exp() / scores(q, k).exp().sum(-2, keepdim=True)) @ v,
    "keys_permuted": lambda q, k, v: (
        (q @ k.transpose(1, 2).contiguous().permute(0, 2, 3, 1) * 0.2).softmax(-2) @ v
    ),
}


@pytest.fixture
def with_inductors_passes(monkeypatch):
    """Compile with all of Inductor but its code generation, which takes seconds."""
    from torch._inductor.compile_fx import compile_fx

    def compile_(gm, example_inputs, inner):
        return compile_fx(gm, example_inputs, inner_compile=passes_only)

    monkeypatch.setattr(lipass.backend, "inner_compile", compile_)


@pytest.fixture
def with_threads():
    """Return a function that sets the number of threads for the rest of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact(fn, **kwargs):
    torch._dynamo.reset()
    reset_report()
    return torch.compile(fn, backend="light_interaction", options={"preset": "exact"}, **kwargs)


def assert_equals_eager(fn, shapes, **kwargs):
    """Compare outputs and what is written, in three calls on one memory."""
    given = [torch.randn(shape) for shape in shapes]
    mine = [one.clone() for one in given]
    fast = exact(fn, **kwargs)
    with torch.no_grad():
        for _ in range(3):
            want, got = fn(*given), fast(*mine)
            torch.testing.assert_close(mine, given, rtol=0, atol=0)
            torch.testing.assert_close(got, want)  # a sum may be in another order
    torch._dynamo.reset()


def assert_attention_equals_eager(fn):
    q, k, v = (torch.randn(1, 2, 128, 32) for _ in range(3))
    with torch.no_grad():
        torch.testing.assert_close(exact(fn)(q, k, v), fn(q, k, v), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fn", WRITES)
def test_writes_equal_eager(with_inductors_passes, fn, dynamic):
    assert_equals_eager(fn, WRITES[fn], dynamic=dynamic)


@pytest.mark.parametrize("fn", [shift, window, swap, write_to_a_copy, scatter_in_front_of_a_write])
@pytest.mark.slow
def test_writes_equal_eager_with_inductor(fn):
    assert_equals_eager(fn, WRITES[fn])


@pytest.mark.slow
def test_long_cache_equals_eager_with_inductor():
    """More than a million elements, which threads share."""
    assert_equals_eager(shift, ((20_000, 64),))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [KEYS, (1, 1250, 16, 64)], ids=["small", "million"])
@pytest.mark.slow
def test_evictions_equal_eager_with_inductor(shape, threads, with_threads):
    """All in one graph; a shift to the left is right in one loop, and a race between threads."""
    forms = (*EVICTIONS, *ORDERS_OF_ITSELF)

    def all_of_them(*caches):
        for form, cache in zip(forms, caches, strict=True):
            form(cache)

    with_threads(threads)
    assert_equals_eager(all_of_them, (shape,) * len(forms))


def plain(form, shape):
    """Whether Inductor alone computes what eager code does, in three calls on one memory."""
    torch._dynamo.reset()
    given = torch.randn(shape)
    mine, fast = given.clone(), torch.compile(form)
    for _ in range(3):
        form(given)
        fast(mine)
    return torch.equal(mine, given)


@pytest.mark.slow
def test_inductor_alone_shifts_a_contiguous_cache_wrongly():
    """Fails where torch is mended: then say so in docs/limits.md, and drop what is not needed.

    The other direction is a race between threads, which no test can hold to.
    """

    def to_the_end(c):
        c[:, 5:] = c[:, 2:-3].clone()

    assert not plain(to_the_end, (1, 16, 2, 8))


@pytest.mark.slow
def test_inductor_alone_writes_while_it_reads_in_another_order():
    """Fails where torch is mended: then drop the fault that has no probes."""
    assert not ORDERS.probes
    assert not plain(flip_of_axes, KEYS)


def test_two_inputs_of_one_memory_equal_eager(with_inductors_passes):
    def move(to, source):
        to.copy_(source.clone())

    given = torch.randn(16, 8)
    mine = given.clone()
    move(given[1:], given[:-1])
    with torch.no_grad():
        exact(move)(mine[1:], mine[:-1])
    torch.testing.assert_close(mine, given, rtol=0, atol=0)


@pytest.mark.parametrize("form", SOFTMAXES)
def test_softmaxes_equal_eager(with_inductors_passes, form):
    assert_attention_equals_eager(SOFTMAXES[form])


@pytest.mark.parametrize("form", ["over_queries", "over_heads"])
@pytest.mark.slow
def test_softmaxes_equal_eager_with_inductor(form):
    assert_attention_equals_eager(SOFTMAXES[form])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.stage.lower())
def test_pinned_torch_has_the_fault(fault):
    """Fails where torch is mended: then drop the fault, or the probes that are right."""
    assert [goes_wrong(program, *shapes) for program, shapes in fault.probes] == [True] * len(
        fault.probes
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.stage.lower())
def test_probe_is_right_without_the_stage(fault, monkeypatch):
    """What the pass does mends what its probes see; a copy in front is part of one of them."""
    programs = [(program, shapes) for program, shapes in fault.probes if fault.copied is None]
    with stages_skipped({fault.stage}):
        assert not any(goes_wrong.__wrapped__(program, *shapes) for program, shapes in programs)


def test_mended_torch_is_left_alone(monkeypatch):
    mended = tuple(dataclasses.replace(fault, probes=()) for fault in FAULTS)
    monkeypatch.setattr(avoid_faults, "FAULTS", mended)
    for fn in (shift, scatter_in_front_of_a_write):
        traced = run_passes(fn, [torch.randn(s) for s in WRITES[fn]], TEXT)
        assert not traced.diff
        assert not traced.notes
        assert not skipped_stages(traced.gm)


def test_probe_of_a_right_program():
    assert not goes_wrong(lambda a, b: a @ b, (4, 4), (4, 4))


def test_result_of_a_scatter_gets_memory_of_its_own():
    given = [torch.randn(s) for s in WRITES[scatter_in_front_of_a_write]]
    assert_expected_inline(
        graph_diff(scatter_in_front_of_a_write, given, TEXT),
        """\
-%new: f32[16, 8] = slice_scatter($c, $k, 0, 1, 5)
+%copied_default: f32[16, 8] = lipass.copied($c)
+%new: f32[16, 8] = slice_scatter(%copied_default, $k, 0, 1, 5)
""",
    )


def test_receipt_names_the_fault(with_inductors_passes):
    assert_equals_eager(shift, WRITES[shift])
    (record,) = [one for one in current_report().passes if one.name == "avoid-faults"]
    assert any("pytorch#197829" in note for note in record.notes)


def test_receipt_names_the_line_that_shifts(with_inductors_passes):
    assert_equals_eager(evict, WRITES[evict])
    (record,) = [one for one in current_report().passes if one.name == "avoid-faults"]
    line = evict.__code__.co_firstlineno + 2
    assert any(f"test_avoid_faults.py:{line}: Inductor reads" in note for note in record.notes)


def append(c, k):
    c[4:8] = k
    return c[:8] * 2


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written_attention(q, k, v):
    return scores(q, k).softmax(-1) @ v


def read_after_the_write(c, k):
    c[:4] = k
    return c.clone()


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (append, (CACHE, NEW)),
        (read_after_the_write, (CACHE, NEW)),
        (attend, ((1, 2, 16, 8),) * 3),
        (written_attention, ((1, 2, 16, 8),) * 3),
    ],
)
def test_right_forms_stay_and_nothing_is_tried(fn, shapes, monkeypatch):
    monkeypatch.setattr(avoid_faults, "goes_wrong", lambda *_: pytest.fail("tried a program"))
    traced = run_passes(fn, [torch.randn(shape) for shape in shapes], TEXT)
    assert not traced.diff
    assert not traced.notes
    assert not skipped_stages(traced.gm)


def test_other_inner_compilers_are_left_alone():
    traced = run_passes(shift, (torch.randn(CACHE),), "canonicalize,avoid-faults{inner=eager}")
    assert not skipped_stages(traced.gm)


def test_settings_of_the_user_stay():
    import torch._inductor.config as config

    with config.patch(disabled_passes="MY_PASS"):
        with stages_skipped({"REMOVE_NOOP_OPS"}):
            assert config.disabled_passes == "MY_PASS,REMOVE_NOOP_OPS"
        assert config.disabled_passes == "MY_PASS"


def random_program(seed):
    """Write a random program over three caches, new rows, a level and a length."""
    draw = random.Random(seed)
    temporaries, lines = [], []

    def rows(count):
        at = draw.randint(0, 8 - count)
        return f"{draw.choice('abc')}[{at}:{at + count}]"

    def made(count):
        known = [name for name, size in temporaries if size == count]
        source = draw.choice(known) if known and draw.random() < 0.4 else rows(count)
        return draw.choice(
            [
                f"{source}.clone()",
                f"{source} * s",
                f"{source} + 0",
                f"torch.cat([{source}])",
                f"torch.cat([{source}[1:], {source}[:1]])",
                f"{source}.to(torch.float32, copy=True)",
                f"torch.full(({count}, 4), s)",
                f"{source}.clamp(-s, s)",
                f"torch.where({source} > 0, {rows(count)}, s)",
            ]
        )

    for i in range(draw.randint(2, 6)):
        count, (x, y) = draw.choice([1, 2, 4, 5, 7, 8]), draw.sample("abc", 2)
        lines.append(
            draw.choice(
                [
                    f"t{i} = {made(count)}",
                    f"{rows(count)}[:] = {made(count)}",
                    f"{rows(count)}.copy_({made(count)})",
                    f"{x}.{draw.choice(['zero_()', 'mul_(s)', 'add_(1)', 'fill_(s)'])}",
                    f"{x}[:], {y}[:] = {y}.clone(), {x}.clone()",
                    f"{x}[n:n + 2] = k",
                    f"{x}[rows] = {made(4)}",
                    f"t{i} = torch.slice_scatter({x}, k, 0, 1, 3)",
                ]
            )
        )
        if lines[-1].startswith("t"):
            temporaries.append((f"t{i}", 8 if "scatter" in lines[-1] else count))
    outputs = ", ".join([*(name for name, _ in temporaries), "a.sum(0)", "(b * c).clone()"])
    source = "\n    ".join(["def program(a, b, c, k, s, n):", *lines, f"return {outputs}"])
    names = {"torch": torch, "rows": ROWS}
    exec(compile(source, f"<program {seed}>", "exec"), names)
    return names["program"], source


def assert_program_equals_eager(seed):
    program, source = random_program(seed)
    given = [torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 4), torch.randn(2, 4)]
    mine = [one.clone() for one in given]
    fast = exact(program)
    with torch.no_grad():
        for level, length in ((1.0, 2), (0.75, 3), (0.5, 4)):
            want, got = program(*given, level, length), fast(*mine, level, length)
            torch.testing.assert_close((mine, got), (given, want), msg=f"seed {seed}\n{source}")
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_equal_eager(with_inductors_passes, seed):
    assert_program_equals_eager(seed)


_KNOWN = "Inductor reads another product after two equal slice_scatters; not worked around yet"


@pytest.mark.parametrize(
    "seed",
    [100, 101, pytest.param(102, marks=pytest.mark.xfail(strict=True, reason=_KNOWN)), 103],
)
@pytest.mark.slow
def test_random_programs_equal_eager_with_inductor(seed):
    assert_program_equals_eager(seed)
