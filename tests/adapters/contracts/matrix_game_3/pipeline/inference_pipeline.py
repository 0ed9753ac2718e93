"""The rollout: clips of 56 frames, 16 of them past, with five latents of memory in front."""

import torch
from utils.cam_utils import compute_relative_poses, select_memory_idx_fov
from utils.utils import build_plucker_from_c2ws, build_plucker_from_pose, get_data
from utils.visualize import process_video
from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler


class MatrixGame3Pipeline:
    """Holds a transformer, the encoder of a prompt and a codec; the constructor loads them."""

    def generate(
        self, text, pil_image, max_area=704 * 1280, shift=5.0, num_inference_steps=40,
        guide_scale=5.0, seed=-1, use_base_model=False, args=None,
    ):  # fmt: skip
        """Generate clip by clip, write a video, and leave the program."""
        height, width = map(int, args.size.split("*"))
        generator = torch.Generator(device=self.device).manual_seed(seed)
        frames, half = 57 + (args.num_iterations - 1) * 40, torch.bfloat16
        image, c2ws, keys, mouse = get_data(
            frames, height, width, pil_image, device=self.device, dtype=half
        )
        prompt = self.text_encoder([text], device=self.device)
        img_cond = self.vae.encode([image[0]])[0].unsqueeze(0).to(half)
        size = dict(zip(("lat_h", "lat_w"), img_cond.shape[3:], strict=True))
        places, cache, videos, done = size["lat_h"] * size["lat_w"] // 4, [None], [], []
        for clip in range(args.num_iterations):
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
                    "x_memory": torch.cat(done, 2)[:, :, index],
                    "timestep_memory": torch.zeros(1, len(index) * places),
                    "mouse_cond_memory": torch.ones(1, len(index), 2),
                    "keyboard_cond_memory": -torch.ones(1, len(index), 6),
                    "memory_latent_idx": index,
                }
            scheduler = FlowUniPCMultistepScheduler()
            scheduler.set_timesteps(num_inference_steps, device=self.device, shift=shift)
            begin, stop = (start - 1) // 4 + 1 if clip else 0, (end - 1) // 4 + 1
            noise = torch.randn(
                (1, 48, stop - begin, *img_cond.shape[3:]), generator=generator, dtype=half
            )
            latents = torch.cat([img_cond, noise[:, :, img_cond.shape[2] :]], 2)
            given = {
                "context": prompt,
                "seq_len": 20 * places,
                "mouse_cond": mouse[:, start:end],
                "keyboard_cond": keys[:, start:end],
                "plucker_emb": rays.to(half),
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
            done.append(latents[:, :, -10:] if clip else latents)
            video, cache = self.vae.stream_decode(
                done[-1], cache, first_chunk=not clip, segment_size=4
            )
            videos.append(video)
        process_video(torch.cat(videos, 2)[0], f"{self.output_dir}/{args.save_name}.mp4")
        exit()
