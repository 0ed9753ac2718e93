# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

TEXT = "canonicalize"


def diff(trace, apply, fn, *args):
    records, _ = apply(trace(fn, args), TEXT)
    return records[0].diff


def qkv(heads=2, tokens=8, dim=4):
    return tuple(torch.randn(1, heads, tokens, dim) for _ in range(3))


def test_attention_operands_become_positional_and_defaults_fall_away(trace, apply):
    def fn(q, k, v):
        return F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3
        )

    assert_expected_inline(
        diff(trace, apply, fn, *qkv()),
        """\
-%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention(query=$q, key=$k, value=$v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3)
+%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention($q, $k, $v, scale=0.3)
""",
    )


def test_attention_keeps_what_differs_from_the_default(trace, apply):
    def fn(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1)

    assert_expected_inline(
        diff(trace, apply, fn, *qkv(), torch.zeros(8, 8)),
        """\
-%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention($q, $k, $v, $mask, dropout_p=0.1)
+%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention($q, $k, $v, attn_mask=$mask, dropout_p=0.1)
""",
    )


def test_cat_gets_a_positive_dim_by_position(trace, apply):
    def fn(a, b):
        return torch.concat([a, b], axis=-2)

    assert_expected_inline(
        diff(trace, apply, fn, *qkv()[:2]),
        """\
-%concat: f32[1, 2, 16, 4] = concat([$a, $b], axis=-2)
+%concat: f32[1, 2, 16, 4] = cat([$a, $b], 2)
""",
    )


def test_detach_stays_where_its_source_is_differentiated(trace, apply):
    def fn(a, b):
        return (a.detach() * b).sum()

    a, b, _ = qkv()
    assert diff(trace, apply, fn, a.requires_grad_(), b) == ""
    assert "detach" in diff(trace, apply, fn, a.detach(), b)


def test_nested_cat_becomes_flat(trace, apply):
    def fn(a, b, c):
        return torch.cat([a, torch.cat([b, c], dim=2)], dim=-2)

    assert_expected_inline(
        diff(trace, apply, fn, *qkv()),
        """\
-%cat: f32[1, 2, 16, 4] = cat([$b, $c], dim=2)
-%cat_1: f32[1, 2, 24, 4] = cat([$a, %cat], dim=-2)
+%cat_1: f32[1, 2, 24, 4] = cat([$a, $b, $c], 2)
""",
    )


@pytest.mark.parametrize(
    "empty", [torch.empty(0), torch.empty(1, 2, 0, 4)], ids=["one axis", "no tokens"]
)
def test_empty_piece_is_left_out(trace, apply, empty):
    def fn(a, b, empty):
        return torch.cat([a, empty, b], -2)

    (line,) = [
        x for x in diff(trace, apply, fn, *qkv()[:2], empty).splitlines() if x.startswith("+")
    ]
    assert line.endswith("cat([$a, $b], 2)")


def test_empty_piece_that_gives_the_dtype_stays(trace, apply):
    def fn(a, empty):
        return torch.cat([a.bfloat16(), empty], 2)

    assert "-%cat" not in diff(trace, apply, fn, qkv()[0], torch.empty(1, 2, 0, 4)).replace(
        "dim", ""
    )


def test_nested_cat_along_another_dim_stays(trace, apply):
    def fn(a, b, c):
        return torch.cat([torch.cat([a, a], 2), torch.cat([b, c], 2)], 1)

    assert "%cat_2" not in diff(trace, apply, fn, *qkv())


def test_nested_cat_with_other_users_is_read_piece_by_piece_and_stays_for_them(trace, apply):
    """The cache with the new keys, which a refresh attends to and returns."""

    def fn(a, b, c):
        inner = torch.cat([b, c], 2)
        return torch.cat([a, inner], 2), inner.sum()

    assert_expected_inline(
        diff(trace, apply, fn, *qkv()),
        """\
-%cat_1: f32[1, 2, 24, 4] = cat([$a, %inner], 2)
+%cat_1: f32[1, 2, 24, 4] = cat([$a, $b, $c], 2)
""",
    )


def test_nested_cat_with_a_write_in_between_stays(trace, apply):
    def fn(a, b, c):
        b = b + 1
        inner = torch.cat([b, c], 2)
        b.mul_(2)
        return torch.cat([a, inner], 2), b

    assert diff(trace, apply, fn, *qkv()) == ""


def test_view_becomes_reshape(trace, apply):
    def fn(x):
        return x.view(2, -1) + 1

    assert_expected_inline(
        diff(trace, apply, fn, torch.randn(4, 4)),
        """\
-%view: f32[2, 8] = $x.view(2, -1)
+%view: f32[2, 8] = $x.reshape(2, -1)
""",
    )


def test_view_of_a_dtype_stays(trace, apply):
    def fn(x):
        return x.view(torch.int32) + 1

    assert diff(trace, apply, fn, torch.randn(4, 4)) == ""


def test_calls_that_return_their_input_are_removed(trace, apply):
    def fn(x):
        x = x.contiguous().to(torch.float32).reshape(4, 4).expand(4, 4)
        return x.transpose(0, 0).permute(0, 1).flatten(0, 0) * 2

    assert_expected_inline(
        diff(trace, apply, fn, torch.randn(4, 4)),
        """\
-%contiguous: f32[4, 4] = $x.contiguous()
-%to: f32[4, 4] = %contiguous.to(torch.float32)
-%reshape: f32[4, 4] = %to.reshape(4, 4)
-%x: f32[4, 4] = %reshape.expand(4, 4)
-%transpose: f32[4, 4] = %x.transpose(0, 0)
-%permute: f32[4, 4] = %transpose.permute(0, 1)
-%flatten: f32[4, 4] = %permute.flatten(0, 0)
-%mul: f32[4, 4] = mul(%flatten, 2)
+%mul: f32[4, 4] = mul($x, 2)
""",
    )


def test_calls_that_copy_or_cast_or_move_axes_stay(trace, apply):
    def fn(x):
        return x.mT.contiguous().to(torch.float64).transpose(0, 1) * 2

    assert diff(trace, apply, fn, torch.randn(4, 4)) == ""


def test_call_that_returns_its_input_stays_where_it_is_an_output(trace, apply):
    def fn(x):
        return x.contiguous(), x + 1

    assert diff(trace, apply, fn, torch.randn(4, 4)) == ""


def test_clone_stays(trace, apply):
    def fn(x):
        y = x.clone()
        y.add_(1)
        return x * y

    assert diff(trace, apply, fn, torch.randn(4, 4)) == ""


def test_writes_through_a_removed_view_still_land(trace, apply):
    def fn(x):
        y = x + 1
        y.reshape(4, 4).add_(1)
        return y

    gm = trace(fn, (torch.randn(4, 4),))
    apply(gm, TEXT)
    x = torch.randn(4, 4)
    torch.testing.assert_close(gm(x)[0], x + 2)


def test_output_is_bitwise_equal(trace, apply, mini, inputs):
    args = inputs(4).decode
    gm = trace(mini, args)
    before = torch.compile(mini, backend=lambda _, __: gm.forward, dynamic=False)
    with torch.no_grad():
        expected = mini(*args)
        apply(gm, TEXT)
        assert torch.equal(before(*args), expected)


def test_second_run_changes_nothing(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode)
    apply(gm, TEXT)
    records, _ = apply(gm, TEXT)
    assert not records[0].changed


def test_mask_written_by_hand_becomes_that_of_attention(trace, apply):
    def fn(q, k, v, mask):
        return (q @ k.mT * 0.5).masked_fill(mask == 0, float("-inf")).softmax(-1) @ v

    assert_expected_inline(
        diff(trace, apply, fn, *qkv(), torch.ones(8, 8, dtype=torch.bool)),
        """\
-%getattr_1: f32[1, 2, 4, 8] = getattr($k, 'mT')
-%matmul: f32[1, 2, 8, 8] = matmul($q, %getattr_1)
-%mul: f32[1, 2, 8, 8] = mul(%matmul, 0.5)
-%eq: b8[8, 8] = eq($mask, 0)
-%masked_fill: f32[1, 2, 8, 8] = %mul.masked_fill(%eq, -inf)
-%softmax: f32[1, 2, 8, 8] = %masked_fill.softmax(-1)
-%matmul_1: f32[1, 2, 8, 4] = matmul(%softmax, $v)
-return (%matmul_1)
+%getitem: b8[1, 1, 8, 8] = getitem($mask, (None, None, Ellipsis))
+%any_1: b8[1, 1, 8, 1] = any(%getitem, -1, True)
+%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention($q, $k, $v, attn_mask=%getitem)
+%where: f32[1, 2, 8, 4] = where(%any_1, %scaled_dot_product_attention, nan)
+return (%where)
""",
    )


def test_low_number_written_by_hand_leaves_the_mean_where_all_is_hidden(trace, apply):
    def fn(q, k, v, hidden):
        return (q @ k.mT * 0.5).masked_fill(hidden, -1e9).softmax(-1) @ v

    assert_expected_inline(
        diff(trace, apply, fn, *qkv(), torch.ones(1, 1, 1, 8, dtype=torch.bool)),
        """\
-%getattr_1: f32[1, 2, 4, 8] = getattr($k, 'mT')
-%matmul: f32[1, 2, 8, 8] = matmul($q, %getattr_1)
-%mul: f32[1, 2, 8, 8] = mul(%matmul, 0.5)
-%masked_fill: f32[1, 2, 8, 8] = %mul.masked_fill($hidden, -1000000000.0)
-%softmax: f32[1, 2, 8, 8] = %masked_fill.softmax(-1)
-%matmul_1: f32[1, 2, 8, 4] = matmul(%softmax, $v)
-return (%matmul_1)
+%logical_not: b8[1, 1, 1, 8] = logical_not($hidden)
+%any_1: b8[1, 1, 1, 1] = any(%logical_not, -1, True)
+%scaled_dot_product_attention: f32[1, 2, 8, 4] = scaled_dot_product_attention($q, $k, $v, attn_mask=%logical_not)
+%mean: f32[1, 2, 1, 4] = mean($v, -2, True)
+%where: f32[1, 2, 8, 4] = where(%any_1, %scaled_dot_product_attention, %mean)
+return (%where)
""",
    )
