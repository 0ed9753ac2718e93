"""Cameras of video frames: which one shows what is to be seen, and where one is from another."""

import torch


def select_memory_idx_fov(
    extrinsics_all, current_start_frame_idx, selected_index_base, use_gpu=False
):
    """Return for each of some frames the earlier one that looks most like it."""
    c2w = torch.as_tensor(extrinsics_all)[:, :3, 2]
    likeness = c2w[selected_index_base] @ c2w[1:current_start_frame_idx].T
    return [int(best) + 1 for best in likeness.argmax(1)]


def compute_relative_poses(c2ws_mat, framewise=False):
    """Return cameras as they are seen from the first one."""
    return torch.linalg.inv(c2ws_mat[:1]) @ c2ws_mat
