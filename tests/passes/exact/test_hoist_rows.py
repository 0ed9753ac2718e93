import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

TEXT = "canonicalize,hoist-rows"
TOKENS = 6


class Modulated(nn.Module):
    """Scale and shift tokens by a row of each latent, repeated before the product."""

    def __init__(self, repeat, act=F.silu):
        super().__init__()
        self.lin, self.repeat, self.act = nn.Linear(8, 16), repeat, act

    def forward(self, x, rows):
        shift, scale = self.lin(self.act(self.repeat(rows))).chunk(2, -1)
        return x * (1 + scale) + shift


def interleaved(rows):
    return rows.repeat_interleave(TOKENS, 1)


X, ROWS = torch.randn(2, 3 * TOKENS, 8), torch.randn(2, 3, 8)


def notes_of(records):
    return [(n.site, n.action, n.reason) for n in records[-1].notes]


def test_product_runs_on_one_row_a_latent(trace, apply):
    records, _ = apply(trace(Modulated(interleaved), (X, ROWS)), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%repeat_interleave: f32[2, 18, 8] = $rows.repeat_interleave(6, 1)
-%silu: f32[2, 18, 8] = silu(%repeat_interleave)
-%linear: f32[2, 18, 16] = linear(%silu, $lin.weight, $lin.bias)  # lin
-%chunk = %linear.chunk(2, -1)
-%shift: f32[2, 18, 8] = getitem(%chunk, 0)
-%scale: f32[2, 18, 8] = getitem(%chunk, 1)
-%add: f32[2, 18, 8] = add(1, %scale)
-%mul: f32[2, 18, 8] = mul($x, %add)
-%add_1: f32[2, 18, 8] = add(%mul, %shift)
+%silu_1: f32[2, 3, 8] = silu($rows)
+%linear_1: f32[2, 3, 16] = linear(%silu_1, $lin.weight, $lin.bias)  # lin
+%chunk_1 = %linear_1.chunk(2, -1)
+%getitem_2: f32[2, 3, 8] = getitem(%chunk_1, 0)
+%repeat_interleave_1: f32[2, 18, 8] = %getitem_2.repeat_interleave(6, 1)
+%getitem_3: f32[2, 3, 8] = getitem(%chunk_1, 1)
+%add_2: f32[2, 3, 8] = add(1, %getitem_3)
+%repeat_interleave_2: f32[2, 18, 8] = %add_2.repeat_interleave(6, 1)
+%mul: f32[2, 18, 8] = mul($x, %repeat_interleave_2)
+%add_1: f32[2, 18, 8] = add(%mul, %repeat_interleave_1)
""",
    )
    assert notes_of(records) == [("lin", "rewritten", "1 product on 1 row instead of 6")]


SPELLINGS = {
    "repeat_interleave": interleaved,
    "function": lambda r: torch.repeat_interleave(r, TOKENS, dim=-2),
    "expand and flatten": lambda r: r[:, :, None].expand(-1, -1, TOKENS, -1).flatten(1, 2),
    "expand and reshape": lambda r: r.unsqueeze(2).expand(2, 3, TOKENS, 8).reshape(2, -1, 8),
    "expand two axes": lambda r: r[:, :, None, None].expand(2, 3, 2, 3, 8).flatten(1, 3),
    "cast in between": lambda r: interleaved(r).double().float(),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_result_is_that_of_the_function(spelling, trace, apply):
    model = Modulated(spelling)
    gm = trace(model, (X, ROWS))
    compiled = torch.compile(model, backend=lambda _, __: gm.forward)
    records, _ = apply(gm, TEXT)
    assert records[-1].changed
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, ROWS), model(X, ROWS), atol=1e-6, rtol=1e-6)
    (linear,) = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "linear"]
    assert linear.meta["example_value"].shape[1] == 3


CALLS = {
    "table added": lambda r, lin: lin(r + torch.arange(8.0)),
    "scalar": lambda r, lin: lin(2 * r - 1),
    "norm": lambda r, lin: lin(F.layer_norm(r, (8,))),
    "rows with rows": lambda r, lin: lin(r * r.sigmoid()),
    "part of the channels": lambda r, lin: lin(torch.cat([r[..., :4], r[..., 4:]], -1) * r),
    "axis split behind": lambda r, lin: lin(r).unflatten(-1, (2, 8)).unbind(2)[1],
    "axis put in front": lambda r, lin: lin(r)[None].squeeze(0),
    "split": lambda r, lin: lin(r).split(8, dim=-1)[0],
    "joined with the batch": lambda r, lin: lin(r.reshape(2 * 3 * TOKENS, 8)).unsqueeze(0),
    "flattened with the batch": lambda r, lin: lin(r.flatten(0, 1)),
    "joined with an axis in front": lambda r, lin: lin(r[None].flatten(1, 2)),
    "reshape behind": lambda r, lin: lin(r).reshape(2, 3 * TOKENS, 4, 4)[:, :, 1],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_between_rows_and_tokens(call, trace, apply):
    lin = nn.Linear(8, 16)

    def fn(x, rows):
        return call(interleaved(rows), lin) * 1.5

    gm = trace(fn, (X, ROWS))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    records, _ = apply(gm, TEXT)
    assert records[-1].changed
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, ROWS), fn(X, ROWS), atol=1e-6, rtol=1e-6)


def test_other_readers_of_the_repeated_rows_keep_them(trace, apply):
    lin = nn.Linear(8, 8)

    def fn(x, rows):
        tokens = interleaved(rows)
        return lin(tokens) + tokens.cumsum(1)

    gm = trace(fn, (X, ROWS))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, ROWS), fn(X, ROWS), atol=1e-6, rtol=1e-6)


def only_pointwise(lin, x, rows):
    return x * interleaved(rows).sigmoid()


def mixed_before(lin, x, rows):
    return lin(interleaved(rows).cumsum(1))


def with_tokens_before(lin, x, rows):
    return lin(x + interleaved(rows))


def along_the_row(lin, x, rows):
    return lin(rows.repeat_interleave(2, 2)[..., :8])


def counts_in_a_tensor(lin, x, rows):
    return lin(rows.repeat_interleave(torch.full((3,), TOKENS), 1, output_size=3 * TOKENS))


def tiled(lin, x, rows):
    return lin(rows.repeat(1, TOKENS, 1))


def copies_in_front(lin, x, rows):
    return lin(rows[:, None].expand(2, TOKENS, 3, 8).flatten(1, 2))


def transposed(lin, x, rows):
    return lin(interleaved(rows).transpose(0, 1))


def written(lin, x, rows):
    tokens = interleaved(rows)
    tokens[:, 0] = 0
    return lin(tokens)


def rows_written_behind(lin, x, rows):
    own = rows * 1
    tokens = interleaved(own)
    own.add_(1)
    return lin(tokens) + own.sum()


def noisy(lin, x, rows):
    return lin(F.dropout(interleaved(rows), 0.5, training=True))


def picked(lin, x, rows):
    return lin(interleaved(rows)[:, 1:])


def normed_over_tokens(lin, x, rows):
    return lin(F.layer_norm(interleaved(rows), (3 * TOKENS, 8)))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (only_pointwise, "no product follows"),
        (mixed_before, "no product follows"),
        (with_tokens_before, "no product follows"),
        (transposed, "no product follows"),
        (noisy, "no product follows"),
        (picked, "no product follows"),
        (normed_over_tokens, "no product follows"),
        (written, "%setitem writes to the repeated rows"),
        (rows_written_behind, "%add_ writes to the repeated rows"),
        (along_the_row, "no product follows"),
        (counts_in_a_tensor, ""),
        (tiled, ""),
        (copies_in_front, ""),
    ],
)
def test_near_misses_stay_as_they_are(fn, message, trace, apply):
    lin = nn.Linear(8, 8)
    records, _ = apply(trace(lambda x, rows: fn(lin, x, rows), (X, ROWS)), TEXT)
    assert not records[-1].changed
    reasons = [note.reason for note in records[-1].notes]
    assert any(message in reason for reason in reasons) if message else not reasons


def test_rows_that_are_not_repeated_are_left_alone(trace, apply):
    gm = trace(Modulated(lambda r: r.repeat_interleave(1, 1)), (X[:, :3], ROWS))
    assert not apply(gm, TEXT)[0][-1].changed


def test_number_of_latents_may_vary(trace, apply):
    model = Modulated(interleaved)
    longer = torch.randn(2, 5 * TOKENS, 8), torch.randn(2, 5, 8)
    gm = trace(model, (X, ROWS), longer)
    records, _ = apply(gm, TEXT)
    assert records[-1].changed


def test_layers_that_repeat_the_same_rows_are_still_shared(trace, apply):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Modulated(interleaved) for _ in range(3))

        def forward(self, x, rows):
            for layer in self.layers:
                x = layer(x, rows)
            return x

    records, _ = apply(trace(Stack(), (X, ROWS)), f"{TEXT},share-blocks{{nodes_min=2}}")
    assert records[-1].notes[-1].reason == "3 equal layers are compiled once"
