"""Whose sites they are, and which pass decided about them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.compile.sites import refuse_unmerged, site_records, tell_gradients
from lipass.kernels import registry
from lipass.passes.attention.site import AttentionSite
from lipass.passes.core import Note, PassPipeline
from lipass.testing.fixtures import MiniWorld

ALL = (
    "canonicalize,find-attention,find-poses,find-steps,prune-context,sparse-attention,"
    "attend-pieces,share-blocks"
)


def decide(*notes, role="decode", text=ALL):
    site = AttentionSite("blocks.0:decode", "m.py:3", role, None, (), 1.0, reason="a mask")
    (record,) = site_records([site], PassPipeline.parse(text), [Note(*one) for one in notes])
    return record.action, record.reason


SITE = "blocks.0:decode"


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        pytest.param(
            [
                ("sparse-attention", SITE, "kept", "its gradient is recorded"),
                ("share-blocks", SITE, "kept", "it is there once"),
            ],
            ("kept", "its gradient is recorded"),
            id="a pass that shares code decides nothing",
        ),
        pytest.param(
            [("prune-context", "context", "kept", "the graph has 0 camera inputs")],
            ("kept", "the graph has 0 camera inputs"),
            id="what a pass says of the whole graph holds for the site",
        ),
        pytest.param(
            [
                ("prune-context", "context", "kept", "the graph has 0 camera inputs"),
                ("sparse-attention", SITE, "rewritten", "decode, budget 0.3"),
            ],
            ("rewritten", "decode, budget 0.3"),
            id="the pass that rewrote it, not the one that did not",
        ),
        pytest.param(
            [
                ("prune-context", SITE, "rewritten", "keys of kept latents only"),
                ("sparse-attention", SITE, "kept", "layer 0 is in dense_layers"),
            ],
            ("rewritten", "keys of kept latents only; layer 0 is in dense_layers"),
            id="a rewrite stays one where a later pass keeps it",
        ),
        pytest.param(
            [
                ("sparse-attention", SITE, "kept", "layer 0 is in dense_layers"),
                ("attend-pieces", SITE, "rewritten", "dense over 3 pieces"),
            ],
            ("kept", "layer 0 is in dense_layers"),
            id="an approximation has the last word",
        ),
    ],
)
def test_reason_is_that_of_the_pass_that_decided(notes, expected):
    assert decide(*notes) == expected


def test_site_that_nobody_understood_says_why():
    text = "canonicalize,find-attention,attend-pieces"
    assert decide(role="other", text=text) == ("kept", "other: a mask")


def both(preset="sparse"):
    options = {"preset": preset, "inner": "eager", "sparse.budget": 0.3}
    models = [MiniWorld().eval() for _ in range(2)]
    return [torch.compile(m, backend="light_interaction", options=options) for m in models]


@pytest.mark.usefixtures("fresh_dynamo")
def test_two_models_of_one_class_stay_apart(mini_world_inputs):
    first, second = both()
    with torch.no_grad():
        for n in (3, 4):
            first(*mini_world_inputs(n))
        names = set(lipass.report().sites)
        registry.reset_telemetry()
        first(*mini_world_inputs(4))
        for _ in range(2):
            second(*mini_world_inputs(4))
        first(*mini_world_inputs(4))
    report = lipass.report()
    mine, other = sorted({site.model for site in report.sites.values()})
    assert other.startswith(f"{mine.partition('#')[0]}#")
    assert set(report.sites) == names | {f"{other}/{name}" for name in names}
    calls = {key: counts.calls for key, counts in registry.telemetry().items()}
    assert calls == dict.fromkeys(report.sites, 2)
    table = report.table()
    assert table.count("site ") == 2
    assert f"\n{other}\n" in table


@pytest.mark.usefixtures("fresh_dynamo")
def test_two_graphs_of_one_model_have_one_name(mini_world_inputs):
    first, _ = both()
    with torch.no_grad():
        for n in (3, 4, 5):
            first(*mini_world_inputs(n))
    assert len({site.model for site in lipass.report().sites.values()}) == 1
    assert all("/" not in key for key in lipass.report().sites)


@pytest.mark.usefixtures("fresh_dynamo")
def test_models_of_two_classes_stay_apart(mini_world_inputs):
    class Expert(MiniWorld):
        def forward(self, *args):
            return super().forward(*args) * 2

    options = {"preset": "sparse", "inner": "eager"}
    with torch.no_grad():
        for model in (MiniWorld().eval(), Expert().eval()):
            fast = torch.compile(model, backend="light_interaction", options=options)
            for n in (3, 4):
                fast(*mini_world_inputs(n))
    models = {site.model.partition("#")[0] for site in lipass.report().sites.values()}
    assert models == {"MiniWorld", "Expert"}


class Layer(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.qkv, self.breaks = nn.Linear(16, 48), breaks

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """Patches of a clip, or a prompt, through the same layers."""

    def __init__(self, breaks=False):
        super().__init__()
        self.patch = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList([Layer(breaks), Layer(breaks)])

    def forward(self, clip=None, words=None):
        x = self.patch(clip).flatten(2).mT if words is None else words
        return self.layers[1](self.layers[0](x))


def seen_of(model, *calls, **options):
    options = {"preset": "sparse", "inner": "eager", **options}
    fast = torch.compile(model.eval(), backend="light_interaction", options=options)
    registry.reset_telemetry()
    with torch.no_grad():
        for given in calls:
            torch.testing.assert_close(fast(**given), model(**given))
    return {name: (site.role, site.action) for name, site in lipass.report().sites.items()}


CLIP = {"clip": torch.randn(1, 4, 3, 8, 8)}


@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_that_dynamo_compiles_as_one_function_have_a_receipt_each():
    found = seen_of(Video(breaks=True), CLIP, CLIP, **{"sparse.token_grid": (3, 4, 4)})
    names = [f"layers.{i}/attention" for i in range(2)]
    assert found == dict.fromkeys(names, ("self", "rewritten"))
    assert {name: registry.telemetry()[name].calls for name in names} == dict.fromkeys(names, 2)
    assert {site.model for site in lipass.report().sites.values()} == {"Video"}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("clip_first", [True, False])
def test_a_module_that_reads_a_prompt_in_one_graph_and_a_clip_in_another_is_listed_twice(
    clip_first,
):
    calls = [CLIP, {"words": torch.randn(1, 7, 16)}]
    found = seen_of(Video(), *(calls if clip_first else reversed(calls)))
    clips = {f"layers.{i}": ("self", "rewritten") for i in range(2)}
    assert found == clips | {f"layers.{i}:text": ("text", "kept") for i in range(2)}
    assert all(registry.telemetry()[name].calls == 1 for name in clips)


def test_gradients_that_keep_attention_dense_are_told_with_the_remedy():
    site = AttentionSite("blocks.0:decode", "m.py:3", "decode", None, (), 1.0, reason="a mask")
    pipeline = PassPipeline.parse(ALL)
    why = "its gradient is recorded; call the model under torch.no_grad()"
    notes = [Note("sparse-attention", SITE, "kept", why)]
    records = site_records([site], pipeline, notes)
    with pytest.warns(lipass.LipassWarning, match=r"got 1 of 1 sites of World .* torch.no_grad"):
        tell_gradients(records, pipeline, "World")
    exact = PassPipeline.parse("canonicalize,find-attention,attend-pieces")
    tell_gradients(records, exact, "World")  # nothing was to become sparse
    tell_gradients(site_records([site], pipeline, []), pipeline, "World")


@pytest.mark.parametrize("role", ["decode", "other"])
def test_strict_refuses_a_history_that_is_not_merged(role):
    site = AttentionSite("blocks.0", "m.py:3", role, None, (), 1.0)
    note = Note("merge-history", "blocks.0", "kept", "a mask says which latents see which")
    with pytest.raises(
        lipass.LipassError, match=r"m.py:3\): a mask says(.|\n)*set 'merge' to False"
    ):
        refuse_unmerged([site], [note])


def test_strict_takes_a_history_that_is_merged_and_sites_without_one():
    decode, prefill = (
        AttentionSite(role, "m.py:3", role, None, (), 1.0) for role in ("decode", "prefill")
    )
    told = [("decode", "rewritten"), ("prefill", "kept")]
    refuse_unmerged([decode, prefill], [Note("merge-history", *one, "why") for one in told])
