"""Messages within a group; what several processes do with them is tested through the executors."""

import torch
from torch.distributed import HashStore

from rlhf.distributed import collectives
from rlhf.distributed.collectives import Group, Place

ALONE = Place(generation=0, rank=0, workers=1, servers=0)


class StrictNCCL:
    """As NCCL's group, which makes no work of nothing."""

    begun = 0

    def _start_coalescing(self):
        self.begun += 1

    def _end_coalescing(self):
        return None

    def abort(self):
        pass


def test_a_group_of_one_has_nothing_to_wait_for(monkeypatch):
    backend = StrictNCCL()
    monkeypatch.setattr(collectives, "_nccl", lambda *settings: backend)
    for name in ("nccl", "gloo"):
        group = Group(HashStore(), ALONE, backend=name, timeout_s=5.0)
        group.exchange([], []).finish()
        own = torch.arange(3.0)
        assert group.all_gather(own, [3]) == [own]
        group.close()
    assert backend.begun == 0
