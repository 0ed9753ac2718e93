"""A rollout of diffusers' AnyFlow-FAR: its cache is filled anew behind every chunk.

The list of chunks grows with the rollout, so each chunk has graphs of its own.
"""

import copy
import itertools

import pytest
import torch
from rare_zoo import far_step

import lipass

CHUNKS, FRAMES, LEVELS = 3, 2, (1000, 500, 0)
PRESETS = {"exact": {"preset": "exact"}, "all": {"preset": "all", "chunk_latents": FRAMES}}


@torch.no_grad()
def rollout(forward, model, inputs):
    """Generate chunks: two steps each, then the pass that writes the cache."""
    torch.manual_seed(0)
    caches = copy.deepcopy(inputs["kv_cache"])
    for layer in caches.values():
        layer["compressed_cache"] = layer["compressed_cache"].repeat(1, 1, 1, CHUNKS, 1)
    shape = inputs["hidden_states"].shape
    made = torch.empty(1, 0, *shape[2:])
    told = {"encoder_hidden_states": inputs["encoder_hidden_states"], "return_dict": False}

    def call(latents, level, partition, cached, **more):
        frames = latents.shape[1]
        flag = {"num_cached_chunks": cached, "is_cache_step": bool(more)}
        return forward(
            hidden_states=latents, chunk_partition=partition, kv_cache=caches, kv_cache_flag=flag,
            timestep=torch.full((1, frames), level), r_timestep=torch.full((1, frames), level),
            **told, **more,
        )[0]  # fmt: skip

    for chunk in range(CHUNKS):
        partition = [FRAMES] * (chunk + 1)
        x = torch.randn(shape)
        for level, below in itertools.pairwise(LEVELS):
            x = x + (below - level) / 1000 * call(x, level, partition, chunk)
        made = torch.cat([made, x], 1)
        mask = model.build_attention_mask(
            chunk_partition=partition, height=shape[-2], width=shape[-1], device=x.device,
            mode="cache",
        )  # fmt: skip
        call(made, 0, partition, chunk, attention_mask=mask)
    return made


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_rollout_runs_with_the_passes(name, fresh_dynamo):
    model, inputs = far_step()
    model = model.eval()
    plain = rollout(model, model, inputs)
    with torch._dynamo.config.patch(recompile_limit=4 * CHUNKS):
        compiled = torch.compile(
            model, backend="light_interaction", options={**PRESETS[name], "inner": "eager"}
        )
        made = rollout(compiled, model, inputs)
    torch.testing.assert_close(made, plain, atol=1e-4, rtol=1e-4)
    sites = lipass.report().to_dict()["sites"]
    assert {site["name"] for site in sites} >= {"blocks.0.attn1", "blocks.1.attn1"}
    assert all(site["action"] == "rewritten" or site["reason"] for site in sites)
