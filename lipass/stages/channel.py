"""Move bytes between the processes of a line, over `torch.distributed`.

A group of its own, in no registry of torch: a model that splits itself over ranks has the default
group to itself. Processes find each other through a file in a private folder, and listen on the
loopback device only.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lipass.stages.packet import Packet, room_for

# Both ends of a transfer are told to begin at once, so only a stopped process takes long.
_TIMEOUT = timedelta(minutes=30)


class Channel:
    """One end of all transfers of a process.

    Args:
        folder: where processes find each other.
        rank: 0 is the caller, stages count from 1.
        size: processes.
        direct: devices of the stages in order, whose bytes go from device to device by NCCL;
            None moves them through host memory by gloo.
    """

    def __init__(
        self, folder: Path, rank: int, size: int, direct: tuple[str, ...] | None = None
    ) -> None:
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack what is used of it here
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        store = dist.FileStore(str(folder / "gloo"), size)
        self._gloo = gloo(store, rank, size, options)
        self._rank = rank
        self._direct = direct
        self._nccl: Any = None
        if direct is not None and rank > 0 and size > 2:
            torch.cuda.set_device(direct[rank - 1])
            stages = dist.FileStore(str(folder / "nccl"), size - 1)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = _TIMEOUT
            self._nccl = dist.ProcessGroupNCCL(stages, rank - 1, size - 1, nccl)

    def device_to(self, rank: int) -> str:
        """Where bytes must lie to be sent to a rank."""
        return self._direct[self._rank - 1] if self._nccl and rank and self._direct else "cpu"

    def send(self, packet: Packet, to: int) -> None:
        """Send the bytes of a packet.

        Raises:
            RuntimeError: the other process has ended.
        """
        if not packet.data.numel():
            return
        if self._nccl is not None and to:
            self._nccl.send([packet.data], to - 1, 0).wait()
            torch.cuda.current_stream().synchronize()
        else:
            self._gloo.send([packet.data], to, 0).wait()

    def receive(self, text: str, source: int) -> Packet:
        """Receive the bytes of a packet of which the text is known.

        Raises:
            RuntimeError: the other process has ended.
        """
        packet = Packet(text, room_for(text, self.device_to(source)))
        if not packet.data.numel():
            return packet
        if self._nccl is not None and source:
            self._nccl.recv([packet.data], source - 1, 0).wait()
            torch.cuda.current_stream().synchronize()
        else:
            self._gloo.recv([packet.data], source, 0).wait()
        return packet
