import gzip
import importlib
import struct
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(scope="module", autouse=True)
def folder_of_the_script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("mnist_autoencoder")


@pytest.fixture(scope="module")
def images():
    return importlib.import_module("mnist_autoencoder_data")


def idx_bytes(values, type_code=8):
    """An idx file made with struct alone, from nested lists."""
    shape, inner = [], values
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0]
    flat = values
    for _ in shape[1:]:
        flat = [element for part in flat for element in part]
    return struct.pack(f">BBBB{len(shape)}I{len(flat)}B", 0, 0, type_code, len(shape), *shape, *flat)


def random_images(count, rng, side=6):
    return rng.integers(0, 256, (count, side, side)).tolist()


@pytest.fixture
def mnist_dir(tmp_path):
    """A tiny MNIST: 40 training and 24 test images of 6x6 pixels, one pair of files compressed, the other plain."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    contents = (
        idx_bytes(random_images(40, rng)),
        idx_bytes([i % 10 for i in range(40)]),
        idx_bytes(random_images(24, rng)),
        idx_bytes([i % 10 for i in range(24)]),
    )
    for name, content in zip(FILES, contents, strict=True):
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("values", [[[[0, 1, 255], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]], [7, 0, 9, 1]])
def test_read_idx_returns_the_array_that_was_written(images, tmp_path, values, compress):
    path = tmp_path / "file"
    path.write_bytes(compress(idx_bytes(values)))
    array = images.read_idx(path, ndim=np.ndim(values))
    assert array.dtype == np.uint8
    assert array.tolist() == values
    array[0] = 0  # a copy of its own, not a view of read-only bytes


IMAGES = idx_bytes([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(IMAGES[:-1], r"truncated: 23 bytes, expected 24 for its sizes \(2, 2, 2\)", id="truncated"),
        pytest.param(IMAGES[:9], r"ends within its header, after 9 bytes, expected at least 16", id="cut in header"),
        pytest.param(IMAGES + b"\0", r"too long: 25 bytes, expected 24", id="too long"),
        pytest.param(b"", r"starts with nothing, expected 00000803", id="empty"),
        pytest.param(idx_bytes([1, 2, 3]), r"starts with 00000801, expected 00000803", id="labels for images"),
        pytest.param(b"<!DOCTYPE html>", r"starts with 3c21444f, expected 00000803", id="a web page"),
        pytest.param(b"\0\0\x08\x03" + bytes(12), r"holds no data \(sizes \(0, 0, 0\)\)", id="no images"),
        pytest.param(gzip.compress(IMAGES)[:-9], r"cannot be read, expected an idx file", id="truncated gz"),
        pytest.param(b"\x1f\x8b" + b"rubbish" * 9, r"cannot be read, expected an idx file", id="not really gz"),
    ],
)
def test_read_idx_names_the_file_and_what_it_expected(images, tmp_path, content, expected):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(images.DataError, match=expected) as caught:
        images.read_idx(path, ndim=3)
    assert str(caught.value).startswith(str(path))


def test_mnist_pixels_and_labels_are_those_of_the_files(images, mnist_dir):
    data = images.load_mnist_data(mnist_dir)
    train = gzip.decompress((mnist_dir / f"{FILES[0]}.gz").read_bytes())[16:]
    val = (mnist_dir / FILES[2]).read_bytes()[16:]
    assert data.train.shape == (40, 36)
    assert data.shape == (6, 6)
    assert (data.train * 255).round().byte().flatten().tolist() == list(train)
    assert (data.val * 255).round().byte().flatten().tolist() == list(val)
    assert data.val_labels.tolist() == [i % 10 for i in range(24)]


def test_digits_are_all_used_once_and_split_the_same_way_every_time(images):
    data = images.load_digits_data()
    assert data.train.shape == (1500, 64)
    assert data.val.shape == (297, 64)
    assert data.train.min() == 0
    assert data.train.max() == 1
    assert torch.equal(data.train, images.load_digits_data().train)

    from sklearn.datasets import load_digits

    total = torch.cat([data.train, data.val]).double().sum(0) * 16
    assert torch.equal(total, torch.from_numpy(load_digits().data).sum(0))


def spoil_missing_folder(folder):
    folder.rename(folder.with_name("elsewhere"))
    return "no such folder"


def spoil_missing_file(folder):
    (folder / FILES[2]).unlink()
    return f"{FILES[2]}: no such file, nor {FILES[2]}.gz"


def spoil_truncated(folder):
    path = folder / FILES[2]
    path.write_bytes(path.read_bytes()[:-1])
    return f"{FILES[2]}: truncated"


def spoil_wrong_file(folder):
    path = folder / FILES[3]
    path.write_bytes((folder / FILES[2]).read_bytes())
    return f"{FILES[3]}: starts with 00000803, expected 00000801"


def spoil_label_count(folder):
    (folder / FILES[3]).write_bytes(idx_bytes([1, 2, 3]))
    return f"{FILES[3]}: 3 labels, expected 24"


def spoil_image_size(folder):
    (folder / FILES[2]).write_bytes(idx_bytes(random_images(24, np.random.default_rng(0), side=5)))
    return "training images are 6x6 pixels, test images 5x5"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_missing_folder,
        spoil_missing_file,
        spoil_truncated,
        spoil_wrong_file,
        spoil_label_count,
        spoil_image_size,
    ],
)
def test_a_bad_data_folder_ends_in_one_line_and_exit_code_2(example, mnist_dir, tmp_path, capsys, spoil):
    expected = spoil(mnist_dir)
    code = example.main(["--data-dir", str(mnist_dir), "--output", str(tmp_path / "picture.png")])
    stdout, stderr = capsys.readouterr()
    assert code == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert str(mnist_dir) in stderr
    assert expected in stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target-sparsity", "1.0"], "1.0 is not between 0 and 1"),
        (["--max-epochs", "4", "--prune-epoch", "4"], "--prune-epoch 4 is not between 1 and --max-epochs - 1 (3)"),
        (["--max-epochs", "1"], "--max-epochs 1 leaves no epoch"),
        (["--output", "picture.jpg"], "picture.jpg does not end in .png"),
    ],
)
def test_options_that_cannot_work_are_refused_before_training(
    example, tmp_path, monkeypatch, capsys, options, expected
):
    monkeypatch.setattr(example, "OUTPUT", tmp_path / "picture.png")
    with pytest.raises(SystemExit) as caught:
        example.main(options)
    stdout, stderr = capsys.readouterr()
    assert caught.value.code == 2
    assert stdout == ""
    assert expected in stderr


def test_val_psnr_is_that_of_all_images_at_once_whatever_the_batches(example, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(11, 12)
    images[8:] *= 0.1  # the short last batch of 3 differs, so that a mean over batches would show
    model = example.Autoencoder((12, 8, 3))
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    (metrics,) = trainer.validate(model, DataLoader(TensorDataset(images), batch_size=4), verbose=False)

    with torch.no_grad():
        errors = (model(images) - images).double().numpy() ** 2
    batch_means = [errors[:4].mean(), errors[4:8].mean(), errors[8:].mean()]
    assert metrics["val_psnr"] == pytest.approx(-10 * np.log10(errors.mean()), abs=1e-4)
    assert metrics["val_loss"] == pytest.approx(errors.mean(), rel=1e-5)
    assert abs(np.log10(errors.mean()) - np.log10(np.mean(batch_means))) > 1e-3  # the test can tell them apart


def test_encoder_and_decoder_mirror_each_other(example):
    model = example.Autoencoder((12, 8, 3))
    widths = [
        (layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, torch.nn.Linear)
    ]
    assert widths == [(12, 8), (8, 3), (3, 8), (8, 12)]


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_main_prints_the_table_and_draws_the_picture(example, mnist_dir, tmp_path, capsys, data):
    picture = tmp_path / "new" / "picture.png"
    options = ["--max-epochs", "2", "--prune-epoch", "1", "--target-sparsity", "0.5", "--output", str(picture)]
    if data == "mnist":
        options += ["--data-dir", str(mnist_dir)]
    assert example.main(options) == 0

    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.rstrip().endswith("dB")}
    table = {name: int(rows[name][1].replace(",", "")) for name in ("dense", "uniform", "found")}
    for name in ("uniform", "found"):
        assert 1 - table[name] / table["dense"] == pytest.approx(0.5, abs=0.005 + 1e-9)
    assert str(picture) in printed

    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 100
