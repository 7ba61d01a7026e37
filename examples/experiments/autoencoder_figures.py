"""What `mnist_autoencoders.py` shows of its rows and networks: a table, what was promised, and four figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from shared.results import Row, markdown
from torch import Tensor, nn

TARGETS = (0.5, 0.7, 0.8, 0.9)
LATENTS = 1000  # test images whose latent codes are drawn


def average(rows: Mapping[str, Row], key: str, **wanted: object) -> float | None:
    """The mean over seeds of what the wanted rows have under a key; `None`: there is no such row."""
    wanted = {"epochs": 0} | wanted
    values = [row[key] for row in rows.values() if wanted.items() <= row.items() and key in row]
    return statistics.mean(values) if values else None


def table(rows: Mapping[str, Row]) -> str:
    """The Markdown tables, one per network: PSNR at every sparsity, and what 70 % cost."""
    parts = []
    for network in dict.fromkeys(row["network"] for row in rows.values()):
        seeds = {row["seed"] for row in rows.values() if row["network"] == network and row["target"]}
        dense = average(rows, "psnr", network=network, method="dense")
        similar = average(rows, "ssim", network=network, method="dense")
        parameters = average(rows, "parameters", network=network, method="dense")
        title = f"**{network}**, {parameters:,.0f} parameters, dense {_text(dense)} dB, SSIM {_text(similar, 3)}"
        header = [f"PSNR at {target:.0%}" for target in TARGETS]
        after = ["SSIM at 70%", "70%, one epoch more", "evaluations at 70%", "seconds at 70%"]
        lines = []
        own = [row for row in rows.values() if row["network"] == network and row["target"]]
        kinds = dict.fromkeys((row["compensation"], row["method"]) for row in own)
        for compensation, method in sorted(kinds, key=lambda kind: kind[0]):
            at = {"network": network, "compensation": compensation, "method": method}
            psnr = [
                _text(average(rows, "psnr", target=target, **at), spread=average(rows, "spread", target=target, **at))
                for target in TARGETS
            ]
            at_70 = {key: average(rows, key, target=0.7, **at) for key in ("ssim", "evaluations", "seconds")}
            tuned = average(rows, "psnr", target=0.7, **at | {"epochs": 1})
            last = [_text(at_70["ssim"], 3), _text(tuned), _text(at_70["evaluations"], 0), _text(at_70["seconds"], 1)]
            lines.append([compensation, method, *psnr, *last])
        header = ["compensation", "method", *header, *after]
        parts.append(f"{title}; {len(seeds)} seed{'s' * (len(seeds) > 1)}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def promises(rows: Mapping[str, Row]) -> list[str]:
    """What was asked of 70 %, network by network: near the grid, cheap, far above random, near the dense network.

    Only the first seed, whose grid has every point.
    """
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows.values()):
        at = {"network": network, "seed": 0, "target": 0.7, "compensation": "least_squares"}
        asked = ("gradient from curves (default)", "gradient from uniform", "default, healed")
        psnr = {name: average(rows, "psnr", method=name, **at) for name in ("grid", "random", *asked)}
        dense = average(rows, "psnr", network=network, seed=0, method="dense")
        points, drawn = average(rows, "evaluations", method="grid", **at), psnr["random"]
        if psnr["grid"] is None or drawn is None or dense is None or points is None:
            continue
        for name in asked:
            value, spent = psnr[name], average(rows, "evaluations", method=name, **at)
            if value is not None and spent is not None:
                lines.append(
                    f"{network}, {name}: {value - psnr['grid']:+.2f} dB from the grid's best (asked: -0.05) with "
                    f"{spent / points:.1%} of its {points:.0f} evaluations (2 %), {value - drawn:+.1f} dB from random "
                    f"(+4), {value - dense:+.2f} dB from dense (-0.3)"
                )
    return lines


def _text(value: float | None, digits: int = 2, spread: float | None = None) -> str:
    return "-" if value is None else f"{value:.{digits}f}" + (f" ± {spread:.1f}" if spread is not None else "")


def draw_lines(rows: Mapping[str, Row], methods: Sequence[str], path: Path) -> None:
    """PSNR against sparsity, a panel per network and compensation, a line per method."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows.values()))
    compensations = ("none", "least_squares")
    figure = Figure(figsize=(11, 4 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False, sharex=True, sharey="row")
    for network, line in zip(networks, axes, strict=True):
        for compensation, axis in zip(compensations, line, strict=True):
            for number, method in enumerate(methods):
                at = {"network": network, "compensation": compensation, "method": method}
                points = [(average(rows, "psnr", target=target, **at), 100 * target) for target in TARGETS]
                measured = [(x, y) for y, x in points if y is not None]
                if measured:
                    axis.plot(*zip(*measured, strict=True), "o-", color=f"C{number}", ms=3, lw=1.2, label=method)
            dense = average(rows, "psnr", network=network, method="dense")
            if dense is not None:
                axis.axhline(dense, color="black", lw=0.8, ls=":")
            axis.set_title(f"{network}, compensation: {compensation.replace('_', ' ')}", fontsize=10)
            axis.set_xlabel("parameters removed, %")
        line[0].set_ylabel("PSNR of test images, dB; dotted: dense")
    axes[0, 1].legend(fontsize=8)
    figure.savefig(path, dpi=80)


@torch.no_grad()
def draw_pictures(shown: Mapping[str, Mapping[str, nn.Module]], test: tuple[Tensor, Tensor], path: Path) -> None:
    """One test image of each digit, and what every network makes of it."""
    from matplotlib.figure import Figure

    images, labels = test
    images = images[[int((labels == digit).nonzero()[0]) for digit in sorted(set(labels.tolist()))]]
    strips = {"original": images}
    for network, models in shown.items():
        strips |= {f"{network}:\n{text}": model.eval()(images) for text, model in models.items()}
    figure = Figure(figsize=(9, 0.75 * len(strips)), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (text, strip) in zip(axes, strips.items(), strict=True):
        axis.imshow(torch.cat(list(strip[:, 0]), dim=1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(path, dpi=80)


@torch.no_grad()
def draw_latents(shown: Mapping[str, Mapping[str, nn.Module]], test: tuple[Tensor, Tensor], path: Path) -> None:
    """The latent codes of test images on their first two principal components, a colour per digit."""
    from matplotlib.figure import Figure

    images, labels = test[0][:LATENTS], test[1][:LATENTS]
    figure = Figure(figsize=(9, 3 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), max(map(len, shown.values())), squeeze=False)
    for line, (network, models) in zip(axes, shown.items(), strict=True):
        before: Tensor | None = None
        for axis, (text, model) in zip(line, models.items(), strict=True):
            codes = projected(model.eval().get_submodule("encoder")(images).flatten(1), before)
            before = codes if before is None else before
            axis.scatter(*codes.T.numpy(), c=labels.numpy(), cmap="tab10", vmin=-0.5, vmax=9.5, s=2, rasterized=True)
            axis.set_title(f"{network}: {text}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=80)


def projected(codes: Tensor, like: Tensor | None = None) -> Tensor:
    """Codes, `(images, width)`, on their first two principal components, turned to lie as others do that are given.

    Args:
        codes: One row per image.
        like: Projected codes of the same images; without, components are as they come.
    """
    centred = codes - codes.mean(0)
    flat = torch.zeros(len(codes), 2)
    components = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    flat[:, : len(components)] = centred @ components.T
    if like is None:
        return flat
    left, _, right = torch.linalg.svd(flat.T @ like)  # the nearest rotation or reflection (Procrustes)
    turned: Tensor = flat @ (left @ right)
    return turned
