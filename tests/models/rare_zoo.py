"""Configurations of diffusers' video transformers with masks, caches and packed tokens."""

import diffusers
import torch
from diffusers.models import transformers
from video_zoo import _WORDS, _latents, _prompt, _wan_like, helios
from zoo import COLUMNS, LATENTS, ROWS

_PLACES = ROWS * COLUMNS


def wan_i2v():
    model, inputs = _wan_like("WanTransformer3DModel", image_dim=16, added_kv_proj_dim=24)
    return model, {**inputs, "encoder_hidden_states_image": torch.randn(1, 5, 16)}


def wan_ti2v():
    """A noise level for each token."""
    model, inputs = _wan_like("WanTransformer3DModel")
    levels = torch.full((1, LATENTS * _PLACES), 500)
    levels[:, :_PLACES] = 0
    return model, {**inputs, "timestep": levels}


def skyreels_v2_df():
    """Blocks of frames that attend to those in front of them, with a noise level a frame."""
    model, inputs = _wan_like(
        "SkyReelsV2Transformer3DModel", num_frame_per_block=2, inject_sample_info=True
    )
    return model, {
        **inputs,
        "hidden_states": torch.randn(1, 4, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.tensor([[0, 100, 200, 300]]),
        "enable_diffusion_forcing": True,
        "fps": torch.tensor([0]),
    }


def helios_amplified():
    return helios(is_amplify_history=True)


def framepack():
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4), guidance_embeds=False, has_image_proj=True, image_proj_dim=12,
        has_clean_x_embedder=True,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
        "encoder_attention_mask": torch.ones(1, _WORDS),
        "pooled_projections": torch.randn(1, 8),
        "image_embeds": torch.randn(1, 3, 12),
        "indices_latents": 7 + torch.arange(LATENTS),
        "latents_clean": torch.randn(1, 4, 2, 8, 12),
        "indices_latents_clean": torch.tensor([0, 6]),
        "latents_history_2x": torch.randn(1, 4, 2, 8, 12),
        "indices_latents_history_2x": torch.tensor([4, 5]),
        "latents_history_4x": torch.randn(1, 4, 4, 8, 12),
        "indices_latents_history_4x": torch.arange(4),
    }


def kandinsky6():
    model = transformers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16,
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        in_audio_dim=4, out_audio_dim=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS, 2 * ROWS, 2 * COLUMNS, 9),
        "encoder_hidden_states": _prompt(),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": torch.randn(1, 5, 4),
    }


def kandinsky6_sr():
    model = transformers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=32,
        num_visual_blocks=2, axes_dims=(4, 6, 6), nabla_window=(3, 3, 3), tile_sizes=((16, 16),),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS, 16, 16, 9),
        "timestep": torch.tensor([500.0]),
    }


def wan_animate():
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        image_dim=16, added_kv_proj_dim=24, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 12, LATENTS + 1, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
        "encoder_hidden_states_image": torch.randn(1, 5, 16),
        "pose_hidden_states": torch.randn(1, 4, LATENTS, 2 * ROWS, 2 * COLUMNS),
        "face_pixel_values": torch.randn(1, 3, 9, 16, 16),
    }


def far_prefill():
    """The clean chunks of AnyFlow-FAR, which fill its cache."""
    return _far([2], full_chunk_limit=3, chunk_partition=(1, 2, 2))


def _far(frames, **options):
    """Two frames behind others, as many as the list says for each chunk."""
    model, inputs = _wan_like("AnyFlowFARTransformer3DModel", **options)
    return model, {
        **inputs,
        "hidden_states": torch.randn(1, 2, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((1, 2), 500),
        "r_timestep": torch.full((1, 2), 400),
        "chunk_partition": frames,
    }


def far_step():
    """A step of AnyFlow-FAR: far history at a coarser grid, near history, own frames, zeros."""
    model, inputs = _far([2, 2, 2], head_dim=16, full_chunk_limit=2, chunk_partition=(2, 2, 2))
    caches = {"compressed_cache": 2 * _PLACES // 4, "full_cache": 2 * _PLACES}
    return model, {
        **inputs,
        "kv_cache": {
            layer: {name: torch.randn(2, 1, 2, 2 * n, 16) for name, n in caches.items()}
            for layer in range(2)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def refiner():
    """One block of tokens that were packed outside of the model."""
    model = transformers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=6, audio_cross_attention_dim=12,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    tokens = LATENTS * _PLACES
    return model, {
        "hidden_states": torch.randn(1, tokens, 4),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.full((1, tokens), 500.0),
        "video_rotary_emb": (torch.ones(1, tokens, 24), torch.zeros(1, tokens, 24)),
    }


def minimax_h3():
    model = transformers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=32, hidden_size=64, num_layers=2,
        num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=16,
        freq_dim=32, time_embed_hidden_dim=32, time_embed_dim=32, rope_freq_dim=4,
    )  # fmt: skip
    video, audio = LATENTS * _PLACES, 5
    tokens = _WORDS + video + audio
    return model, {
        "hidden_states": torch.randn(1, video, 16),
        "audio_hidden_states": torch.randn(1, audio, 4),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(tokens, dtype=torch.long),
        "token_tags": torch.zeros(tokens, dtype=torch.long),
        "position_ids": torch.zeros(tokens, 3),
        "text_indices": torch.arange(_WORDS),
        "video_indices": _WORDS + torch.arange(video),
        "audio_indices": _WORDS + video + torch.arange(audio),
    }


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, _PLACES, 4),
        "encoder_hidden_states": _prompt(),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(_PLACES, 3),
        "txt_ids": torch.zeros(_WORDS, 3),
    }


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=2 * COLUMNS, in_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24,
        pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2 * COLUMNS, 2 * COLUMNS),
        "encoder_hidden_states": _prompt(),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
    }


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, _PLACES, 4),
        "encoder_hidden_states": _prompt(),
        "encoder_hidden_states_mask": torch.ones(1, _WORDS, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, ROWS, COLUMNS)]],
    }


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=2 * COLUMNS, patch_size=2, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2 * COLUMNS, 2 * COLUMNS),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


RARE = {
    "wan-i2v": wan_i2v,
    "wan-ti2v": wan_ti2v,
    "wan-animate": wan_animate,
    "skyreels-v2-df": skyreels_v2_df,
    "helios-amplified": helios_amplified,
    "hunyuan-framepack": framepack,
    "kandinsky-6": kandinsky6,
    "kandinsky-6-sr": kandinsky6_sr,
    "anyflow-far": far_prefill,
    "anyflow-far-step": far_step,
    "sana-wm-refiner": refiner,
    "minimax-h3": minimax_h3,
    "flux": flux,
    "sd3": sd3,
    "qwen-image": qwen_image,
    "pixart": pixart,
}
