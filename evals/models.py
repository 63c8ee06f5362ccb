"""Models, devices and number formats by name."""

from __future__ import annotations

import importlib.util
import pickle
from typing import Any


def quiet() -> None:
    """Keep transformers' own progress bars out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(
    name: str | None, device: str | None, dtype: str | None, video: bool = False, mid: bool = False
) -> tuple[Any, Any]:
    """(model, processor); without a name an embedded one, in float32 on the CPU unless told otherwise."""
    quiet()
    where = device_of(device or (None if name else "cpu"))
    kind = dtype_of(dtype, where)
    if name is None:
        from vtprune.evals.toys import toy

        return toy("video" if video else "mid" if mid else "image").load(where, kind)
    import torch
    from transformers import AutoModelForImageTextToText

    processor = processor_of(name)
    if video:
        check_videos(name, processor)
    loaded = _from_hub(AutoModelForImageTextToText, name, dtype=kind)
    return loaded.eval().to(torch.device(where)), processor


def processor_of(name: str) -> Any:
    """The processor of a checkpoint; ValueError where there is none, or a package is missing that it needs."""
    from transformers import AutoProcessor

    processor = _from_hub(AutoProcessor, name)
    if getattr(processor, "chat_template", None) and importlib.util.find_spec("jinja2") is None:
        raise ValueError(f"--model {name} has a chat template, which needs jinja2: run pip install jinja2")
    return processor


def check_videos(name: str, processor: Any) -> None:
    """ValueError where a processor takes no videos."""
    if getattr(processor, "video_processor", None) is None:
        from vtprune.model_adapters import families

        takes = [known.model_type for known in families() if known.family.video_layout and known.status == "tested"]
        raise ValueError(
            f"--model {name} takes no videos (its {type(processor).__name__} has no video processor): name one that "
            f"does (its model_type is one of {', '.join(takes)}), or leave out --video"
        )


def config_of(name: str) -> Any:
    """The config of a checkpoint."""
    from transformers import AutoConfig

    quiet()
    return _from_hub(AutoConfig, name)


def on_meta(config: Any) -> Any:
    """A vision-language model without weights: shapes alone, so that any size is built at once."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


def _from_hub(cls: Any, name: str, **options: Any) -> Any:
    """`cls.from_pretrained`, whose every failure is one sentence that names the model."""
    try:
        # Unset, this option makes transformers ask on the terminal whether to run the repository's code.
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # files of all kinds, read by many libraries with errors of their own
        raise ValueError(f"--model {name}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """Why a model was not loaded, and what to do."""
    told = str(error)
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, and loading it could run any code: convert it to "
            "safetensors (safetensors.torch.save_file) where you trust its source"
        )
    if "trust_remote_code" in told:
        return (
            "it needs code from its own repository, which these commands never run: read that code, load the model in "
            "Python with trust_remote_code=True, and call vtprune.patch on it"
        )
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return f"no model there that transformers can load ({kind}{_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_of(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; use cpu or cuda") from error
    kind = place.type
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: a {kind} device runs no model here; use cpu or cuda")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine has no such device; use cpu")
    if kind == "cuda" and (place.index or 0) >= torch.cuda.device_count() > 0:
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can see; use --device cpu")
    return name


def dtype_of(name: str | None, device: str) -> Any:
    import torch

    if name is None:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"--dtype {name}: choose one of {', '.join(known)}")
    return known[name]
