"""Graph networks: AttentiveFP, whose GRU cells update atoms and molecules, and two others with recurrent parts."""

from __future__ import annotations

import torch
from torch_geometric.nn import AttentiveFP, GatedGraphConv
from torch_geometric.nn.aggr import LSTMAggregation

from tests.thirdparty.case import Step, case, training

NODES, EDGES = 40, 120


def _edges() -> torch.Tensor:
    return torch.randint(0, NODES, (2, EDGES))


@case("AttentiveFP", "gru_cell")
def attentive_fp(dtype: torch.dtype) -> Step:
    model = AttentiveFP(16, 48, 3, edge_dim=5, num_layers=3, num_timesteps=2)
    edges, molecule = _edges(), torch.arange(NODES) // 8
    return training(model, lambda x, e: model(x, edges, e, molecule), torch.randn(NODES, 16), torch.randn(EDGES, 5),
                    dtype=dtype)  # fmt: skip


@case("GatedGraphConv", "gru_cell")
def gated(dtype: torch.dtype) -> Step:
    model, edges = GatedGraphConv(32, num_layers=3), _edges()
    return training(model, lambda x: model(x, edges), torch.randn(NODES, 24), dtype=dtype)


@case("LSTMAggregation", "lstm.input")
def aggregation(dtype: torch.dtype) -> Step:
    model, of = LSTMAggregation(16, 32), torch.arange(NODES) // 8
    return training(model, lambda x: model(x, of), torch.randn(NODES, 16), dtype=dtype)
