"""Tiny checkpoints that vLLM runs on a CPU, an engine of vLLM in this process, and what transformers answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import families
import numpy as np
import torch
import transformers
from checkpoints import tokenizer
from families import END, IMAGE, PAD, START, VIDEO
from PIL import Image
from safetensors.torch import load_file, save_file

import vtprune

HEAD = 32  # the least size of a head that vLLM's attention on a CPU takes
SHRINKS = "anyres_max_9"  # when mosaics of LLaVA-OneVision shrink; vLLM knows no other
NEW = 10  # tokens to generate
BEGIN, STOP = "<|vision_start|>", "<|vision_end|>"
QUESTION = "what is in the picture? say it in one word."


def _llava() -> tuple[Any, str]:
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    words = tokenizer({"image_token": "<image>"}, {IMAGE: "<image>"})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(pictures, words, image_token="<image>", **options), "<image>"


def _llava_onevision() -> tuple[Any, str]:
    pins, size = families.PINPOINTS_WIDE, {"height": 16, "width": 16}
    pictures = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins)
    films = transformers.LlavaOnevisionVideoProcessor(size=size)
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"}, {IMAGE: "<image>", VIDEO: "<video>"})
    made = transformers.LlavaOnevisionProcessor(
        pictures,
        words,
        films,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        patch_size=4,
        vision_aspect_ratio=SHRINKS,
    )
    return made, "<image>"


def _qwen(processor: str, films: str) -> tuple[Any, str]:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    words = tokenizer(names, dict(zip((IMAGE, VIDEO, START, END), names.values())))
    shared = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    shared |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # vLLM normalises films as it does pictures
    pictures = transformers.Qwen2VLImageProcessor(**shared)
    video = getattr(transformers, films)(**shared | {"size": {"shortest_edge": 256, "longest_edge": 65536}})
    return getattr(transformers, processor)(pictures, words, video), f"{BEGIN}<|image_pad|>{STOP}"


PROCESSORS = {
    "llava": _llava,
    "llava_next": checkpoints._llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": lambda: _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def save(name: str, folder: Path) -> Path:
    """A tiny random model of a family, whose answers depend on its images, and its processor."""
    family = families.FAMILIES[name]
    config = family.config()
    if name == "llava_onevision":
        config.vision_aspect_ratio = SHRINKS
    text = config.get_text_config()
    text.num_attention_heads, text.head_dim = 1, HEAD  # as wide as the states: not all classes of vLLM ask head_dim
    text.max_position_embeddings = 1024
    rope = text.rope_parameters
    if "mrope_section" in rope:
        scale = HEAD // 2 / sum(rope["mrope_section"])
        rope["mrope_section"] = [int(part * scale) for part in rope["mrope_section"]]
        rope["mrope_interleaved"] = name == "qwen3_vl"  # in transformers the class says so
    torch.manual_seed(0)
    model = getattr(transformers, family.model_class)(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.6 / weight[0].numel() ** 0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=2)
    model.save_pretrained(folder)
    processor, picture = PROCESSORS[name]()
    film = picture.replace("image", "video")
    processor.chat_template = checkpoints.TURN.replace("PICTURE", picture).replace("FILM", film)
    processor.save_pretrained(folder)
    return folder


def as_on_the_hub(folder: Path) -> Path:
    """The same checkpoint with the names that vLLM's LLaVA classes know, and transformers had when they were saved."""
    copy = folder.with_name(f"{folder.name}_hub")
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    save_file({_renamed(k): v for k, v in load_file(folder / "model.safetensors").items()},
              copy / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return copy


def _renamed(name: str) -> str:
    tower = "vision_tower."
    at = name.find(tower)
    inner = name[at + len(tower) :]
    return name if at < 0 or inner.startswith("vision_model.") else f"{name[:at]}{tower}vision_model.{inner}"


@contextlib.contextmanager
def engine(folder: Path, recipe: Any = None, **options: Any) -> Iterator[Any]:
    """An engine of vLLM in this process; recipe: a path, a document or a `Recipe`."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {} if recipe is None else {"vtprune": recipe.to_json() if isinstance(recipe, vtprune.Recipe) else recipe}
    defaults = {"max_model_len": 512, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "block_size": 32}
    llm = LLM(str(folder), mm_processor_kwargs=given or None, **defaults | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def noise(seed: int, width: int = 60, height: int = 44) -> Image.Image:
    return Image.fromarray((np.random.RandomState(seed).rand(height, width, 3) * 255).astype("uint8"))


def film(seed: int, frames: int = 6) -> tuple[np.ndarray, dict[str, Any]]:
    """A film as vLLM takes it: frames [T, H, W, 3], and what is known of them.

    It is wider than long: words behind a longer one stand elsewhere in vLLM than in transformers 5.19 (Qwen2.5-VL).
    """
    pixels = (np.random.RandomState(seed).rand(frames, 48, 64, 3) * 255).astype("uint8")
    told = {"total_num_frames": frames, "fps": 4.0, "duration": frames / 4, "frames_indices": list(range(frames))}
    return pixels, told | {"video_backend": "opencv", "do_sample_frames": False}


def ask(llm: Any, prompts: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(temperature=0, min_tokens=NEW, max_tokens=NEW), use_tqdm=False)


def prompt(text: str, images: Any = (), films: Any = (), **kwargs: Any) -> dict[str, Any]:
    """A request of vLLM. kwargs: its budget."""
    media = {"image": list(images)} if images else {}
    if films:
        media["video"] = list(films)
    return {"prompt": text, "multi_modal_data": media, "mm_processor_kwargs": kwargs or None}


class Reference:
    """The model of transformers, and what it generates when it is patched."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def answer(self, recipe: Any, text: str, images: Any = (), films: Any = ()) -> tuple[list[int], int]:
        """Greedy tokens, and how many tokens the prefill had."""
        options: dict[str, Any] = {}
        if films:
            metadata = [{k: v for k, v in told.items() if k != "do_sample_frames"} for _, told in films]
            options = {"videos": [pixels for pixels, _ in films]}
            options["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
        if images:
            options["images"] = list(images)
        inputs = self.processor(text=text, return_tensors="pt", **options)
        length = inputs["input_ids"].shape[1]
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        if recipe is None:
            return self.model.generate(**inputs, **how)[0, length:].tolist(), length
        with vtprune.patch(self.model, recipe) as handle:
            output = self.model.generate(**inputs, **how)[0, length:].tolist()
            return output, int(handle.last.lengths[0])
