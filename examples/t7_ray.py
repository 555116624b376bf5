"""Tutorial 7: the same training on Ray workers, with the same bits."""

# %% [markdown]
# # 7. Scaling out on Ray
#
# Every training program takes `--dist.num-workers`. Ray is started on this machine if no
# cluster is named, and stopped at the end:
#
# ```sh
# rlhf-train pipeline --output-dir outputs/two-workers --dist.num-workers 2
# rlhf-train ppo --output-dir outputs/cluster --dist-config distributed --dist.address auto
# ```
#
# The same layer can be used alone. `ParameterServer` trains any tree of parameters on any
# loss. This page fits a small network in one process and on two workers, and compares the
# bits.

# %%
import torch
from rlhf import ParameterServer, adamw, constant_schedule, random
from rlhf.config import DistConfig


def loss(params, batch):  # the sum over a micro-batch, and sums of metrics
    inputs, targets = batch
    errors = torch.tanh(inputs @ params["hidden"]) @ params["out"] - targets
    return errors.square().sum(), {
        "loss/mse_sum": errors.detach().square().sum(),
        "count": errors.shape[0],
    }


params = {"hidden": random.normal(random.key(0), (4, 16)), "out": torch.zeros(16)}
inputs = random.normal(random.key(1), (256, 4))
targets = torch.sin(inputs.sum(dim=1))

# %% [markdown]
# A batch is a list of micro-batches. Their gradients are added along one fixed tree, whoever
# computed them. That is why the number of workers does not change the sum.

# %%
micro_batches = list(zip(inputs.split(32), targets.split(32), strict=True))
torch.set_num_threads(1)  # workers have one thread each; the bits depend on it


def train(workers: int) -> dict[str, torch.Tensor]:
    optimizer = adamw(constant_schedule(0.02))
    with ParameterServer(
        loss, params, optimizer, DistConfig(num_workers=workers), max_grad_norm=1.0
    ) as server:
        for step in range(40):
            metrics = server.step(micro_batches)
            if step % 10 == 9:
                print(f"{workers} workers, step {step + 1}: loss {metrics['loss/mse']:.6f}")
        return server.params()


alone = train(workers=0)
together = train(workers=2)
print("the same bits:", all(torch.equal(alone[name], together[name]) for name in alone))
assert all(torch.equal(alone[name], together[name]) for name in alone)

# %% [markdown]
# A worker that dies is replaced, and the lost steps are computed again, to the same bits. [How
# it works](../how_it_works.md) explains why; [Ray workers](../distributed.md) has the
# settings.
