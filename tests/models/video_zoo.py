"""More small random configurations of diffusers' video transformers, by the name of the class."""

import diffusers
import torch
from zoo import COLUMNS, LATENTS, ROWS, ZOO

_WORDS = 7


def _latents(channels=4):
    return torch.randn(1, channels, LATENTS, 2 * ROWS, 2 * COLUMNS)


def _prompt(width=16):
    return torch.randn(1, _WORDS, width)


def _wan_like(name, head_dim=12, **options):
    model = getattr(diffusers, name)(
        num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **options,
    )  # fmt: skip
    inputs = {"hidden_states": _latents(), "timestep": torch.tensor([500])}
    return model, {**inputs, "encoder_hidden_states": _prompt()}


def chrono_edit():
    return _wan_like("ChronoEditTransformer3DModel")


def skyreels_v2():
    return _wan_like("SkyReelsV2Transformer3DModel")


def anyflow():
    model, inputs = _wan_like("AnyFlowTransformer3DModel")
    frames = {"hidden_states": torch.randn(1, LATENTS, 4, 2 * ROWS, 2 * COLUMNS)}
    levels = {
        "timestep": torch.full((1, LATENTS), 500),
        "r_timestep": torch.full((1, LATENTS), 400),
    }
    return model, {**inputs, **frames, **levels}


def wan_vace():
    model, inputs = _wan_like("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=8)
    return model, {**inputs, "control_hidden_states": _latents(8)}


def allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48,
        caption_channels=16, sample_height=2 * ROWS, sample_width=2 * COLUMNS,
        sample_frames=LATENTS,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "encoder_hidden_states": torch.randn(1, 1, _WORDS, 16),
        "timestep": torch.tensor([500]),
        "attention_mask": torch.ones(1, LATENTS, 2 * ROWS, 2 * COLUMNS),
        "encoder_attention_mask": torch.ones(1, _WORDS),
        "image_rotary_emb": None,
    }


def cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        text_embed_dim=16, adaln_lora_dim=8, max_size=(8, 16, 16), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": _prompt(),
    }


def easy_animate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        sample_width=2 * COLUMNS, sample_height=2 * ROWS, num_layers=2, mmdit_layers=1,
        time_embed_dim=16, text_embed_dim=16, add_noise_in_inpaint_model=False,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
    }


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
        "encoder_attention_mask": torch.ones(1, _WORDS),
        "pooled_projections": torch.randn(1, 8),
    }


def kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4,
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS, 2 * ROWS, 2 * COLUMNS, 4),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(n) for n in (LATENTS, ROWS, COLUMNS)],
        "text_rope_pos": torch.arange(_WORDS),
    }


def latte():
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        sample_size=2 * ROWS, patch_size=2, caption_channels=16, video_length=LATENTS,
        cross_attention_dim=24, norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, LATENTS, 2 * ROWS, 2 * ROWS),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
    }


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, pooled_projection_dim=24,
        in_channels=4, text_embed_dim=16, time_embed_dim=16, max_sequence_length=_WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, _WORDS, dtype=torch.bool),
    }


def motif_video():
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
        "encoder_attention_mask": torch.ones(1, _WORDS),
    }


def sana_video():
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _latents(),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500]),
    }


def ltx2():
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=6, audio_cross_attention_dim=12,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS * ROWS * COLUMNS, 4),
        "audio_hidden_states": torch.randn(1, 5, 4),
        "encoder_hidden_states": _prompt(),
        "audio_encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([[500]]),
        "num_frames": LATENTS,
        "height": ROWS,
        "width": COLUMNS,
        "audio_num_frames": 5,
    }


def consis_id():
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=2, sample_width=2 * COLUMNS,
        sample_height=2 * ROWS, sample_frames=9, max_text_seq_length=_WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, LATENTS, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": _prompt(),
        "timestep": torch.tensor([500]),
    }


def joy_image_edit():
    model = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=16, num_layers=2,
        rope_dim_list=[4, 4, 4],
    )  # fmt: skip
    return model, {
        "hidden_states": _latents()[:, None],
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
    }


def helios(**options):
    model = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_dim=(4, 4, 4), **options,
    )  # fmt: skip
    history = {"short": 2, "mid": 2, "long": 4}
    return model, {
        "hidden_states": _latents(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _prompt(),
        "indices_hidden_states": 8 + torch.arange(LATENTS)[None],
        **{f"latents_history_{name}": torch.randn(1, 4, n, 8, 12) for name, n in history.items()},
        **{
            f"indices_latents_history_{name}": torch.arange(n)[None] for name, n in history.items()
        },
    }


VIDEO = {
    "wan": ZOO["wan"],
    "wan-vace": wan_vace,
    "chrono-edit": chrono_edit,
    "skyreels-v2": skyreels_v2,
    "anyflow": anyflow,
    "helios": helios,
    "cosmos": cosmos,
    "kandinsky-5": kandinsky5,
    "sana-wm": ZOO["sana-wm"],
    "sana-video": sana_video,
    "ltx": ZOO["ltx"],
    "ltx-2": ltx2,
    "allegro": allegro,
    "latte": latte,
    "cogvideox": ZOO["cogvideox"],
    "consis-id": consis_id,
    "easy-animate": easy_animate,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-1.5": ZOO["hunyuan-video-1.5"],
    "joy-image-edit": joy_image_edit,
    "mochi": mochi,
    "motif-video": motif_video,
}
