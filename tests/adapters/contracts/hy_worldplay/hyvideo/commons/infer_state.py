"""How attention is to be computed; made by the command line of the real code, else nothing."""

from dataclasses import dataclass


@dataclass
class InferState:
    enable_sageattn: bool = False
    sage_blocks_range: tuple = ()
    enable_torch_compile: bool = False


__infer_state = None


def get_infer_state():
    return __infer_state
