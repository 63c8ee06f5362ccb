"""Stock timm models with stored weights."""

from __future__ import annotations

from typing import Any

from vtprune.evals.parity.compare import tensor
from vtprune.evals.parity.registry import Arrays


def stock_timm(arrays: Arrays, kind: str = "cls") -> Any:
    import timm

    image, patch, width, depth, heads, classes = arrays["cfg"].tolist()
    plain = timm.models.VisionTransformer
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "cls": (plain, {}),
        "gap": (plain, {"class_token": False, "global_pool": "avg"}),
        "mae": (plain, {"global_pool": "avg"}),
        "dist": (timm.models.deit.VisionTransformerDistilled, {}),
    }
    cls, options = kinds[kind]
    model = cls(
        img_size=image, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes, **options
    ).eval()
    model.load_state_dict({name[3:]: tensor(arrays, name).float() for name in arrays if name.startswith("w::")})
    return model
