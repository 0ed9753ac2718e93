"""Make interactive video world models fast without retraining, through `torch.compile`.

Public names load on first use (PEP 562), so that `import lipass` starts neither torch nor Triton,
and `lipass.kernels` can be imported alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lipass._version import VERSION as __version__

if TYPE_CHECKING:
    from lipass.adapters.adopt import adopt
    from lipass.calibration.calibrate import calibrate
    from lipass.calibration.frontier import Frontier
    from lipass.config import Config
    from lipass.eager.attend import attend
    from lipass.errors import LipassError, LipassWarning
    from lipass.policy.steering import Steering
    from lipass.receipt import report
    from lipass.runtime.snapshot import Snapshot
    from lipass.session import Session
    from lipass.stages.front import Stages
    from lipass.stages.stage import Stage
    from lipass.switch import disabled

__all__ = [
    "Config",
    "Frontier",
    "LipassError",
    "LipassWarning",
    "Session",
    "Snapshot",
    "Stage",
    "Stages",
    "Steering",
    "__version__",
    "adopt",
    "attend",
    "calibrate",
    "disabled",
    "report",
]

_HOME = {
    "Config": "lipass.config",
    "Frontier": "lipass.calibration.frontier",
    "LipassError": "lipass.errors",
    "LipassWarning": "lipass.errors",
    "Session": "lipass.session",
    "Snapshot": "lipass.runtime.snapshot",
    "Stage": "lipass.stages.stage",
    "Stages": "lipass.stages.front",
    "Steering": "lipass.policy.steering",
    "adopt": "lipass.adapters.adopt",
    "attend": "lipass.eager.attend",
    "calibrate": "lipass.calibration.calibrate",
    "disabled": "lipass.switch",
    "report": "lipass.receipt",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lipass' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
