"""A video transformer with three kinds of calls: text, prefill of a context, decode of a chunk.

Written for tests after the call structure of HY-WorldPlay: what is called with what, which names
are bound where, what is written to attributes. Its mathematics are small and its own.
"""

import torch
from hyvideo.models.transformers.modules.attention import (
    attention,
    parallel_attention,  # noqa: F401
    sequence_parallel_attention_txt,
    sequence_parallel_attention_vision,
)
from hyvideo.models.transformers.modules.posemb_layers import (
    apply_rotary_emb,
    get_nd_rotary_pos_embed,
)
from torch import nn


class Embedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.mlp = (
            width,
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)),
        )

    def forward(self, number):
        rates = torch.exp(-torch.arange(self.width // 2, device=number.device) / 4.0)
        angles = number[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Stream(nn.Module):
    """Modulation, projections and MLP of one kind of tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def before(self, x, vec):
        shift, scale, *gates = self.mod(vec).chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, -1)
        return [y.unflatten(-1, (self.heads, -1)) for y in (q, k, v)], gates

    def after(self, x, attended, gates):
        gate, shift, scale, gate_mlp = gates
        x = x + attended * gate
        return x + self.mlp(self.norm(x) * (1 + scale) + shift) * gate_mlp


def projected(x, matrices):
    """Multiply groups of four channels of `[B, L, H, D]` by a matrix a token."""
    return torch.einsum("blij,blhgj->blhgi", matrices, x.unflatten(-1, (-1, 4))).flatten(-2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.width, self.txt, self.img = width, Stream(width, heads), Stream(width, heads)

    def forward_txt(self, txt, vec_txt, block_idx=None, cache_txt=False):
        (q, k, v), gates = self.txt.before(txt, vec_txt)
        out, kept = sequence_parallel_attention_txt(q, k, v, block_idx, cache_txt)
        return self.txt.after(txt, self.txt.proj(out), gates), kept

    def forward_vision(self, img, vec, freqs_cis, block_idx, viewmats, Ks, kv_cache, cache_vision):
        (q, k, v), gates = self.img.before(img, vec)
        cameras = viewmats.clone()
        cameras[..., :3, :3] = Ks @ viewmats[..., :3, :3]
        inverse = torch.linalg.inv(cameras)
        prope = [projected(q, cameras.mT), projected(k, inverse), projected(v, inverse)]
        rotary = [apply_rotary_emb(q, *freqs_cis), apply_rotary_emb(k, *freqs_cis), v]
        out, out_prope, kept = sequence_parallel_attention_vision(
            *zip(rotary, prope, strict=True), block_idx, kv_cache, cache_vision
        )
        out_prope = projected(out_prope.unflatten(-1, (self.img.heads, -1)), cameras).flatten(2)
        both = self.img.proj(out) + self.img_attn_prope_proj(out_prope)
        return self.img.after(img, both, gates), kept

    def forward(self, ar_txt_inference=False, ar_vision_inference=False, **kwargs):
        return self.forward_txt(**kwargs) if ar_txt_inference else self.forward_vision(**kwargs)


class Refiner(nn.Module):
    def __init__(self, states, width, heads):
        super().__init__()
        self.embed, self.stream = nn.Linear(states, width), Stream(width, heads)

    def forward(self, txt, vec, mask):
        x = self.embed(txt)
        (q, k, v), gates = self.stream.before(x, vec[:, None])
        return self.stream.after(x, self.stream.proj(attention(q, k, v, mask)), gates)


class HunyuanVideo_1_5_DiffusionTransformer(nn.Module):
    def __init__(
        self,
        patch_size,
        in_channels,
        out_channels,
        hidden_size,
        heads_num,
        mm_double_blocks_depth,
        rope_dim_list,
        text_states_dim,
        rope_theta=256,
        **others,
    ):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.rope_dim_list, self.rope_theta = rope_dim_list, rope_theta
        self.img_in = nn.Conv3d(2 * in_channels + 1, hidden_size, patch_size, patch_size)
        self.txt_in = Refiner(text_states_dim, hidden_size, heads_num)
        self.time_in = Embedder(hidden_size)
        self.double_blocks = nn.ModuleList(
            Block(hidden_size, heads_num) for _ in range(mm_double_blocks_depth)
        )
        self.final_layer = nn.Linear(hidden_size, out_channels)
        self.attn_param = {"tile_size": [6, 8, 8]}

    @property
    def config(self):
        return {"heads_num": self.double_blocks[0].img.heads}

    def add_action_parameters(self):
        width = self.final_layer.in_features
        self.action_in = Embedder(width)
        for block in self.double_blocks:
            block.img_attn_prope_proj = nn.Linear(width, width)

    def forward_txt(
        self, timestep_txt, text_states, encoder_attention_mask, cache_txt=False, **others
    ):
        vec = self.time_in(timestep_txt)
        txt = self.txt_in(text_states, vec, encoder_attention_mask)
        txt = txt[encoder_attention_mask.bool()].unsqueeze(0)
        cache = []
        for index, block in enumerate(self.double_blocks):
            txt, kept = block(
                ar_txt_inference=True, txt=txt, vec_txt=vec, block_idx=index, cache_txt=cache_txt
            )
            cache.append({"k_vision": None, "v_vision": None, **kept})
        return cache

    def forward_vision(
        self,
        hidden_states,
        timestep,
        freqs_cos=None,
        freqs_sin=None,
        action=None,
        viewmats=None,
        Ks=None,
        kv_cache=None,
        cache_vision=False,
        rope_temporal_size=4,
        start_rope_start_idx=0,
        **others,
    ):
        frames, height, width = hidden_states.shape[2:]
        self.attn_param["thw"] = [frames, height, width]
        if freqs_cos is None:
            tables = get_nd_rotary_pos_embed(
                self.rope_dim_list, (rope_temporal_size, height, width), self.rope_theta
            )
            first = start_rope_start_idx * height * width
            freqs_cos, freqs_sin = (one[first : first + frames * height * width] for one in tables)
        img = self.img_in(hidden_states).flatten(2).transpose(1, 2)
        vec = self.time_in(timestep.reshape(-1)) + self.action_in(action.reshape(-1))
        vec, viewmats, Ks = (
            x.repeat_interleave(height * width, 1) for x in (vec[None], viewmats, Ks)
        )
        new = []
        for index, block in enumerate(self.double_blocks):
            self.attn_param["layer-name"] = f"double_block_{index + 1}"
            img, kept = block(
                ar_vision_inference=True,
                img=img,
                vec=vec,
                freqs_cis=(freqs_cos, freqs_sin),
                block_idx=index,
                viewmats=viewmats,
                Ks=Ks,
                kv_cache=kv_cache,
                cache_vision=cache_vision,
            )
            text = {name: kv_cache[index][name] for name in ("k_txt", "v_txt")}
            new.append({**text, **kept})
        if cache_vision:
            return new
        out = self.final_layer(img).transpose(1, 2)
        return out.unflatten(2, (frames, height, width)), None

    def forward(
        self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **kwargs
    ):
        if ar_txt_inference:
            return self.forward_txt(**kwargs)
        if ar_vision_inference:
            return self.forward_vision(**kwargs)
        raise NotImplementedError
