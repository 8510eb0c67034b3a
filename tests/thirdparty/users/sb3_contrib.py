"""Reinforcement learning: RecurrentPPO learns on CartPole and then acts."""

from __future__ import annotations

import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from torch import Tensor

from tests.thirdparty.case import Step, case


@case("RecurrentPPO, 128 steps of learn(), then predict()", "lstm.input", near=1e-5)
def ppo(dtype: torch.dtype) -> Step:
    """Compares the trained parameters, the observations and actions of the last rollout, and actions of predict()."""
    assert dtype == torch.float32

    def step() -> dict[str, Tensor]:
        learner = RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu",
            policy_kwargs={"lstm_hidden_size": 32, "net_arch": [16]},
        )  # fmt: skip
        initial = [p.detach().clone() for p in learner.policy.parameters()]
        learner.learn(128)
        trained = dict(learner.policy.named_parameters())
        moved = [not torch.equal(p, q) for p, q in zip(trained.values(), initial, strict=True)]
        assert all(moved), "learn() has left a parameter as it was"
        found = {name: p.detach().clone() for name, p in trained.items()}
        found |= {name: torch.as_tensor(getattr(learner.rollout_buffer, name)) for name in ("observations", "actions")}
        state, starts, actions = None, np.ones((1,), dtype=bool), []
        observations = np.linspace(-0.2, 0.2, 40, dtype=np.float32).reshape(10, 1, 4)
        for seen in observations:
            action, state = learner.predict(seen, state=state, episode_start=starts, deterministic=True)
            starts = np.zeros((1,), dtype=bool)
            actions.append(torch.as_tensor(action))
        return found | {
            "predicted": torch.stack(actions),
            **{f"state {i}": torch.as_tensor(s) for i, s in enumerate(state)},
        }

    return step
