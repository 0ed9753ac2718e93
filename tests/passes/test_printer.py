import torch
from expecttest import assert_expected_inline

from lipass.passes.printer import print_graph
from lipass.passes.runner import diff_text


def test_one_line_a_node_without_parameters(trace):
    lin = torch.nn.Linear(3, 3)

    def fn(x):
        return lin(x[:, 1:, None])

    assert_expected_inline(
        print_graph(trace(fn, (torch.randn(2, 4, 3),)).graph),
        """\
$x: f32[2, 4, 3] = input
%getitem: f32[2, 3, 1, 3] = getitem($x, (:, 1:, None))
%linear: f32[2, 3, 1, 3] = linear(%getitem, $lin.weight, $lin.bias)
return (%linear)
""",
    )


def test_input_and_node_of_one_name_are_told_apart(trace):
    def fn(x):
        x = x + 1
        return x * 2

    assert_expected_inline(
        print_graph(trace(fn, (torch.randn(2),)).graph),
        """\
$x: f32[2] = input
%x: f32[2] = add($x, 1)
%mul: f32[2] = mul(%x, 2)
return (%mul)
""",
    )


def test_symbols_are_counted_from_zero(trace):
    def fn(a, b):
        return torch.cat([a, b]), a.shape[0] * 2

    args = [(torch.randn(n, 3), torch.randn(2 * n + 1, 3)) for n in (2, 5)]
    assert_expected_inline(
        print_graph(trace(fn, *args).graph),
        """\
$n0: n0 = input
$a: f32[n0, 3] = input
$n1: n1 = input
$b: f32[n1, 3] = input
%cat: f32[n1 + n0, 3] = cat([$a, $b])
%mul: 2*n0 = mul($n0, 2)
return (%cat, %mul)
""",
    )


def test_dtypes_are_short(trace):
    def fn(x):
        return x.to(torch.bfloat16), x > 0, x.to(torch.complex64)

    assert_expected_inline(
        print_graph(trace(fn, (torch.randn(2),)).graph),
        """\
$x: f32[2] = input
%to: bf16[2] = $x.to(torch.bfloat16)
%gt: b8[2] = gt($x, 0)
%to_1: torch.complex64[2] = $x.to(torch.complex64)
return (%to, %gt, %to_1)
""",
    )


def test_two_traces_print_the_same(trace, mini, inputs):
    texts = [print_graph(trace(mini, inputs(4).decode).graph) for _ in range(2)]
    assert texts[0] == texts[1]


def test_diff_holds_changed_lines_only():
    assert diff_text("a\nb\nc\n", "a\nB\nc\nd\n") == "-b\n+B\n+d\n"
    assert diff_text("a\n", "a\n") == ""
