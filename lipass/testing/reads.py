"""Find what would make a GPU wait: values of tensors that Python, or the shape of a result, needs.

Without a GPU every tensor counts as being on the device, so that the check runs anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A value goes to the host, or the size of the result depends on values.
_READS = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique", "_unique2", "allclose", "bincount",
    "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    "unique_dim_consecutive",
}  # fmt: skip
_COPIES = {"_to_copy", "copy_"}
# Never reach the dispatcher where the tensor is on the host anyway.
_METHODS = ("__array__", "__repr__", "cpu", "numpy", "to", "tolist")
_MASKS = (torch.bool, torch.uint8)
_FOLDER = Path(torch.__file__).parent
_TORCH = (str(_FOLDER), __file__, contextlib.__file__, functools.__file__)


@dataclass(frozen=True)
class DeviceRead:
    """One read.

    Attributes:
        operator: what was called, such as `aten.nonzero` or `Tensor.tolist`.
        where: `file:line` of the innermost caller outside of torch.
    """

    operator: str
    where: str

    def __str__(self) -> str:
        return f"{self.operator} at {self.where}"


@contextlib.contextmanager
def device_reads(*, host: bool | None = None) -> Iterator[list[DeviceRead]]:
    """Collect the reads of the block, in compiled graphs too.

    Operators of lipass are not looked into: on the host they read what lies there anyway, and on a
    GPU `torch.cuda.set_sync_debug_mode("error")` sees them. Under `inner="inductor"` what has
    become code of its own is not seen; it cannot read.

    Args:
        host: whether tensors on the CPU count; None for where there is no other device.
    """
    watch = _Watch(not torch.accelerator.is_available() if host is None else host)
    with watch, watch.methods():
        yield watch.found


@contextlib.contextmanager
def assert_no_device_reads(
    *, allow: Sequence[str] = (), host: bool | None = None
) -> Iterator[None]:
    """Assert that nothing in the block reads values back from the device.

    Args:
        allow: parts of paths of files that may read, such as `lipass/policy/`, which decides from
            poses once a chunk.
        host: whether tensors on the CPU count; None for where there is no other device.

    Raises:
        AssertionError: naming every place that reads, and how often.
    """
    with device_reads(host=host) as found:
        yield
    reads = [str(one) for one in found if not any(part in one.where for part in allow)]
    if reads:
        places = "".join(f"\n  {reads.count(one)}x {one}" for one in dict.fromkeys(reads))
        raise AssertionError(
            f"a device must not be read from here, got {len(reads)} reads:{places}\n"
            "keep the value in a tensor, or read it once outside of the loop"
        )


class _Watch(TorchDispatchMode):
    """See what reaches the dispatcher, and the methods that do not where nothing has to move."""

    supports_higher_order_operators = True

    def __init__(self, host: bool) -> None:
        super().__init__()
        self.found: list[DeviceRead] = []
        self._host = host
        self._inside = False
        """Inside of a call that has been counted, or that is not looked into."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have functions compiled as they are without the mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and not self._inside:
            if func.namespace == "lipass":
                return self._alone(func, args, kwargs)
            if _reads(func, args, kwargs, self._host) and not _is_number(func, args):
                self.found.append(DeviceRead(str(func.overloadpacket), _caller()))
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def methods(self) -> Iterator[None]:
        """See methods that copy to the host, which for a tensor on the host do nothing."""
        own = {name: vars(torch.Tensor).get(name) for name in _METHODS}
        for name in _METHODS:
            setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
        try:
            yield
        finally:
            for name, method in own.items():
                if method is None:
                    delattr(torch.Tensor, name)
                else:
                    setattr(torch.Tensor, name, method)

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable
        @functools.wraps(method)
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Of a tensor on a device the dispatcher sees the copy.
            if self._inside or not (self._host and _on_host(tensor)):
                return method(tensor, *args, **kwargs)
            if torch.compiler.is_compiling() or (name == "to" and not _moves(args, kwargs)):
                return method(tensor, *args, **kwargs)
            self.found.append(DeviceRead(f"Tensor.{name}", _caller()))
            return self._alone(method, (tensor, *args), kwargs)

        return call

    def _alone(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self._inside = False


def _reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], host: bool) -> bool:
    if func.namespace != "aten":
        return False
    name = func._schema.name.partition("::")[2]
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name in _COPIES:
        source = args[1] if name == "copy_" else args[0]
        to = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        return _away(source) and torch.device(to).type == "cpu"
    if not any(_away(tensor) or (host and _on_host(tensor)) for tensor in tensors):
        return False
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and func._overloadname == "Tensor"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # torch fills a masked place with one value without looking for it.
        filled = name != "index" and args[2].numel() == 1
        return not filled and any(x is not None and x.dtype in _MASKS for x in args[1])
    return name in _READS


def _away(tensor: torch.Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta") and not isinstance(tensor, FakeTensor)


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def _is_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a graph of Dynamo reads a number of Python, which it passes as a tensor."""
    if func is not torch.ops.aten._local_scalar_dense.default:
        return False
    scalar = args[0].dim() == 0 and args[0].dtype is torch.float64
    return scalar and _on_host(args[0]) and _frame(_TORCH).f_code.co_filename.startswith("<eval")


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `to` names the CPU and is not torch's own way to make a tensor of numbers."""
    given = [*args[:1], kwargs.get("device")]
    by = _frame((__file__, str(_FOLDER / "_dynamo"), str(_FOLDER / "_compile.py")))
    if by.f_code.co_filename.startswith(str(_FOLDER / "_refs")):
        return False
    return any(isinstance(x, (str, torch.device)) and torch.device(x).type == "cpu" for x in given)


def _caller() -> str:
    frame = _frame((*_TORCH, "<"))
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _frame(outside: tuple[str, ...]) -> FrameType:
    """Return the innermost frame outside of files, and of this one."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(outside):
        frame = frame.f_back
    return frame
