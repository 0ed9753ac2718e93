"""The rollout: clips of 56 frames, 16 of them past, with five latents of memory in front."""

import torch
from utils.cam_utils import compute_relative_poses, select_memory_idx_fov
from utils.utils import build_plucker_from_c2ws, build_plucker_from_pose
from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler


class MatrixGame3Pipeline:
    def __init__(self, model):
        self.model = model

    def generate(self, c2ws, prompt, noise, actions, steps=3, clips=1):
        """Return the latents of all clips `[1, C, T, Y, X]` and what memory each of them read."""
        size = dict(zip(("lat_h", "lat_w"), noise.shape[3:], strict=True))
        places, done, read = noise.shape[3] * noise.shape[4] // 4, None, []
        img_cond = noise[:, :, :1]
        for clip in range(clips):
            end = 57 + 40 * clip
            start = end - 56 if clip else 0
            targets = range(start + 3 if clip else 0, end, 4)
            rays = build_plucker_from_c2ws(c2ws[start:end], range(start, end), targets, **size)
            memory = {}
            if clip:
                bases = [end - offset for offset in range(1, 34, 8)]
                selected = select_memory_idx_fov(c2ws, start, bases, use_gpu=True)
                selected[-1] = 4
                bases = [end - offset for offset in range(1, 34, 8)]
                front, index = [], []
                for frame, base in zip(selected, bases, strict=False):
                    index.append((frame - 1) // 4 + 1)
                    last = (frame - 1) // 4 * 4 + 4
                    pair = torch.cat([c2ws[base : base + 1], c2ws[last : last + 1]])
                    pose = compute_relative_poses(pair, framewise=False)[1:2]
                    front.append(build_plucker_from_pose(pose, **size))
                rays = torch.cat([*front, rays], 2)
                memory = {
                    "x_memory": done[:, :, index],
                    "timestep_memory": torch.zeros(1, len(index) * places),
                    "mouse_cond_memory": torch.ones(1, len(index), 2),
                    "keyboard_cond_memory": -torch.ones(1, len(index), 6),
                    "memory_latent_idx": index,
                }
                read.append(index)
            scheduler = FlowUniPCMultistepScheduler()
            scheduler.set_timesteps(steps, shift=5.0)
            begin, stop = (start - 1) // 4 + 1 if clip else 0, (end - 1) // 4 + 1
            latents = torch.cat([img_cond, noise[:, :, begin + img_cond.shape[2] : stop]], 2)
            given = {
                "context": prompt,
                "seq_len": 20 * places,
                "mouse_cond": actions[0][:, start:end],
                "keyboard_cond": actions[1][:, start:end],
                "plucker_emb": rays,
                "predict_latent_idx": (begin, stop),
                **memory,
            }
            for t in scheduler.timesteps:
                level = latents.new_full((latents.shape[2], places), t)
                level[: img_cond.shape[2]].zero_()
                pred = self.model(x=latents, t=level.flatten()[None], **given)
                latents = scheduler.step(pred, t, latents, return_dict=False)[0]
                latents = torch.cat([img_cond, latents[:, :, img_cond.shape[2] :]], 2)
            img_cond = latents[:, :, -4:]
            done = latents if done is None else torch.cat([done, latents[:, :, -10:]], 2)
        return done, read
