"""Keep the records of a session's chunks, timed by what a device does.

The receipt forgets the oldest chunks, and on a GPU its seconds are those of launches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipass.receipt import ChunkRecord


@dataclass
class Measured:
    """The chunks of one session; waits for the device where each begins and ends.

    Attributes:
        records: of all chunks that were finished.
        latents: history that the latest chunk was shown, if it was.
    """

    records: list[ChunkRecord] = field(default_factory=list)
    latents: Tensor | None = None

    def wait(self) -> None:
        """Let the device do what was launched on it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
