"""Make one clip a call, from a first frame, a prompt and the cameras in a folder."""

import os

import numpy as np
import torch
import torchvision.transforms.functional as TF

from .modules.model import WanModel
from .utils.cam_utils import (
    compute_relative_poses,
    get_Ks_transformed,
    get_plucker_embeddings,
    interpolate_camera_poses,
)
from .utils.fm_solvers import (
    FlowDPMSolverMultistepScheduler,
    get_sampling_sigmas,
    retrieve_timesteps,
)
from .utils.fm_solvers_unipc import FlowUniPCMultistepScheduler


class WanI2V:
    """Holds two transformers, one for the noisy levels and one for the others."""

    def __init__(self, config, checkpoint_dir):
        self.low_noise_model = WanModel.from_pretrained(checkpoint_dir)
        self.high_noise_model = WanModel.from_pretrained(checkpoint_dir)

    def generate(
        self, input_prompt, img, action_path=None, max_area=720 * 1280, frame_num=81, shift=5.0,
        sample_solver="unipc", sampling_steps=40, guide_scale=5.0, n_prompt="", seed=-1,
        offload_model=True,
    ):  # fmt: skip
        """Return the video `[C, T, Y, X]`."""
        img = TF.to_tensor(img)
        stride = self.vae_stride[1]
        ratio = img.shape[1] / img.shape[2]
        lat_h = round(np.sqrt(max_area * ratio) // stride)
        lat_w = round(np.sqrt(max_area / ratio) // stride)
        lat_f = (frame_num - 1) // self.vae_stride[0] + 1
        seed_g = torch.Generator(device=self.device)
        seed_g.manual_seed(seed)
        latent = torch.randn(16, lat_f, lat_h, lat_w, generator=seed_g, device=self.device)
        dit_cond_dict = None
        if action_path is not None:
            rays = self.rays(action_path, frame_num, lat_f, (lat_h, lat_w))
            dit_cond_dict = {"c2ws_plucker_emb": rays.chunk(1, dim=0)}
        shown = torch.zeros(4, lat_f, lat_h, lat_w, device=self.device)
        shown[:, 0] = 1
        y = torch.concat([shown, self.vae.encode([img])[0]])
        arguments = [
            {
                "context": self.text_encoder([text], self.device),
                "seq_len": lat_f * lat_h * lat_w // 4,
                "y": [y],
                "dit_cond_dict": dit_cond_dict,
            }
            for text in (input_prompt, n_prompt or self.sample_neg_prompt)
        ]
        with torch.amp.autocast("cuda", dtype=self.param_dtype), torch.no_grad():
            if sample_solver == "unipc":
                scheduler = FlowUniPCMultistepScheduler(
                    num_train_timesteps=self.num_train_timesteps, shift=1
                )
                scheduler.set_timesteps(sampling_steps, device=self.device, shift=shift)
                timesteps = scheduler.timesteps
            else:
                scheduler = FlowDPMSolverMultistepScheduler(
                    num_train_timesteps=self.num_train_timesteps, shift=1
                )
                sigmas = get_sampling_sigmas(sampling_steps, shift)
                timesteps, _ = retrieve_timesteps(scheduler, device=self.device, sigmas=sigmas)
            for _, t in enumerate(timesteps):
                noisy = t.item() >= self.boundary * self.num_train_timesteps
                model = self.high_noise_model if noisy else self.low_noise_model
                level = torch.stack([t]).to(self.device)
                told, not_told = (model([latent], t=level, **one)[0] for one in arguments)
                predicted = not_told + guide_scale * (told - not_told)
                latent = scheduler.step(
                    predicted.unsqueeze(0), t, latent.unsqueeze(0), return_dict=False,
                    generator=seed_g,
                )[0].squeeze(0)  # fmt: skip
        return self.vae.decode([latent])[0]

    def rays(self, action_path, frame_num, lat_f, size):
        """Read cameras, one a frame, and return rays `[1, 6 * 64, T, Y, X]`, one a latent."""
        c2ws = np.load(os.path.join(action_path, "poses.npy"))[:frame_num]
        Ks = torch.from_numpy(np.load(os.path.join(action_path, "intrinsics.npy"))).float()
        stride, (lat_h, lat_w) = self.vae_stride[1], size
        height, width = lat_h * stride, lat_w * stride
        Ks = get_Ks_transformed(
            Ks, height_org=480, width_org=832, height_resize=height, width_resize=width,
            height_final=height, width_final=width,
        )[0]  # fmt: skip
        last = len(c2ws) - 1
        poses = interpolate_camera_poses(
            src_indices=np.linspace(0, last, last + 1),
            src_rot_mat=c2ws[:, :3, :3],
            src_trans_vec=c2ws[:, :3, 3],
            tgt_indices=np.linspace(0, last, lat_f),
        )
        poses = compute_relative_poses(poses, framewise=True)
        rays = get_plucker_embeddings(poses, Ks.repeat(len(poses), 1), height, width)
        rays = rays.unflatten(1, (lat_h, stride)).unflatten(3, (lat_w, stride))
        return rays.permute(5, 2, 4, 0, 1, 3).flatten(0, 2)[None]
