"""The benchmark of stages tells overlap from none."""

import torch

from benchmarks import stages


def test_what_sleeps_at_once_takes_the_longer_time():
    line = [stages._stage(name, stages.Work, sleep_s=0.05) for name in ("a", "b")]
    found = stages.measure(line, [torch.zeros(4)] * 6, 1)
    assert found["gain"] > 1.25
    assert found["decode_share"] > 0.4
