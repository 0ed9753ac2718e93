"""A model whose views are functions is understood like one whose views are methods."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipass.testing import run_passes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Methods(nn.Module):
    """Attend to a history `[B, L, H, D]`, which is joined in front of the transposition."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(4, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x, history):
        h = self.embed(x.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        q, k, v = self.qkv(h).reshape(1, -1, 3, 2, 16).unbind(2)
        keys, values = torch.cat([history, k], 1), torch.cat([history, v], 1)
        q, keys, values = (one.transpose(1, 2) for one in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values)
        return self.head(out.transpose(1, 2).flatten(2))


class Functions(Methods):
    def forward(self, x, history):
        h = torch.flatten(self.embed(torch.permute(x, (0, 2, 3, 4, 1))), start_dim=1, end_dim=3)
        q, k, v = torch.unbind(torch.reshape(self.qkv(h), (1, -1, 3, 2, 16)), dim=2)
        keys, values = torch.concat([history, k], 1), torch.concatenate([history, v], axis=1)
        q, keys = torch.swapaxes(q, 1, 2), torch.transpose(keys, 1, 2)
        out = F.scaled_dot_product_attention(q, keys, torch.movedim(values, 2, 1))
        return self.head(torch.flatten(torch.swapdims(out, 1, 2), 2))


class Overloads(Methods):
    def forward(self, x, history):
        aten = torch.ops.aten
        h = aten.flatten.using_ints(self.embed(aten.permute.default(x, [0, 2, 3, 4, 1])), 1, 3)
        q, k, v = aten.unbind.int(aten.view.default(self.qkv(h), [1, -1, 3, 2, 16]), 2)
        keys, values = aten.cat.default([history, k], 1), aten.cat.default([history, v], 1)
        q, keys, values = (aten.transpose.int(one, 1, 2) for one in (q, keys, values))
        out = aten.scaled_dot_product_attention.default(q, keys, values)
        return self.head(aten.flatten.using_ints(aten.transpose.int(out, 1, 2), 2))


X = torch.randn(1, 4, 4, 4, 4)


@pytest.mark.parametrize("kind", [Methods, Functions, Overloads])
def test_grid_and_history_are_found(kind):
    args = [(X, torch.randn(1, tokens, 2, 16)) for tokens in (32, 48)]
    text = "canonicalize,find-attention,sparse-attention"
    model = kind().eval()
    found = run_passes(model, args[0], text, grown=args[1])
    assert [(note.action, note.reason) for note in found.notes] == [
        ("rewritten", "decode, budget 1")
    ]
    with torch.no_grad():
        torch.testing.assert_close(found.outputs, model(*args[1]))


class Rows(nn.Module):
    def __init__(self, repeated):
        super().__init__()
        self.lin, self.repeated = nn.Linear(8, 16), repeated

    def forward(self, rows):
        shift, scale = torch.chunk(self.lin(F.silu(self.repeated(rows))), chunks=2, dim=-1)
        return shift * torch.tanh(scale)


@pytest.mark.parametrize(
    "repeated",
    [
        lambda x: torch.repeat_interleave(x, 6, dim=1),
        lambda x: torch.flatten(torch.unsqueeze(x, 2).expand(-1, -1, 6, -1), 1, 2),
        lambda x: torch.reshape(x[:, :, None].expand(2, 3, 6, 8), (2, 18, 8)),
        lambda x: torch.broadcast_to(x[:, :, None], (2, 3, 6, 8)).flatten(1, 2),
    ],
)
def test_forms_of_repeated_rows(repeated):
    model, rows = Rows(repeated).eval(), torch.randn(2, 3, 8)
    found = run_passes(model, (rows,), "canonicalize,hoist-rows")
    assert [note.reason for note in found.notes] == ["1 product on 1 row instead of 6"]
    with torch.no_grad():
        torch.testing.assert_close(found.outputs, model(rows))
