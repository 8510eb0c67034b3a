"""Training of layers with the batch divided among processes, by DDP and by FSDP2, for the tests of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dlkernels

STEPS = 3
LAYERS = ("LSTM", "TransformerEncoderLayer")


class Model(nn.Module):
    """A layer between two linear ones, which have gradients that depend on those of the layer's input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before = nn.Linear(6, 16)
        if name == "LSTM":
            self.layer: nn.Module = dlkernels.nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
            self.after = nn.Linear(32, 1)
        else:
            self.layer = dlkernels.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.after = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x))
        return self.after(y[0] if isinstance(y, tuple) else y)  # type: ignore[no-any-return]


def model_and_data(name: str) -> tuple[Model, Tensor, Tensor]:
    """The same on every process: a model, x and the targets."""
    torch.manual_seed(0)
    model = Model(name)
    return model, torch.randn(8, 5, 6), torch.randn(8, 5, 1)


def train(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, targets: Tensor) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(name: str) -> tuple[dict[str, Tensor], list[float]]:
    """The parameters and the losses of one process that has the whole batch."""
    model, x, targets = model_and_data(name)
    losses = train(model, list(model.parameters()), x, targets)
    return {key: value.detach() for key, value in model.state_dict().items()}, losses


def among_processes(name: str, kind: str) -> tuple[dict[str, Tensor], list[float]]:
    """On a rank: the same where each rank has its part of the batch."""
    model, x, targets = model_and_data(name)
    trained: nn.Module = model
    if kind == "DDP":
        trained = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for part in (model.layer, model):
            fully_shard(part)
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = torch.tensor(train(trained, list(trained.parameters()), x.chunk(world)[rank], targets.chunk(world)[rank]))
    dist.all_reduce(losses)
    whole = {}
    for key, value in model.state_dict().items():
        # FSDP2 makes each parameter a DTensor of which a rank has a part.
        whole[key] = value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach()
    return whole, (losses / world).tolist()
