"""Small random configurations of diffusers' video transformers: their code, not their weights."""

import copy

import torch

LATENTS, ROWS, COLUMNS = 3, 4, 6


def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, LATENTS, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }


def hunyuan_video_15():
    from diffusers.models.transformers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(4, 4, 4), task_type="t2v",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, LATENTS, ROWS, COLUMNS),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_attention_mask": torch.ones(1, 7, dtype=torch.bool),
        "encoder_hidden_states_2": torch.randn(1, 5, 8),
        "encoder_attention_mask_2": torch.ones(1, 5, dtype=torch.bool),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def sana_wm():
    from diffusers.models.transformers import SanaWMTransformer3DModel

    model = SanaWMTransformer3DModel(
        in_channels=4, num_layers=4, hidden_size=48, num_attention_heads=2, linear_head_dim=24,
        caption_channels=16, softmax_every_n=2, chunk_plucker_channels=48,
        chunk_plucker_post_attn_blocks=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, LATENTS, ROWS, COLUMNS),
        "timestep": torch.full((1, 1, LATENTS), 500.0),
        "encoder_hidden_states": torch.randn(1, 1, 7, 16),
        "mask": torch.ones(1, 7),
        "camera_conditions": torch.cat(
            [torch.eye(4).flatten().repeat(1, LATENTS, 1), torch.ones(1, LATENTS, 4)], -1
        ),
        "chunk_plucker": torch.randn(1, 48, LATENTS, ROWS, COLUMNS),
    }


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS * ROWS * COLUMNS, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 7),
        "num_frames": LATENTS,
        "height": ROWS,
        "width": COLUMNS,
    }


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=2, sample_width=2 * COLUMNS,
        sample_height=2 * ROWS, sample_frames=9, max_text_seq_length=7,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
    }


ZOO = {
    "wan": wan,
    "hunyuan-video-1.5": hunyuan_video_15,
    "sana-wm": sana_wm,
    "ltx": ltx,
    "cogvideox": cogvideox,
}


def own_rounding(model, inputs, expected):
    """Return how far the model is from itself in fp64: linear attention makes 1e-7 into 1e-4."""

    def wide(given):
        floats = isinstance(given, torch.Tensor) and given.is_floating_point()
        return given.double() if floats else given

    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**{k: wide(v) for k, v in inputs.items()})[0]
    return (exact - expected).abs().max()
