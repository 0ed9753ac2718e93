"""Roll a transformer out block by block: denoise, add noise again, refresh the cache."""

import torch
from torch import nn


class CausalInferencePipeline(nn.Module):
    """The rollout."""

    def __init__(self, args, device, generator=None, text_encoder=None, vae=None):
        super().__init__()
        self.generator, self.text_encoder, self.vae = generator, text_encoder, vae
        self.scheduler = generator.get_scheduler()
        levels = torch.tensor(args.denoising_step_list)
        if args.warp_denoising_step:
            table = torch.cat([self.scheduler.timesteps, torch.zeros(1)])
            levels = table[1000 - levels]
        self.denoising_step_list = levels
        self.frame_seq_length, self.num_transformer_blocks = 1560, 30
        self.kv_cache1 = self.prope_kv_cache1 = None
        self.args = args
        self.num_frame_per_block = args.num_frame_per_block
        self.independent_first_frame = args.independent_first_frame

    def inference(
        self,
        noise,
        text_prompts,
        initial_latent=None,
        return_latents=False,
        viewmats=None,
        Ks=None,
    ):
        """Generate `[B, T, C, Y, X]` from noise, and perhaps from what is before it."""
        conditions = self.text_encoder(text_prompts=text_prompts)
        for layer in self.crossattn_cache:
            layer["is_init"] = False
        for layer in (*self.kv_cache1, *(self.prope_kv_cache1 or ())):
            for name in ("global_end_index", "local_end_index"):
                layer[name] = torch.tensor([0], dtype=torch.long, device=noise.device)
        batch, given = len(noise), 0 if initial_latent is None else initial_latent.shape[1]
        output = noise.new_zeros(batch, given + noise.shape[1], *noise.shape[2:])
        start = 0

        def call(latents, level):
            cameras = {}
            if viewmats is not None:
                now = slice(start, start + latents.shape[1])
                cameras = {"viewmats": viewmats[:, now], "Ks": Ks[:, now]}
                cameras["prope_kv_cache"] = self.prope_kv_cache1
            return self.generator(
                noisy_image_or_video=latents,
                conditional_dict=conditions,
                timestep=level,
                kv_cache=self.kv_cache1,
                crossattn_cache=self.crossattn_cache,
                current_start=start * self.frame_seq_length,
                **cameras,
            )[1]

        while start < given:
            output[:, start : start + self.num_frame_per_block] = known = initial_latent[
                :, start : start + self.num_frame_per_block
            ]
            call(known, torch.zeros(known.shape[:2], dtype=torch.long))
            start += self.num_frame_per_block
        while start < output.shape[1]:
            frames = self.num_frame_per_block
            noisy = noise[:, start - given : start - given + frames]
            for index, current in enumerate(self.denoising_step_list):
                level = torch.ones([batch, frames], dtype=torch.int64) * current
                clean = call(noisy, level)
                if index < len(self.denoising_step_list) - 1:
                    following = self.denoising_step_list[index + 1]
                    flat = clean.flatten(0, 1)
                    noisy = self.scheduler.add_noise(
                        flat, torch.randn_like(flat), following * torch.ones(len(flat))
                    ).unflatten(0, clean.shape[:2])
            output[:, start : start + frames] = clean
            call(clean, torch.ones_like(level) * self.args.context_noise)
            start += frames
        video = self.vae.decode_to_pixel(output, use_cache=False)
        return (video, output) if return_latents else video
