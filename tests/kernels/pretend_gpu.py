"""Tensors that say they are on a GPU and compute on the host, to try what decides by device.

Mixing them with tensors of the host raises, as it does on a GPU; the largest tensor that a call
made and what it read back are noted.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_READS = (
    "item", "tolist", "nonzero", "equal", "numpy", "cpu", "masked_select", "unique",
    "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
# These take tensors of the host beside those of a GPU.
_MOVES = ("to", "copy_")
_OWN = ("device", "is_cuda", "is_cpu")


class OnGpu(torch.Tensor):
    """A tensor of the host, `held`, that says it is on a GPU."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, SimpleNamespace(largest=0, reads=[]))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called past the functions of torch")


def _run(func, args, kwargs, seen):
    if func is torch.device:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name == "__get__" and getattr(func.__self__, "__name__", "") in _OWN:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args)
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    placed = [isinstance(x, OnGpu) for x in leaves]
    devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    on_gpu = devices[0].type == "cuda" if devices else any(placed)
    on_host = [x for x, on in zip(leaves, placed, strict=True) if not on and x.dim()]
    if any(placed) and on_host and name not in _MOVES:
        raise RuntimeError(f"{name} was given tensors on the host beside some on a GPU")
    by_bool = name == "__getitem__" and any(
        isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])
    )
    if any(placed) and (name in _READS or by_bool):
        seen.reads.append(name)
    held = tree_map(_held, (args, kwargs))
    with torch._C.DisableTorchFunction():
        out = func(*held[0], **held[1])
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(held) if _is(x)}
        for x in filter(_is, tree_leaves(out)):
            if x.untyped_storage().data_ptr() not in known:
                seen.largest = max(seen.largest, x.untyped_storage().nbytes())
        return tree_map(lambda x: OnGpu(x) if on_gpu and _is(x) else x, out)


def _is(x):
    return isinstance(x, torch.Tensor)


def _held(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, OnGpu) else x


class _Watch(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.seen)


@contextlib.contextmanager
def watched():
    """Note what is made and read back inside; tensors that are made for the GPU say so."""
    seen = SimpleNamespace(largest=0, reads=[])
    with _Watch(seen):
        yield seen


def on_gpu(x):
    """Put tensors there: one, several, or those of a case."""
    if isinstance(x, torch.Tensor):
        return OnGpu(x)
    if isinstance(x, list):
        return [on_gpu(one) for one in x]
    x.q, x.keys, x.values = on_gpu(x.q), on_gpu(x.keys), on_gpu(x.values)
    return x


def kernels(monkeypatch, *names):
    """Let the named block-sparse kernels run there, by their definition; no other kernel does."""
    from lipass.kernels import chip, fastest, registry
    from lipass.kernels.block_sparse import reference

    real = registry.module_of
    calls = []

    def attend(name):
        def run(q, keys, values, plan, *, scale, key_bias, return_lse=False, laid=None):
            calls.append(name)
            held = [x.held for x in (plan.indices, plan.counts)]
            keep = None if plan.key_keep is None else plan.key_keep.held
            plan = type(plan)(*held, plan.q_grid, plan.kv, keep)
            out, lse = reference.block_sparse_attention(
                q.held, [k.held for k in keys], [v.held for v in values], plan, scale=scale,
                key_bias=None if key_bias is None else key_bias.held,
            )  # fmt: skip
            return OnGpu(out), OnGpu(lse) if return_lse else None

        return run

    def module_of(operation, name):
        if name not in ("triton", "tma"):
            return real(operation, name)
        if operation != "block_sparse" or name not in names:
            return "not available: pretended"
        module = real(operation, name)
        made = SimpleNamespace(
            why_not=module.why_not.__wrapped__, block_sparse_attention=attend(name)
        )
        if name == "tma":
            made.lay = module.lay
        return made

    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(chip, "name", lambda device: "a GPU that nobody has measured")
    monkeypatch.setattr(fastest, "_orders", {})
    monkeypatch.setattr(registry, "module_of", module_of)
    return calls
