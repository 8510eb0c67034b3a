"""A policy with a memory: reinforcement learning in a maze whose way out is shown only at the entrance.

    python examples/policy.py [--quick] [--out FOLDER]

A corridor ends in a junction. A sign at its entrance says whether to turn left or right there, and it is out of sight
from the second step on, so only a policy that remembers it does better than a guess. Many corridors are walked side by
side, and a new one begins wherever one has ended. A rollout therefore holds pieces of many episodes, and the memory has
to be empty where an episode begins. Programs for reinforcement learning walk through the rollout step by step for this,
in every update. With `resets=` it is one call of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dlkernels
from common import compare_steps, pyplot, read_arguments, save

WALKERS, STEPS, WIDTH = 64, 32, 64  # corridors side by side, steps of a rollout, units of the policy
LEFT, RIGHT, AHEAD = range(3)
SHORTEST, LONGEST = 3, 10
DISCOUNT, TRACE = 0.99, 0.95  # gamma and lambda of the advantages
CLIP, EPOCHS, ENTROPY = 0.2, 3, 0.01


class Corridors:
    """Corridors in which one step is one action. Turning at the junction ends the episode and pays 1 for the side of
    the sign. Elsewhere a turn leads nowhere, and every step costs a little."""

    def __init__(self, walkers: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.place = torch.zeros(walkers, dtype=torch.int64)
        self.steps, self.length, self.side = (torch.zeros_like(self.place) for _ in range(3))
        self.is_new = torch.ones(walkers, dtype=torch.bool)
        self.renew(self.is_new)

    def renew(self, which: Tensor) -> None:
        """Begins an episode for these walkers."""
        length = torch.randint(SHORTEST, LONGEST + 1, which.shape, generator=self.generator)
        side = torch.randint(2, which.shape, generator=self.generator)
        self.length, self.side = torch.where(which, length, self.length), torch.where(which, side, self.side)
        self.place, self.steps = self.place.masked_fill(which, 0), self.steps.masked_fill(which, 0)

    def see(self) -> Tensor:
        """What each walker sees: the sign (-1 or 1, 0 out of sight), and whether it is at the junction."""
        sign = torch.where(self.steps == 0, 2 * self.side - 1, 0)
        return torch.stack([sign, self.place == self.length], 1).float()

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards, and 1 or 0 for an episode that ended right or wrong, -1 for one that goes on."""
        at_junction = self.place == self.length
        turned = at_junction & (actions != AHEAD)
        right = turned & (actions == self.side)
        self.place += (~at_junction & (actions == AHEAD)).long()
        self.steps += 1
        self.is_new = turned | (self.steps >= 3 * LONGEST)
        outcome = torch.where(self.is_new, right.long(), -1)
        self.renew(self.is_new)
        return right.float() - 0.02, outcome


class Policy(nn.Module):
    def __init__(self, has_memory: bool) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh())
        self.memory = dlkernels.nn.LSTM(WIDTH, WIDTH) if has_memory else None
        self.actor, self.critic = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)

    def forward(
        self, seen: Tensor, state: tuple[Tensor, Tensor] | None, begins: Tensor
    ) -> tuple[torch.distributions.Categorical, Tensor, tuple[Tensor, Tensor] | None]:
        """seen [steps, walkers, 2] and begins [steps, walkers], whether an episode begins at a step -> the distribution
        of the actions, the values of the places, and the state after the last step."""
        y = self.encode(seen)
        if self.memory is not None:
            y, state = self.memory(y, state, resets=begins)
        return torch.distributions.Categorical(logits=self.actor(y)), self.critic(y).squeeze(2), state


class Rollout(NamedTuple):
    """What happened in [steps, walkers], and the state of the memory before the first step."""

    seen: Tensor
    begins: Tensor
    actions: Tensor
    log_p: Tensor
    values: Tensor
    rewards: Tensor
    outcomes: Tensor
    next_values: Tensor  # of the last step
    next_begins: Tensor
    state: tuple[Tensor, Tensor] | None


@torch.no_grad()
def walk(policy: Policy, world: Corridors, state: tuple[Tensor, Tensor] | None) -> tuple[Rollout, object]:
    """One rollout, and the state of the memory after it."""
    first, parts = state, []
    for _ in range(STEPS):
        seen, begins = world.see()[None], world.is_new[None]
        choice, value, state = policy(seen, state, begins)
        action = choice.sample()
        rewards, outcomes = world.act(action[0])
        parts.append((seen, begins, action, choice.log_prob(action), value, rewards[None], outcomes[None]))
    _, next_values, _ = policy(world.see()[None], state, world.is_new[None])
    return Rollout(*map(torch.cat, zip(*parts, strict=True)), next_values[0], world.is_new, first), state


def advantages(rollout: Rollout) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016): how much better than expected each action was."""
    found, later = torch.zeros_like(rollout.values), torch.zeros_like(rollout.next_values)
    value, begins = rollout.next_values, rollout.next_begins
    for t in reversed(range(STEPS)):
        goes_on = ~begins  # whether step t + 1 belongs to the same episode
        error = rollout.rewards[t] + DISCOUNT * value * goes_on - rollout.values[t]
        later = error + DISCOUNT * TRACE * later * goes_on
        found[t], value, begins = later, rollout.values[t], rollout.begins[t]
    return found


def loss_of(policy: Policy, rollout: Rollout, advantage: Tensor) -> Tensor:
    """Proximal policy optimization (Schulman et al. 2017). The whole rollout is one call of the memory."""
    choice, values, _ = policy(rollout.seen, rollout.state, rollout.begins)
    ratio = (choice.log_prob(rollout.actions) - rollout.log_p).exp()
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    gain = torch.minimum(ratio * scaled, ratio.clamp(1 - CLIP, 1 + CLIP) * scaled)
    miss = (values - rollout.values - advantage).square()
    return 0.5 * miss.mean() - gain.mean() - ENTROPY * choice.entropy().mean()


def learn(policy: Policy, updates: int) -> list[float]:
    """Trains, and returns the share of the episodes that ended on the right side, for every rollout."""
    world, state = Corridors(WALKERS, 1), None
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    shares = []
    for _ in range(updates):
        rollout, state = walk(policy, world, state)
        advantage = advantages(rollout)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            loss_of(policy, rollout, advantage).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        ended = rollout.outcomes[rollout.outcomes >= 0]
        shares.append(ended.float().mean().item())
    return shares


def share_of_successes(policy: Policy) -> float:
    """The share of right turns in corridors that the training did not see."""
    world, state, ended = Corridors(WALKERS, 2), None, []
    for _ in range(8):
        rollout, state = walk(policy, world, state)
        ended.append(rollout.outcomes[rollout.outcomes >= 0])
    return torch.cat(ended).float().mean().item()


def compare_updates(walkers: int, steps: int, units: int, times: int) -> None:
    """Compares the memory's part of an update: torch.nn's layer step by step, and ours in one call."""
    theirs, ours = torch.nn.LSTM(WIDTH, units), dlkernels.nn.LSTM(WIDTH, units)
    ours.load_state_dict(theirs.state_dict())
    x, begins = torch.randn(steps, walkers, WIDTH), torch.rand(steps, walkers) < 0.05

    def by_steps() -> None:
        state, outputs = (torch.zeros(1, walkers, units), torch.zeros(1, walkers, units)), []
        for seen, begin in zip(x, begins, strict=True):
            h, c = (part * ~begin[:, None] for part in state)
            y, state = theirs(seen[None], (h, c))
            outputs.append(y)
        torch.cat(outputs).square().mean().backward()

    def in_one_call() -> None:
        ours(x, resets=begins)[0].square().mean().backward()

    compare_steps(f"LSTM, {walkers} walkers, {steps} steps, {units} units", by_steps, in_one_call, times)


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the shares of right turns in new corridors, with and without a memory."""
    options = read_arguments(__doc__, given)
    updates = 45 if options.quick else 150
    for size in ((64, 32, 64),) if options.quick else ((64, 32, 64), (128, 128, 256)):
        compare_updates(*size, times=2 if options.quick else 6)
    results = {}
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for name, has_memory in (("with a memory", True), ("without", False)):
        policy = Policy(has_memory)
        axes.plot(learn(policy, updates), label=name)
        results[name] = share_of_successes(policy)
        print(f"right turns in new corridors, {name:14} {results[name]:.3f}")
    axes.axhline(0.5, color="grey", linestyle=":", label="a guess at the junction")
    axes.set(xlabel="update", ylabel="share of episodes that ended right", ylim=(0, 1.02))
    axes.legend()
    save(figure, options, "policy.png")
    return results


if __name__ == "__main__":
    main()
