"""Random small programs of the forms that models have, compiled, against eager.

A program has an attention (a spelling or what only looks like one), text, a history in some form
of cache, layers, a loop, branches and things on the side. `exact`, and `sparse` at budget 1.0,
must give what eager gives and leave the same in the caches. `pytest --fuzz 500` tries more.
"""

import contextlib
import copy
import random

import pytest
import torch
from spellings import NEAR_MISSES, SPELLINGS
from torch import nn
from torch.nn import functional as F

import lipass

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HEADS, DIM, WIDTH, TOKENS = 2, 8, 16, 64  # 4 latents of 4x4 tokens
LIMIT = 8 * TOKENS

# Written by name, so that a program prints as what it is.
CHOICES = {
    "attention": [*SPELLINGS, *SPELLINGS, *NEAR_MISSES],
    "layers": ["one", "two", "shared twice", "three"],
    "text": ["none", "keys", "keys behind", "projected", "padded", "projected cross"],
    "cache": [
        "none",
        "joined",
        "joined behind",
        "a list",
        "in place",
        "window",
        "returned",
        "empty",
    ],
    "loop": ["none", "none", "euler", "heun", "noised", "refined"],
    "branches": ["one", "one", "two calls", "stacked"],
    "level": ["tensor", "per latent", "none"],
    "beside": ["nothing", "dropout", "in place", "rows repeated", "counter", "views"],
    "session": ["none", "exact", "chunk"],
}


class Layer(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, h, text, past, start):
        p = self.program
        if p["beside"] == "dropout":
            h = F.dropout(h, 0.5, self.training)
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        if p["beside"] == "views":
            q = q.transpose(1, 2).flatten(2).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        keys, values = [k], [v]
        if p["cache"] in ("joined", "a list", "returned", "empty"):
            keys, values = [past[0], k], [past[1], v]
        elif p["cache"] == "joined behind":
            keys, values = [k, past[0]], [v, past[1]]
        elif p["cache"] in ("in place", "window"):
            end = start + TOKENS
            past[0][:, :, start:end] = k
            past[1][:, :, start:end] = v
            begin = max(0, end - 2 * TOKENS) if p["cache"] == "window" else 0
            keys, values = [past[0][:, :, begin:end]], [past[1][:, :, begin:end]]
        if p["text"] in ("projected", "padded"):
            tk, tv = self.kv(text).unflatten(-1, (2, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            keys, values = [tk, *keys], [tv, *values]
        elif p["text"] == "keys":
            keys, values = [text, *keys], [text, *values]
        elif p["text"] == "keys behind":
            keys, values = [*keys, text], [*values, text]
        out = attend(p["attention"], q, keys, values)
        if p["beside"] == "in place":
            out = out.contiguous().add_(1.0)
        h = h + self.out(out.transpose(1, 2).reshape(h.shape))
        if p["text"] == "projected cross":
            tk, tv = self.kv(text).unflatten(-1, (2, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            h = h + F.scaled_dot_product_attention(q, tk, tv).transpose(1, 2).flatten(2)
        return h, (keys[-1], values[-1])


def attend(name, q, keys, values):
    if name in SPELLINGS:
        return SPELLINGS[name](q, keys, values)
    out = NEAR_MISSES[name][0](q, torch.cat(keys, 2), torch.cat(values, 2))
    return out[0] if isinstance(out, tuple) else out


class Model(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program
        count = {"one": 1, "two": 2, "shared twice": 1, "three": 3}[program["layers"]]
        self.embed, self.time = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(Layer(program) for _ in range(count))
        self.head = nn.Linear(WIDTH, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, sigma, text, past, start):
        p = self.program
        h = self.embed(x.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        if p["beside"] == "counter":
            self.calls += 1
        if p["level"] == "tensor":
            h = h + self.time(sigma.view(1, 1))[:, None]
        elif p["level"] == "per latent":
            rows = self.time(sigma.view(1, 1).expand(4, 1))[None]
            if p["beside"] == "rows repeated":
                h = h * (1 + rows.repeat_interleave(16, 1))
            else:
                h = (h.unflatten(1, (4, 16)) + rows[:, :, None]).flatten(1, 2)
        caches = []
        layers = [*self.layers] * (2 if p["layers"] == "shared twice" else 1)
        for i, layer in enumerate(layers):
            own = past[i % len(self.layers)] if p["cache"] == "a list" else past[0]
            h, cache = layer(h, text, own, start)
            caches.append(cache)
        out = self.head(h).unflatten(1, (4, 4, 4)).permute(0, 4, 1, 2, 3)
        return (out, caches) if p["cache"] == "returned" else out


class Program(nn.Module):
    """A model, and the loop and branches around it."""

    def __init__(self, program):
        super().__init__()
        self.program, self.model = program, Model(program)

    def velocity(self, x, sigma, text, past, start):
        branches = self.program["branches"]
        if branches == "two calls":
            one = self.call(x, sigma, text, past, start)
            return one + 2 * (one - self.call(x, sigma, -text, past, start))
        if branches == "stacked":
            both = self.call(
                torch.cat([x, x]),
                sigma,
                torch.cat([text, -text]),
                [tuple(t.repeat(2, *[1] * (t.dim() - 1)) for t in pair) for pair in past],
                start,
            )
            one, other = both.chunk(2)
            return one + 2 * (one - other)
        return self.call(x, sigma, text, past, start)

    def call(self, *args):
        out = self.model(*args)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, x, sigmas, text, past, start):
        loop = self.program["loop"]
        if loop == "none":
            return self.model(x, sigmas[0], text, past, start)
        for i in range(3):
            sigma, after = sigmas[i], sigmas[i + 1]
            if loop == "euler":
                x = x + (after - sigma) * self.velocity(x, sigma, text, past, start)
            elif loop == "heun":
                v = self.velocity(x, sigma, text, past, start)
                ahead = self.velocity(x + (after - sigma) * v, after, text, past, start)
                x = x + (after - sigma) * (v + ahead) / 2
            elif loop == "noised":
                x = self.velocity(x, sigma, text, past, start) + after * x.flip(0)
            else:
                x = x + 0.1 * self.velocity(x, sigmas[0], text, past, start)
        return x


def program_of(seed):
    draw = random.Random(seed)
    program = {name: draw.choice(options) for name, options in CHOICES.items()}
    if program["branches"] == "stacked" and program["cache"] in ("in place", "window", "empty"):
        program["branches"] = "one"  # a copy of a cache would be written to
    return program


def inputs_of(program, latents, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    if program["text"] in ("projected", "padded", "projected cross"):
        text = draw(1, 6, WIDTH)
        if program["text"] == "padded":
            text = F.pad(text, (0, 0, 0, 10))
    else:
        text = draw(1, HEADS, 6, DIM)
    held = LIMIT if program["cache"] in ("in place", "window") else latents * 16
    past = [(draw(1, HEADS, held, DIM), draw(1, HEADS, held, DIM)) for _ in range(3)]
    if program["cache"] == "empty" and latents == 4:
        past = [(torch.tensor([]), torch.tensor([]))] * 3
    start = latents * 16 if program["cache"] in ("in place", "window") else 0
    return draw(1, 4, 4, 4, 4), torch.tensor([1.0, 0.7, 0.4, 0.0]), text, past, start


@contextlib.contextmanager
def session_of(program, latents):
    if program["session"] == "none":
        yield
        return
    with lipass.Session(preset="exact") as session:
        if program["session"] == "exact":
            yield
            return
        w2c = torch.eye(4).repeat(latents + 4, 1, 1)
        with session.chunk(poses=w2c[:latents], query=w2c[latents:]):
            yield


def difference(seed, preset):
    """Return the largest error of a compiled program over three calls."""
    program = program_of(seed)
    torch._dynamo.reset()
    torch.manual_seed(seed)
    eager = Program(program).eval()
    mine = copy.deepcopy(eager)
    options = {"preset": preset, "inner": "eager"}
    if preset == "sparse":
        options["sparse.budget"] = 1.0
    fast, worst = torch.compile(mine, backend="light_interaction", options=options), 0.0
    for latents in (4, 8, 12):
        given = inputs_of(program, latents, seed + latents)
        own = copy.deepcopy(given)
        try:
            torch.manual_seed(latents)
            want = eager(*given)
        except (RuntimeError, IndexError):
            return 0.0  # a combination that eager refuses too
        torch.manual_seed(latents)
        with session_of(program, latents):
            got = fast(*own)
        pairs = [(want, got), (given, own), (eager.model.calls, mine.model.calls)]
        worst = max(worst, *(apart(*pair) for pair in pairs))
    return worst


def apart(one, other):
    """Return the largest error between tensors of two structures, relative to their size."""
    leaves = (torch.utils._pytree.tree_leaves(side) for side in (one, other))
    return max(
        (
            (a - b).abs().max().item() / (1 + a.abs().max().item())
            for a, b in zip(*leaves, strict=True)
            if isinstance(a, torch.Tensor) and a.numel()
        ),
        default=0.0,
    )


def rounding(seed):
    """Return how far a program that attends in bf16 is from itself in fp32, in eager mode."""
    program = program_of(seed)
    spelling, _, form = program["attention"].rpartition("-")
    if form != "casts":
        return 0.0
    wide, worst = {**program, "attention": f"{spelling}-positional"}, 0.0
    for latents in (4, 8, 12):
        outputs = []
        for spelled in (program, wide):
            torch.manual_seed(seed)
            model, given = Program(spelled).eval(), inputs_of(program, latents, seed + latents)
            torch.manual_seed(latents)
            outputs.append(model(*given))
        worst = max(worst, apart(*outputs))
    return worst


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", ["exact", "sparse"])
def test_compiled_programs_equal_eager(preset, fuzz):
    failed = []
    with torch.no_grad():
        for seed in range(fuzz):
            try:
                worst = difference(seed, preset)
            except Exception as error:
                failed.append(
                    f"{seed}: {type(error).__name__}: {str(error)[:200]} {program_of(seed)}"
                )
                continue
            if worst > 1e-4 and worst > rounding(seed):
                failed.append(f"{seed}: off by {worst:.2g} {program_of(seed)}")
    assert not failed, "\n".join(failed)
