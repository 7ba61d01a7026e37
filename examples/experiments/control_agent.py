"""A controller that plans with a world model, pruned by what it earns in the real environment.

`pendulum_agent.py` is the controller: TD-MPC's five parts on gymnasium's Pendulum-v1. It is trained once (and cached);
then copies of it are pruned by 30 to 90 %, with no training afterwards, by several methods. The score of a plan is
the mean return of 6 episodes played in the environment (`val_return`), on seeds that the planner's samples depend on
too: every plan meets the same luck (common random numbers). The table shows 20 episodes on other seeds.

    python examples/experiments/control_agent.py            # about an hour on two cores; goes on where it was stopped
    python examples/experiments/control_agent.py --quick    # a few minutes: a barely trained agent, which says nothing
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pendulum_agent import REWARD_SCALE, TORQUE, Agent, descent, episodes_of
from shared.results import Results, Row, arguments, folders, markdown, trainer_settings

from lightning_softprune import GradientSearch, NormBaseline, PruningResult, UniformBaseline, prune

SEARCHED = list(range(1000, 1006))  # seeds of the episodes that plans are scored on
UNSEEN = list(range(2000, 2020))  # seeds of the episodes in the table
PARTS = ("encoder", "dynamics", "reward", "value", "policy")
TWINS = {"target_encoder": "encoder", "target_value": "value"}
SPARSITIES = (0.5, 0.7, 0.3, 0.9)  # the one that was asked for first
METHODS: dict[str, dict[str, Any]] = {
    "uniform, no compensation": {"search": UniformBaseline(), "compensation": "none"},
    "uniform": {"search": UniformBaseline()},
    "norm-based": {"search": NormBaseline()},
    "default": {},
    "gradient (spsa)": {"search": GradientSearch(difference="spsa"), "granularity": "component"},
}
CONSTRAINT = "val_descent >= 0.95"


def train(cache: Path, args: argparse.Namespace) -> Path:
    """The trained agent's checkpoint: the best by `val_return` on the searched seeds."""
    path = cache / f"dense-{args.seed}.ckpt"
    if not path.is_file():
        L.seed_everything(args.seed, verbose=False)
        agent = Agent(latent=8, hidden=16, samples=8) if args.quick else Agent()
        best = ModelCheckpoint(cache, f"training-{args.seed}", monitor="val_return", mode="max")
        settings = trainer_settings(cache) | {"enable_checkpointing": True}
        trainer = L.Trainer(max_epochs=args.epochs, callbacks=[best, Progress()], gradient_clip_val=10.0, **settings)
        trainer.fit(agent, agent.replay(args.batches), episodes_of(SEARCHED[: args.episodes]))
        Path(best.best_model_path).rename(path)
    return path


class Progress(L.Callback):
    """Prints what each epoch has led to."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line."""
        logged = {name: round(float(value), 2) for name, value in trainer.callback_metrics.items()}
        print(f"epoch {trainer.current_epoch}: {logged}", flush=True)


def pruned(method: str, sparsity: float, path: Path, args: argparse.Namespace, **more: Any) -> tuple[Agent, Row]:
    """A copy of the trained agent, pruned, and what was found."""
    agent = Agent.load_from_checkpoint(path)
    result = prune(
        agent,
        train_dataloaders=agent.replay(8),
        val_dataloaders=episodes_of(SEARCHED[: args.episodes]),
        trainer=L.Trainer(max_epochs=1, **trainer_settings(path.parent)),
        monitor="val_return",
        mode="max",
        target_sparsity=sparsity,
        twins=TWINS,
        seed=args.seed,
        report=False,
        verbose=False,
        **METHODS[method],
        **more,
    )
    found: Row = {
        "method": method,
        "target": sparsity,
        "sparsity": result.sparsity,
        "coefficients": coefficients(result),
        "searched": {"before": result.metrics_before, "after": result.metrics_after},
        "evaluations": result.evaluations,
        "round_seconds": round(result.seconds, 1),
        "applied": result.applied,
        "reason": result.reason,
    }
    return agent, found


def coefficients(result: PruningResult) -> dict[str, float]:
    """The fraction of channels removed in each component; `latent` is what couples them."""
    found: dict[str, list[int]] = {}
    for group in result.groups:
        name = group.component if group.kind == "intra" else "latent"
        removed, channels = found.setdefault(name, [0, 0])
        found[name] = [removed + group.channels_before - group.channels_after, channels + group.channels_before]
    return {name: removed / channels for name, (removed, channels) in found.items()}


def judged(agent: Agent, seeds: list[int]) -> Row:
    """The agent on episodes that no search has seen, its size without targets, and its planning time per step."""
    agent.eval()
    episodes, values = agent.play(seeds)
    returns = episodes.rewards.sum(1)
    return {
        "return": returns.mean().item(),
        "spread": returns.std().item(),
        "returns": [round(value, 1) for value in returns.tolist()],
        "descent": descent(values / REWARD_SCALE).item(),
        "parameters": sum(p.numel() for name in PARTS for p in agent.get_submodule(name).parameters()),
        "milliseconds_per_step": planning_time(agent),
    }


@torch.no_grad()
def planning_time(agent: Agent, samples: int = 512, runs: int = 40) -> float:
    """Milliseconds of processor that one plan for one state takes, the median; with as many samples as TD-MPC draws."""
    latents, noise = agent.encoder(torch.zeros(1, 3)), torch.randn(2, agent.horizon, 1, samples, 1)
    times = []
    for _ in range(runs):
        started = time.thread_time()
        agent.plan(latents, torch.zeros(1, agent.horizon, 1), noise)
        times.append(time.thread_time() - started)
    return 1000 * statistics.median(times)


# --------------------------------------------------------------------------------------------------------- results


def table(rows: dict[str, Row]) -> str:
    """The Markdown table: one row per agent."""
    dense = rows["dense"]
    header = ["method", "removed", "return", "of dense", "descent", "parameters", "ms per step", "evaluations"]
    names = ["latent", *PARTS]
    lines = []
    for row in sorted(rows.values(), key=lambda row: row.get("target", 0.0)):
        given = row.get("coefficients", {})
        lines.append(
            [
                row["method"],
                f"{row['sparsity']:.0%}",
                f"{row['return']:.0f} ± {row['spread']:.0f}",
                f"{row['return'] - dense['return']:+.1f} ({row['return'] / dense['return'] - 1:+.1%})",
                f"{row['descent']:.2f}",
                f"{row['parameters']:,}",
                f"{row['milliseconds_per_step']:.1f}",
                str(row.get("evaluations", "-")),
                *(f"{given[name]:.2f}" if name in given else "-" for name in names),
            ]
        )
    return markdown([*header, *names], lines) + "\n"


def draw(rows: dict[str, Row], path: Path) -> None:
    """Returns against sparsity, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        points = [rows["dense"], *(row for row in rows.values() if row["method"] == method)]
        points.sort(key=lambda row: row["sparsity"])
        x, y = ([row[key] for row in points] for key in ("sparsity", "return"))
        error = [row["spread"] / len(row["returns"]) ** 0.5 for row in points]
        axis.errorbar([100 * value for value in x], y, error, marker="o", ms=4, capsize=2, lw=1.2, label=method)
    axis.axhline(1.05 * rows["dense"]["return"], color="black", lw=0.6, ls=":")
    axis.set_xlabel("parameters removed, %")
    axis.set_ylabel("return, mean of unseen episodes with its standard error")
    axis.set_title("No training after the prune; dotted: 5 % below dense")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def film(agents: dict[str, Agent], path: Path, seed: int = UNSEEN[2]) -> None:
    """The swing-up as every agent does it, side by side, from the same start; every third step of the first 120."""
    from PIL import Image, ImageDraw

    strips = []
    for name, agent in agents.items():
        actions = agent.play([seed])[0].actions[0]
        environment = gymnasium.make("Pendulum-v1", render_mode="rgb_array")
        environment.reset(seed=seed)
        frames = []
        for step, action in enumerate(actions[:120]):
            if step % 3 == 0:
                picture = Image.fromarray(environment.render()).resize((150, 150))  # type: ignore[arg-type]
                ImageDraw.Draw(picture).text((4, 2), name.replace(", ", "\n"), fill="black")
                frames.append(picture)
            environment.step(TORQUE * action.numpy())
        strips.append(frames)
    pictures = []
    for moment in zip(*strips, strict=True):
        wide = Image.new("RGB", (150 * len(moment), 150))
        for place, frame in enumerate(moment):
            wide.paste(frame, (150 * place, 0))
        pictures.append(wide.quantize(16))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=150, loop=0)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
    """
    parser = arguments("control_agent", __doc__)
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    args = parser.parse_args(argv)
    output, cache = folders("control_agent", args)
    args.epochs, args.batches, args.episodes = (1, 20, 1) if args.quick else (9, 200, 6)
    unseen, sparsities = (UNSEEN[:2], SPARSITIES[:1]) if args.quick else (UNSEEN, args.sparsities)
    torch.set_num_threads(1)
    path, results = train(cache, args), Results(output, {"seed": args.seed, "quick": args.quick})

    def dense() -> Row:
        return {"method": "dense", "sparsity": 0.0} | judged(Agent.load_from_checkpoint(path), unseen)

    def row_of(method: str, sparsity: float, **more: Any) -> Row:
        agent, found = pruned(method, sparsity, path, args, **more)
        torch.save(agent, cache / f"{method} {sparsity}.pt")  # for the film
        return found | judged(agent, unseen)

    results.row("dense", dense)
    for sparsity in sparsities:
        for method in METHODS:
            results.row(f"{method} {sparsity:.0%}", partial(row_of, method, sparsity))
            (output / "table.md").write_text(table(results.rows))
    if not args.quick and 0.5 in sparsities:
        bound = f"default, {CONSTRAINT}"
        results.row(bound, lambda: row_of("default", 0.5, constraints=[CONSTRAINT]) | {"method": bound})
    (output / "table.md").write_text(table(results.rows))
    draw(results.rows, output / "figure.png")
    if 0.5 in sparsities:
        filmed = {"dense": Agent.load_from_checkpoint(path)}
        for method in ("uniform, no compensation", "default"):
            filmed[f"{method}, 50 %"] = torch.load(cache / f"{method} 0.5.pt", weights_only=False)
        film({name: agent.eval() for name, agent in filmed.items()}, output / "swing_up.gif")
    print(table(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
