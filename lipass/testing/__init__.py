"""Test passes and models: print graphs, compare them, assert a rewrite or a refusal.

```python
from lipass.testing import assert_refuses, assert_rewrites

def test_dropout_goes():
    assert_rewrites(fn, (x,), DropDropout(), removes="dropout")

def test_dropout_in_training_stays():
    assert_refuses(train, (x,), DropDropout(), "it draws random numbers")
```

A pipeline is text (`"canonicalize,find-attention"`), a `PassPipeline`, or one pass, in front of
which the passes that it requires are run. `assert_no_device_reads` watches a loop for what would
make a GPU wait. `lipass.testing.fixtures` is a pytest plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipass.passes.printer import print_graph
    from lipass.testing.assertions import assert_refuses, assert_rewrites, graph_diff
    from lipass.testing.reads import DeviceRead, assert_no_device_reads, device_reads
    from lipass.testing.tracing import Traced, run_passes, trace

__all__ = [
    "DeviceRead",
    "Traced",
    "assert_no_device_reads",
    "assert_refuses",
    "assert_rewrites",
    "device_reads",
    "graph_diff",
    "print_graph",
    "run_passes",
    "trace",
]

_HOME = {
    "DeviceRead": "lipass.testing.reads",
    "Traced": "lipass.testing.tracing",
    "assert_no_device_reads": "lipass.testing.reads",
    "assert_refuses": "lipass.testing.assertions",
    "assert_rewrites": "lipass.testing.assertions",
    "device_reads": "lipass.testing.reads",
    "graph_diff": "lipass.testing.assertions",
    "print_graph": "lipass.passes.printer",
    "run_passes": "lipass.testing.tracing",
    "trace": "lipass.testing.tracing",
}


def __getattr__(name: str) -> object:
    # TORCH_LOGS=lipass imports every package of ours in the middle of torch's own import.
    if name not in _HOME:
        raise AttributeError(f"module 'lipass.testing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
