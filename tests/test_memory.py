"""Memory between stages: what one stage has freed is returned to the system before the next."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from rlhf.execution.memory import keep_freed_memory, peak_bytes, reset_peak

keep_freed_memory()
device = torch.device("cpu")
blocks = [torch.ones(2**20) for _ in range(64)]
kept = torch.ones(1)  # above them, so that the heap cannot simply shrink
with_blocks = peak_bytes(device)
del blocks
reset_peak(device)
print(with_blocks - peak_bytes(device))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc, and the peak of /proc")
def test_a_stage_does_not_occupy_what_the_stage_before_has_freed():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 60 * 2**22
