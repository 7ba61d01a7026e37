"""Print what becomes of each architecture, as Markdown: `python tests/support_table.py`.

Networks are tiny and have random weights, so the table says what is supported, not how well a trained network keeps its
metric. A cell whose measurement fails says so.

    python tests/support_table.py --only BERT        # those with this in their name
    python tests/support_table.py --json table.json  # the numbers
    python tests/support_table.py --write            # into tests/SUPPORT.md and the guide
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch

from support.architectures import measure
from support.architectures.table import ARCHITECTURES

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "examples" / "guide" / "architectures.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
CLOSE = 1e-4

COLUMNS = {
    "share": "share in groups",
    "groups": "groups",
    "heads": "heads",
    "left": "largest left out",
    "sparsity": "sparsity, no compensation",
    "compensated": "sparsity, least squares",
    "masking": "difference to masking",
    "trains": "trains on",
    "loads": "save, load",
    "export": "`torch.export`",
    "onnx": "ONNX",
    "compile": "`torch.compile`",
}
IN_GUIDE = ("share", "heads", "sparsity", "masking", "loads", "export", "onnx")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", default="", help="architectures with this in their name")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the cells to a file")
    parser.add_argument("--write", action="store_true", help="write the table into tests/SUPPORT.md and the guide")
    given = parser.parse_args(arguments)
    if given.write and given.only:
        parser.error("--write: it needs all architectures, so --only has no place beside it")
    torch.set_num_threads(1)
    rows = {}
    for architecture in ARCHITECTURES:
        if given.only.lower() not in architecture.name.lower():
            continue
        started = time.perf_counter()
        rows[architecture.name] = row_of(architecture)
        print(f"{architecture.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if not rows:
        names = ", ".join(architecture.name for architecture in ARCHITECTURES)
        parser.error(f"--only: {given.only!r} is in none of {names}")
    print(markdown(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if given.write:
        write(rows)


def row_of(architecture):
    """The cells of an architecture: a number, a word, or why there is none."""
    if not architecture.available:
        return dict.fromkeys(COLUMNS, f"{architecture.needs} is not installed")
    row = {}

    def cell(name, function):
        """Measure one cell; later ones that need what failed say the same."""
        try:
            with measure.quietly():
                row[name] = function()
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            line = re.sub(r"\x1b\[\d*m", "", line)  # colours of a terminal
            row[name] = f"{type(error).__name__}: {line}".replace("net.", "")

    found = {}

    def look():
        task = architecture.make()
        found["groups"] = measure.groups_of(task, architecture)
        return measure.share_in_groups(task, architecture, found["groups"])

    def heads():
        whole, dimensions = measure.head_groups(architecture, found["groups"])
        words = [f"{whole} x heads"] * bool(whole) + [f"{dimensions} x dimensions"] * bool(dimensions)
        return ", ".join(words) or ("none" if architecture.head else "")

    cell("share", look)
    if found:
        cell("groups", lambda: len(measure.only_prunable(found["groups"])))
        cell("heads", heads)
        cell("left", lambda: measure.largest_left_out(architecture.make(), found["groups"]))
        cell("masking", lambda: measure.difference_to_masking(architecture, found["groups"]))
    after_pruning(architecture, cell)
    return row


def after_pruning(architecture, cell):
    """The cells about the pruned module."""
    found = {}

    def prune(name, **how):
        found[name], sparsity = measure.pruned(architecture, **how)
        return sparsity

    cell("sparsity", lambda: prune("plain", compensation="none"))
    cell("compensated", lambda: prune("compensated", compensation="least_squares"))
    task = found.get("compensated", found.get("plain"))
    if task is None:
        return
    inputs = architecture.example(3)
    with measure.quietly():
        expected = measure.outputs_of(task, inputs)

    def same(outputs, tolerance=CLOSE):
        error = measure.difference(outputs, expected)
        return "yes" if error <= tolerance else f"differs by {error:.0e}"

    def loads():
        return same(measure.outputs_of(measure.saved_and_loaded(task, architecture), inputs), 0.0)

    cell("loads", loads)
    cell("export", lambda: same(measure.exported(task, inputs)))
    cell("onnx", lambda: same(measure.through_onnx(task, inputs)))
    cell("compile", lambda: same(measure.compiled(task, inputs)))
    cell("trains", lambda: measure.train_a_step(task, architecture.batch(4)) or "yes")


# --------------------------------------------------------------------------------------------------------------- table


def shown(name, value):
    if name in ("share", "sparsity", "compensated") and isinstance(value, float):
        return f"{100 * value:.0f} %"
    if name == "masking" and not isinstance(value, str):
        return "n/a" if value is None else "none" if value <= 1e-6 else f"{value:.0e}"
    text = str(value).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 110 else text[:107].rstrip() + "..."


def markdown(rows, columns=tuple(COLUMNS)):
    """The table."""
    lines = [
        " | ".join(["architecture", *(COLUMNS[name] for name in columns)]),
        "|".join(["---"] * (len(columns) + 1)),
        *(
            " | ".join([architecture, *(shown(name, row.get(name, "-")) for name in columns)])
            for architecture, row in rows.items()
        ),
    ]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


LEGEND = """\
- *share in groups*: parameters in tensors that some prunable group slices, of those that validation uses; *groups*: how
  many groups.
- *heads*: prunable groups that remove whole heads, and those that remove a dimension of every head.
- *largest left out*: of what is not prunable, the network's outputs aside, with the reason.
- *sparsity*: what `prune(target_sparsity=0.5, search=UniformBaseline())` reaches, or the highest there is.
- *difference to masking*: largest difference between the outputs of the pruned network and of the dense one in which
  all that was removed is zero, relative to their scale ("none": at most 1e-6); "n/a" where a norm, an attention or a
  mean over the channels makes the two different networks.
- *trains on*, *save, load* (record and weights through a file, into a fresh module: equal outputs), `torch.export`,
  ONNX (in ONNX Runtime) and `torch.compile` (traced, no code generated): the pruned network runs, and computes the
  same."""


def document(rows):
    """The text of tests/SUPPORT.md."""
    return (
        "# What becomes of which architecture\n\n"
        "Generated by `python tests/support_table.py --write`: tiny networks with random weights, pruned without "
        "training.\n"
        f"Models of `transformers` are made from their configuration. torch {torch.__version__}.\n\n"
        f"{LEGEND}\n\n{markdown(rows)}\n"
    )


def with_table(text, rows):
    """A text with the table between its two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{GUIDE.name}: it has not the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{markdown(rows, IN_GUIDE)}\n{END}{after}"


def write(rows):
    """Write the table where it is kept."""
    (ROOT / "tests" / "SUPPORT.md").write_text(document(rows), encoding="utf-8")
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
