"""Choose memory by cameras: first clip, latest latents, and clips that look the same way."""

import numpy as np


def select_aligned_memory_frames(
    w2c_list,
    current_frame_idx,
    memory_frames,
    temporal_context_size,
    pred_latent_size,
    points_local=None,
    device=None,
):
    if current_frame_idx <= memory_frames:
        return list(range(current_frame_idx))
    forward, recent = w2c_list[:, 2, :3], current_frame_idx - temporal_context_size
    ahead = forward[current_frame_idx : current_frame_idx + pred_latent_size].mean(0)
    clips = sorted(range(4, recent, 4), key=lambda clip: -float(np.dot(forward[clip], ahead)))
    kept = {*range(4), *range(recent, current_frame_idx)}
    for clip in clips:
        if len(kept) >= memory_frames:
            break
        kept |= set(range(clip, clip + 4))
    return sorted(kept)
