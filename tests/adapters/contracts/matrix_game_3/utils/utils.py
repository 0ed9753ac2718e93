"""Rays of a camera for each token."""

import torch


def get_data(num_frames, height, width, pil_image, device=None, dtype=None):
    """Read a first frame, and make up actions and the cameras that follow from them."""
    raise NotImplementedError("the miniature has no actions of its own")


def build_plucker_from_c2ws(c2ws_seq, src_indices, tgt_indices, lat_h, lat_w):
    """Return the rays of the cameras of some frames, `[1, 1536, T, Y, X]`."""
    first = int(src_indices[0])
    return build_plucker_from_pose(c2ws_seq[[int(i) - first for i in tgt_indices]], lat_h, lat_w)


def build_plucker_from_pose(c2ws_pose, lat_h, lat_w):
    rows = c2ws_pose[:, :3].flatten(1).float()
    rays = rows.repeat(1, 128) * torch.linspace(0.01, 0.1, 1536)
    return rays.T[None, :, :, None, None].expand(-1, -1, -1, lat_h, lat_w)
