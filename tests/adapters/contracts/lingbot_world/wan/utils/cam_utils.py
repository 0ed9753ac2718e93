"""Cameras of a clip: one a latent, relative to the one before, as rays of each pixel."""

import torch


def interpolate_camera_poses(src_indices, src_rot_mat, src_trans_vec, tgt_indices):
    """Take the cameras at given places; the miniature needs none between two frames."""
    poses = torch.eye(4).repeat(len(tgt_indices), 1, 1)
    poses[:, :3, :3] = torch.as_tensor(src_rot_mat[[round(at) for at in tgt_indices]])
    poses[:, :3, 3] = torch.as_tensor(src_trans_vec[[round(at) for at in tgt_indices]])
    return poses


def compute_relative_poses(c2ws_mat, framewise=False):
    before = c2ws_mat[:-1] if framewise else c2ws_mat[:1].expand_as(c2ws_mat[1:])
    return torch.cat([torch.eye(4)[None], torch.linalg.inv(before) @ c2ws_mat[1:]])


def get_plucker_embeddings(c2ws_mat, Ks, height, width):
    """Return origins and directions `[T, Y, X, 6]`."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    fx, fy, cx, cy = (one[:, :, None] for one in Ks.chunk(4, dim=-1))
    directions = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones(len(Ks), *x.shape)], -1)
    directions = torch.einsum("tij,tyxj->tyxi", c2ws_mat[:, :3, :3], directions)
    origins = c2ws_mat[:, None, None, :3, 3].expand_as(directions)
    return torch.cat([origins, directions / directions.norm(dim=-1, keepdim=True)], -1)


def get_Ks_transformed(
    Ks, height_org, width_org, height_resize, width_resize, height_final, width_final
):
    x, y = width_resize / width_org, height_resize / height_org
    return Ks * torch.tensor([x, y, x, y])
