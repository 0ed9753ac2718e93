"""Find where a model makes tensors of sizes and reads them back, and keep them ints there."""

from __future__ import annotations

import dis
import math
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch
from torch import nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.attention_calls import modules_of
from lipass.adapters.host_torch import with_host_ints, with_products

_NAMES = frozenset({"grid_sizes", "grid_size", "seq_lens"})
_READS = frozenset({"tolist", "item"})
_SIZES = "sizes stay ints, where tensors of them are read back"
_PRODUCTS = "products of sizes are asked like tensors"


def keep_sizes(model: nn.Module, adoption: Adoption) -> None:
    """Bind `torch` and `math` anew where parts of the model read the sizes of a grid back."""
    own = {type(part).__module__ for part in model.modules()}
    for module in modules_of(model):
        if module.__name__ not in own:
            continue
        read = min(_reads(module), default=None)
        if read is None:
            continue
        where = f"{module.__name__.rpartition('.')[2]}.py:{read}"
        for name, found in list(vars(module).items()):
            if adoption.hold(module, name, _SIZES) or adoption.hold(module, name, _PRODUCTS):
                continue
            if found is torch:
                adoption.rebind(module, name, with_host_ints(torch), _SIZES, where)
            elif found is math:
                adoption.rebind(module, name, with_products(math), _PRODUCTS, where)


def _reads(module: ModuleType) -> Iterator[int]:
    """Yield the lines where code of a module reads a tensor of sizes."""
    for code in _codes(module):
        if _NAMES & {*code.co_varnames, *code.co_freevars}:
            yield from _lines(code)


def _lines(code: CodeType) -> Iterator[int]:
    line = code.co_firstlineno
    for one in dis.get_instructions(code):
        line = one.positions.lineno if one.positions and one.positions.lineno else line
        if one.argval in _READS and one.opname.startswith("LOAD_"):
            yield line


def _codes(module: ModuleType) -> Iterator[CodeType]:
    todo: list[object] = list(vars(module).values())
    while todo:
        found = todo.pop()
        if isinstance(found, FunctionType) and found.__module__ == module.__name__:
            yield found.__code__
        elif isinstance(found, type) and found.__module__ == module.__name__:
            todo += [one for one in vars(found).values() if not isinstance(one, type)]
