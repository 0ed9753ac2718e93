"""Choose memory by cameras: first clip, latest latents, and clips that show what comes next."""

import torch

from lipass.policy.reference_worldplay import gate_chunk


def select_aligned_memory_frames(
    w2c_list,
    current_frame_idx,
    memory_frames,
    temporal_context_size,
    pred_latent_size,
    points_local=None,
    device=None,
):
    w2c = torch.from_numpy(w2c_list).double()
    gate = gate_chunk(
        w2c[:current_frame_idx],
        w2c[current_frame_idx : current_frame_idx + pred_latent_size],
        context_latents=memory_frames,
        temporal_latents=temporal_context_size,
        context_threshold=0.0,
    )
    return list(gate.indices)
