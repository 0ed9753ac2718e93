"""Actions that each place follows through time; sizes of the grid come as 0-d tensors."""

import torch
import torch.nn.functional as F
from torch import nn

from .posemb_layers import tables, turned


class ActionModule(nn.Module):
    def __init__(self, mouse_dim_in, keyboard_dim_in, img_hidden_size, heads_num, **others):
        super().__init__()
        self.heads = heads_num
        width = img_hidden_size
        self.mouse = nn.Linear(width + 4 * mouse_dim_in, width)
        self.t_qkv = nn.Linear(width, 3 * width)
        self.proj_mouse = nn.Linear(width, width)
        self.keyboard_attn_kv = nn.Linear(4 * keyboard_dim_in, 2 * width)
        self.mouse_attn_q = nn.Linear(width, width)
        self.proj_keyboard = nn.Linear(width, width)

    def forward(
        self,
        x,
        tt,
        th,
        tw,
        mouse_condition=None,
        keyboard_condition=None,
        mouse_cond_memory=None,
        keyboard_cond_memory=None,
    ):
        places, memory = th * tw, 0
        assert tt * places == x.shape[1]
        mouse, keys = windows(mouse_condition), windows(keyboard_condition)
        if mouse_cond_memory is not None:
            memory = mouse_cond_memory.shape[1]
            mouse = torch.cat([mouse_cond_memory.repeat(1, 1, 4), mouse], 1)
            keys = torch.cat([keyboard_cond_memory.repeat(1, 1, 4), keys], 1)
        rows = x.reshape(tt, places, x.shape[2]).transpose(0, 1)
        own = torch.cat([rows, mouse.expand(places, -1, -1)], -1)
        q, k, v = self.t_qkv(F.gelu(self.mouse(own))).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = self.along_time(q, k, v, memory, tt)
        x = x + self.proj_mouse(out).transpose(0, 1).reshape(1, tt * places, x.shape[2])
        k, v = self.keyboard_attn_kv(keys).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.mouse_attn_q(x).reshape(tt, places, x.shape[2]).transpose(0, 1)
        q, k, v = q.unflatten(-1, (self.heads, -1)), k.repeat(places, 1, 1, 1), v
        out = self.along_time(q, k, v.repeat(places, 1, 1, 1), memory, tt)
        return x + self.proj_keyboard(out).transpose(0, 1).reshape(1, tt * places, x.shape[2])

    def along_time(self, q, k, v, memory, frames):
        """Attend over the frames at one place; memory has positions of its own."""
        if memory:
            q, k = q.clone(), k.clone()
            for part in (slice(None, memory), slice(memory, None)):
                length = memory if part.start is None else frames - memory
                table = tables(length, q.shape[-1])
                q[:, part], k[:, part] = turned(q[:, part], *table), turned(k[:, part], *table)
        else:
            table = tables(frames, q.shape[-1])
            q, k = turned(q, *table), turned(k, *table)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def windows(actions):
    """Return the actions of the four video frames of each latent, `[B, T, 4 * C]`."""
    if actions.shape[1] % 4:
        actions = torch.cat([actions[:, :1].repeat(1, 3, 1), actions], 1)
    return actions.unflatten(1, (-1, 4)).flatten(2)
