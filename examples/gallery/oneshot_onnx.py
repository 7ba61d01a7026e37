"""A trained network is pruned at once, exported to ONNX, and timed where it will run.

`prune()` needs the module and its data, and no training. What comes out is an ordinary module, which
`torch.onnx.export` takes as it takes any other. Both files are run by onnxruntime on one thread.

In the picture: the time of a batch of 256 images, the size of the file, and the accuracy, dense and pruned.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from classifier import Classifier, convnet
from common import BLUE, GREY, Digits, figure, print_table, save, start, trainer
from torch import nn

from lightning_softprune import SensitivitySearch, prune


def export(model: nn.Module, path: Path) -> onnxruntime.InferenceSession:
    """Writes the model as ONNX, for batches of any size, and reads it back for one thread."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own deprecations
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 1, 8, 8),),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def milliseconds(session: onnxruntime.InferenceSession, images: np.ndarray, repeats: int = 50) -> float:
    """The median time of a batch."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        session.run(None, {session.get_inputs()[0].name: images})
        times.append(time.perf_counter() - begin)
    return 1000 * float(np.median(times))


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model, data = Classifier(convnet(64, 128, 128, 256)), Digits(noise=0.3)
    trainer(args, 6).fit(model, datamodule=data)
    networks = {"dense": copy.deepcopy(model), "pruned": model}
    result = prune(
        model,
        data,
        monitor="val_acc",
        mode="max",
        target_sparsity=0.7,
        cost="macs",  # operations are nearer to time than parameters are
        round_to=8,  # a multiple of eight channels suits vector units
        search=SensitivitySearch(),
        trainer=trainer(args, 1),
    )

    images = data.images[1300:1556].numpy()
    sessions = {name: export(network, args.out / f"{name}.onnx") for name, network in networks.items()}
    expected = model(torch.from_numpy(images)).detach().numpy()
    (logits,) = sessions["pruned"].run(None, {sessions["pruned"].get_inputs()[0].name: images})
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # the file computes what the module does

    figures = {
        "ms per 256 images": [milliseconds(session, images) for session in sessions.values()],
        "file in kB": [(args.out / f"{name}.onnx").stat().st_size / 1000 for name in sessions],
        "accuracy in %": [100 * result.score_before, 100 * result.score_after],
    }
    print_table(("", *networks), *((name, *(f"{value:.1f}" for value in row)) for name, row in figures.items()))

    picture, axes = figure(columns=len(figures), size=(7.2, 2.6))
    for axis, (name, values) in zip(axes, figures.items(), strict=True):
        axis.bar_label(axis.bar(list(networks), values, color=[GREY, BLUE], width=0.6), fmt="%.1f")
        axis.set(title=name, yticks=[], ylim=(0, 1.15 * max(values)))
        axis.spines["left"].set_visible(False)
    save(picture, args)


if __name__ == "__main__":
    main()
