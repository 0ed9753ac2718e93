"""The rollout that comes with the model: text once, then context and steps chunk by chunk."""

import torch
from hyvideo.utils.retrieval_context import select_aligned_memory_frames


class HunyuanVideo_1_5_Pipeline:
    def ar_rollout(self, *args, **kwargs):
        return self._ar_rollout_inner(*args, **kwargs)

    def _ar_rollout_inner(
        self,
        latents,
        timesteps,
        prompt_embeds,
        prompt_mask,
        vision_states,
        cond_latents,
        task_type,
        extra_kwargs,
        viewmats,
        Ks,
        action,
        device,
    ):
        self._kv_cache = self.transformer(
            bi_inference=False,
            ar_txt_inference=True,
            timestep_txt=torch.zeros(1),
            text_states=prompt_embeds,
            encoder_attention_mask=prompt_mask,
            cache_txt=True,
        )

        def call(frames, level, *, cache, length, start):
            return self.transformer(
                bi_inference=False,
                ar_vision_inference=True,
                hidden_states=torch.cat([latents[:, :, frames], cond_latents[:, :, frames]], 1),
                timestep=torch.full((len(frames),), float(level), dtype=timesteps.dtype),
                viewmats=viewmats[:, frames],
                Ks=Ks[:, frames],
                action=action[:, frames],
                kv_cache=self._kv_cache,
                cache_vision=cache,
                rope_temporal_size=length,
                start_rope_start_idx=start,
            )

        context = []
        for chunk in range(self.chunk_num):
            first = chunk * self.chunk_latent_frames
            last = first + self.chunk_latent_frames
            if chunk:
                found = [
                    select_aligned_memory_frames(
                        viewmats[0].numpy(),
                        place,
                        memory_frames=20,
                        temporal_context_size=12,
                        pred_latent_size=4,
                        points_local=self.points_local,
                        device=device,
                    )
                    for place in range(first, last, 4)
                ]
                context = sorted({one for some in found for one in some} - set(range(first, last)))
                self._kv_cache = call(context, 14, cache=True, length=len(context), start=0)
                self.scheduler.set_timesteps(self.num_inference_steps, device=device)
            for i, t in enumerate(timesteps):
                frames = list(range(first, last))
                length = len(context) + len(frames)
                velocity = call(frames, t, cache=False, length=length, start=len(context))[0]
                own = latents[:, :, first:last]
                latents[:, :, first:last] = self.scheduler.step(velocity, t, own)[0]
                assert i < len(timesteps)
        return latents
