"""A controller that plans in the latent space of a world model: TD-MPC (arXiv 2203.04955), small, on the pendulum.

Its five parts are an encoder, latent dynamics, a reward model, a value model (two heads, of which the lower counts) and
a policy. `Agent.plan` looks a few steps ahead with them (MPPI: action sequences are sampled, the best averaged)
and lets the value model judge what comes after. Training unrolls the model along replayed episodes (the paper's TOLD):
it is to predict latents, rewards and values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

TORQUE = 2.0  # the pendulum's actions are in [-2, 2]; the agent's in [-1, 1]
REWARD_SCALE = 0.1  # the pendulum's rewards are in [-16.3, 0]
DISCOUNT = 0.99
STEPS = 200  # of an episode


@dataclass
class Episodes:
    """Episodes of equal length: what was seen, done and earned, and how the value model judged it on the way.

    Attributes:
        observations: `(episodes, steps + 1, 3)`: cosine, sine, angular velocity.
        actions: `(episodes, steps, 1)`, in [-1, 1].
        rewards: `(episodes, steps)`, the environment's.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor

    def __add__(self, other: Episodes) -> Episodes:
        return Episodes(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


class Replay(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Random batches of short sequences from all episodes that an agent has played so far."""

    def __init__(self, agent: Agent, batches: int, batch_size: int = 128) -> None:
        self.agent, self.batches, self.batch_size = agent, batches, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        horizon = self.agent.horizon
        for _ in range(self.batches):
            played = self.agent.played
            episodes, steps = played.rewards.shape
            row = torch.randint(episodes, (self.batch_size, 1))
            start = torch.randint(steps - horizon + 1, (self.batch_size, 1))
            time = start + torch.arange(horizon)
            seen = torch.cat([time, time[:, -1:] + 1], dim=1)
            yield played.observations[row, seen], played.actions[row, time], played.rewards[row, time]


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ELU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(hidden, hidden), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class TwoValues(nn.Module):
    """Two estimates of the return from a latent and an action; the lower of them overestimates less."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = _mlp(inputs, hidden, 2, 1), _mlp(inputs, hidden, 2, 1)

    def forward(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Both estimates, `(..., 1)`, of latents and actions side by side."""
        return self.first(pair), self.second(pair)


class Agent(L.LightningModule):
    """The controller.

    Args:
        latent: Size of the latent.
        hidden: Width of all hidden layers.
        horizon: Steps that plans and unrolled training look ahead.
        samples: Action sequences that a plan tries in each of its iterations, one quarter of them the policy's.
        episodes: Episodes played after each training epoch.
    """

    def __init__(
        self, latent: int = 32, hidden: int = 128, horizon: int = 3, samples: int = 32, episodes: int = 2
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.horizon, self.samples, self.episodes = horizon, samples, episodes
        self.encoder = _mlp(3, hidden, 1, latent)
        self.dynamics = _mlp(latent + 1, hidden, 2, latent)
        self.reward = _mlp(latent + 1, hidden, 2, 1)
        self.value = TwoValues(latent + 1, hidden)
        self.policy = nn.Sequential(_mlp(latent, hidden, 2, 1), nn.Tanh())
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)
        none = torch.zeros(0, STEPS)
        self.played = Episodes(torch.zeros(0, STEPS + 1, 3), none[..., None], none)

    # -------------------------------------------------------------------------------------------------- planning

    def worth(self, latents: Tensor) -> Tensor:
        """The value of latents under the policy, `(...)`, in the scale of training."""
        return torch.minimum(*self.value(torch.cat([latents, self.policy(latents)], dim=-1))).squeeze(-1)

    def plan(self, latents: Tensor, guess: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The best action sequences that a few iterations of MPPI find, for a batch of states at once.

        Args:
            latents: `(batch, latent)`.
            guess: The mean of the first iteration's sequences, `(batch, horizon, 1)`.
            noise: Standard normal, `(iterations, horizon, batch, samples, 1)`.

        Returns:
            Mean and standard deviation of the best sequences, both `(batch, horizon, 1)`.
        """
        samples, few = noise.shape[3], max(1, noise.shape[3] // 4)
        starts = latents[:, None].expand(-1, samples, -1)
        mean, spread = guess, torch.ones_like(guess)
        for drawn in noise:
            state, total, actions = starts, torch.zeros(latents.shape[0], samples), []
            for t in range(self.horizon):
                action = (mean[:, None, t] + spread[:, None, t] * drawn[t]).clamp(-1, 1)
                own = (self.policy(state[:, :few]) + 0.1 * drawn[t, :, :few]).clamp(-1, 1)
                action = torch.cat([own, action[:, few:]], dim=1)
                pair = torch.cat([state, action], dim=-1)
                total = total + DISCOUNT**t * self.reward(pair).squeeze(-1)
                state = self.dynamics(pair)
                actions.append(action)
            total = total + DISCOUNT**self.horizon * self.worth(state)
            best, which = total.topk(few, dim=1)
            chosen = torch.stack(actions, dim=2).gather(1, which[..., None, None].expand(-1, -1, self.horizon, 1))
            weight = torch.softmax((best - best[:, :1]) / 0.2, dim=1)[..., None, None]
            mean = (weight * chosen).sum(1)
            spread = ((weight * (chosen - mean[:, None]) ** 2).sum(1)).sqrt().clamp(0.1, 1)
        return mean, spread

    @torch.no_grad()
    def play(self, seeds: list[int], explore: float = 0.0, steps: int | None = None) -> tuple[Episodes, Tensor]:
        """Plays one episode per seed, all side by side, in the real environment.

        Starts and the planner's samples depend on the seeds alone: whatever plays them meets the same luck.

        Args:
            seeds: Of the environments; the first one is the planner's too.
            explore: Standard deviation of what is added to actions.
            steps: Length of the episodes; `None`: `STEPS`.

        Returns:
            The episodes, and the value of every state by the agent's own estimate, `(episodes, steps + 1)`.
        """
        steps = STEPS if steps is None else steps
        environments = [gymnasium.make("Pendulum-v1") for _ in seeds]
        seen = [np.stack([e.reset(seed=s)[0] for e, s in zip(environments, seeds, strict=True)])]
        random = torch.Generator().manual_seed(seeds[0])
        guess = torch.zeros(len(seeds), self.horizon, 1)
        actions, rewards, values = [], [], []
        for _ in range(steps):
            latents = self.encoder(torch.from_numpy(seen[-1]))
            noise = torch.randn(2, self.horizon, len(seeds), self.samples, 1, generator=random)
            mean, _ = self.plan(latents, guess, noise)
            guess = torch.cat([mean[:, 1:], torch.zeros_like(mean[:, :1])], dim=1)
            action = (mean[:, 0] + explore * torch.randn(len(seeds), 1, generator=random)).clamp(-1, 1)
            outcomes = [e.step(TORQUE * a.numpy()) for e, a in zip(environments, action, strict=True)]
            seen.append(np.stack([outcome[0] for outcome in outcomes]))
            rewards.append(torch.tensor([float(outcome[1]) for outcome in outcomes]))
            actions.append(action)
            values.append(self.worth(latents))
        values.append(self.worth(self.encoder(torch.from_numpy(seen[-1]))))
        observations = torch.from_numpy(np.stack(seen, axis=1))
        played = Episodes(observations, torch.stack(actions, dim=1), torch.stack(rewards, dim=1))
        return played, torch.stack(values, dim=1)

    # -------------------------------------------------------------------------------------------------- training

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        """Next latents, rewards and values of one step, all that the five parts say."""
        latents = self.encoder(observations)
        pair = torch.cat([latents, actions], dim=-1)
        return self.dynamics(pair), self.reward(pair), *self.value(pair), self.policy(latents)

    def on_train_epoch_end(self) -> None:
        """Plays a few episodes, by plan with some noise.

        Not where an epoch starts: what tries training steps, as a round does, calls that hook to be fair to them. And
        not where nothing was trained.
        """
        if self.trainer.global_step == 0:
            return
        seeds = [10_000 + len(self.played.rewards) + i for i in range(self.episodes)]
        self.eval()
        self.played = self.played + self.play(seeds, explore=max(0.05, 0.5 - 0.03 * self.current_epoch))[0]
        self.train()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """The model is unrolled from the first observation and compared with what really came."""
        observations, actions, rewards = batch
        latent = self.encoder(observations[:, 0])
        loss, visited = torch.zeros(()), [latent.detach()]
        for t in range(actions.shape[1]):
            pair = torch.cat([latent, actions[:, t]], dim=-1)
            estimates, reward, latent = self.value(pair), self.reward(pair).squeeze(-1), self.dynamics(pair)
            visited.append(latent.detach())
            scaled = REWARD_SCALE * rewards[:, t]
            with torch.no_grad():
                seen = self.target_encoder(observations[:, t + 1])
                after = torch.cat([seen, self.policy(seen)], dim=-1)
                aim = scaled + DISCOUNT * torch.minimum(*self.target_value(after)).squeeze(-1)
            # a sum over the latent: a mean would be another loss with fewer of its channels, and they could not go
            step = ((latent - seen) ** 2).sum(-1).mean() / 16 + 0.5 * F.mse_loss(reward, scaled)
            step = step + 0.1 * sum(F.mse_loss(estimate.squeeze(-1), aim) for estimate in estimates)
            loss = loss + 0.5**t * step
        self.value.requires_grad_(False)  # the policy climbs the value and does not move it
        climb = -self.worth(torch.cat(visited)).mean()
        self.value.requires_grad_(True)
        return loss + 0.1 * climb

    def on_train_batch_end(self, *_: Any) -> None:
        """Targets follow slowly."""
        with torch.no_grad():
            for target, online in ((self.target_encoder, self.encoder), (self.target_value, self.value)):
                for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                    slow.lerp_(fast, 0.01)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Plays one episode per seed; logs the mean return and how steadily the value rises on the way.

        Short episodes are only for whoever traces the step, see `episodes_of`, and log nothing.
        """
        seeds, steps = batch
        played, values = self.play(seeds.tolist(), steps=int(steps))
        if int(steps) == STEPS:
            self.log("val_return", played.rewards.sum(1).mean(), batch_size=len(seeds), prog_bar=True)
            self.log("val_descent", descent(values / REWARD_SCALE), batch_size=len(seeds))
        return {"rewards": played.rewards, "values": values}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything but the targets."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The episodes go with the weights: calibration reads them."""
        checkpoint["played"] = vars(self.played)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And come back with them."""
        self.played = Episodes(**checkpoint["played"])

    def replay(self, batches: int) -> DataLoader[Any]:
        """Training batches from what was played; the first episodes are played by chance."""
        if len(self.played.rewards) == 0:
            self.played = _by_chance(5)
        return DataLoader(Replay(self, batches), batch_size=None)


def descent(values: Tensor, stride: int = 10, near: float = 5.0) -> Tensor:
    """How much like a Lyapunov function the negated value is on trajectories: 1 if it falls wherever it is not small.

    Args:
        values: Value of every state on the way, `(episodes, steps)`, in units of the return.
        stride: Steps over which it is to fall.
        near: Where it is less than this the goal counts as reached.
    """
    now, later = -values[:, :-stride], -values[:, stride:]
    return ((later < now) | (later < near)).float().mean()


def episodes_of(seeds: list[int]) -> DataLoader[Any]:
    """Two batches of seeds and steps: two steps, which show all that the step computes, and the whole episodes.

    A round traces, probes and counts on the first validation batch; a whole episode there would repeat itself.
    """
    batches = [(torch.tensor(seeds[:2]), torch.tensor(2)), (torch.tensor(seeds), torch.tensor(STEPS))]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _by_chance(count: int) -> Episodes:
    """Episodes of random actions that last a while, so that the pendulum gets somewhere."""
    environments = [gymnasium.make("Pendulum-v1") for _ in range(count)]
    seen = [np.stack([e.reset(seed=20_000 + i)[0] for i, e in enumerate(environments)])]
    actions = torch.rand(count, math.ceil(STEPS / 5), 1).repeat_interleave(5, dim=1)[:, :STEPS] * 2 - 1
    rewards = []
    for t in range(STEPS):
        outcomes = [e.step(TORQUE * a.numpy()) for e, a in zip(environments, actions[:, t], strict=True)]
        seen.append(np.stack([outcome[0] for outcome in outcomes]))
        rewards.append(torch.tensor([float(outcome[1]) for outcome in outcomes]))
    return Episodes(torch.from_numpy(np.stack(seen, axis=1)), actions, torch.stack(rewards, dim=1))
