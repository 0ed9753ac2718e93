"""What is proven of a mask from the calls that make it holds for the values that they give."""

import operator
import random

import pytest
import torch
from torch import fx

from lipass.passes.attention.run_shapes import ALL
from lipass.passes.attention.runs import runs_of
from lipass.testing import trace

COMPARES = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)


MOVES = {
    "//": lambda x, n, c: x // c,
    "+": lambda x, n, c: x + c,
    "-": lambda x, n, c: x - c,
    "from": lambda x, n, c: c - x,
    "%": lambda x, n, c: x % c,
    "below": lambda x, n, c: (x < c).long(),
    "above": lambda x, n, c: (c > x).long(),
    "byte": lambda x, n, c: (x * 32).to(torch.uint8),
    "bool": lambda x, n, c: x.to(torch.bool).long(),
    "float": lambda x, n, c: x.to(torch.float32),
    "spread": lambda x, n, c: x.repeat_interleave(c)[:n],
    "repeat": lambda x, n, c: x.repeat(c)[:n],
    "first": lambda x, n, c: x.view(-1, 2)[:, 0].repeat_interleave(2),
    "cat": lambda x, n, c: torch.cat([x[:c], x[: n - c]]),
    "look up": lambda x, n, c: torch.arange(64)[x.long().clamp(0, 63)],
    "fill": lambda x, n, c: x.clone().fill_(c),
    "write": lambda x, n, c: x.clone().masked_fill_(torch.arange(n) < c, 1),
    "floor": lambda x, n, c: torch.div(x, c, rounding_mode="floor"),
    "slice": lambda x, n, c: torch.cat([x, x])[c : n + c],
}
STEPS = {
    "tril": lambda m, n, c: m.long().tril(c - 4) > 0,
    "repeat": lambda m, n, c: m.repeat(2, 2)[:n, :n],
    "spread": lambda m, n, c: m.repeat_interleave(2, 0).repeat_interleave(c, -1)[:n, :n],
    "cut": lambda m, n, c: torch.cat([m[c:], m])[:n],
    "split": lambda m, n, c: m.view(n // 4, 4, n)[:, c % 4].repeat_interleave(4, 0),
    "merge": lambda m, n, c: m.view(n, n // 4, 4).flatten(1),
    "turn": lambda m, n, c: ~m.mT,
    "where": lambda m, n, c: torch.where(m, 0.0, float("-inf")) == 0,
    "heads": lambda m, n, c: m[None].expand(2, -1, -1).reshape(2 * n, n)[:n],
}


def program_of(seed):
    """Make a random mask out of positions, by calls that models make theirs with."""
    draw = random.Random(seed)

    def drawn(names, most):
        return [(draw.choice(list(names)), draw.choice([2, 3, 4, 8])) for _ in range(most)]

    n = draw.choice([16, 24])
    starts = [draw.choice([0, 0, 2, 8]) for _ in range(3)]
    moves = [drawn(MOVES, draw.randint(0, 3)) for _ in range(3)]
    compare, steps = draw.choice(COMPARES), drawn(STEPS, draw.randint(0, 3))

    def positions(i):
        made = torch.arange(starts[i], starts[i] + n)
        for name, number in moves[i]:
            made = MOVES[name](made, n, number)
        return made

    def mask(x):
        made = compare(positions(0)[:, None], positions(1)[None])
        for name, number in steps:
            made = STEPS[name](made, n, number)
        made = made & (positions(2) > 4)
        return made[None].expand(2, -1, -1).reshape(2, 1, n, n) & (x > -1)

    return mask


def is_one_in(tensor, axis, run):
    size = tensor.shape[axis]
    ends = [size] if run is ALL else [*range(0, size, int(run)), size][1:]
    parts = torch.tensor_split(tensor, ends[:-1], axis)
    return all(bool((part == part.narrow(axis, 0, 1)).all()) for part in parts if part.numel())


class Checked(fx.Interpreter):
    """Compare what every call gives with what is said of it."""

    def __init__(self, graph):
        super().__init__(graph)
        self.proven = 0

    def run_node(self, n):
        result = super().run_node(n)
        if n.op.startswith("call") and isinstance(result, torch.Tensor) and result.numel():
            said = runs_of(n)
            for axis, run in enumerate(said.runs):
                assert is_one_in(result, axis, run), (n.format_node(), axis, run)
                self.proven += run is ALL or run > 1
            if said.counts_axis is not None:
                counted = torch.arange(result.shape[said.counts_axis]) + said.offset
                line = result.movedim(said.counts_axis, -1)
                assert bool((line == counted).all()), (n.format_node(), said)
        return result


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_said_of_runs_holds_for_the_values(fuzz):
    proven = 0
    for seed in range(fuzz):
        torch._dynamo.reset()
        checked = Checked(trace(program_of(seed), (torch.zeros(()),)))
        checked.run(torch.zeros(()))
        proven += checked.proven
    assert proven > 10 * fuzz
