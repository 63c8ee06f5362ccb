"""Checkpoint folders of tiny models as `from_pretrained` reads them: weights, tokenizer, processor, chat template."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from families import BOS, END, FIRST_TEXT, IMAGE, PAD, PINPOINTS, START, VIDEO, VOCAB
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

EOS, UNKNOWN = 2, 13
LETTERS = string.ascii_letters + string.digits + " ?.,!:'-\n"
# Every family's place for a picture or a film in the text of a turn.
TURN = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
{% if c.type == 'image' %}PICTURE{% elif c.type == 'video' %}FILM{% else %}{{ c.text }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""


def tokenizer(names: dict[str, str], specials: dict[int, str]) -> Any:
    """A token a letter, and the special ones at the ids that the tiny models of `families` have for them."""
    words = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", UNKNOWN: "<unk>"} | specials
    words |= {FIRST_TEXT + i: letter for i, letter in enumerate(LETTERS)}
    vocabulary = {words.get(i, f"<{i}>"): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^<> ]+>|[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=names, model_max_length=4096,
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": list(specials.values())}, False)
    assert len(fast) == VOCAB
    return fast


def _llava() -> tuple[Any, str]:
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    words = tokenizer({"image_token": "<image>"}, {IMAGE: "<image>"})
    processor = transformers.LlavaProcessor(
        pictures, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, "<image>"


def _llava_next() -> tuple[Any, str]:
    pictures = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=PINPOINTS
    )
    words = tokenizer({"image_token": "<image>"}, {IMAGE: "<image>"})
    processor = transformers.LlavaNextProcessor(
        pictures, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, "<image>"


def _qwen2_5_vl() -> tuple[Any, str]:
    names = {"image_token": "<image>", "video_token": "<video>"}
    marks = {"vision_start_token": "<start>", "vision_end_token": "<end>"}
    words = tokenizer(names | marks, {IMAGE: "<image>", VIDEO: "<video>", START: "<start>", END: "<end>"})
    shared = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    films = transformers.Qwen2VLVideoProcessor(**shared)
    processor = transformers.Qwen2_5_VLProcessor(transformers.Qwen2VLImageProcessor(**shared), words, films)
    return processor, "<start><image><end>"


def _internvl() -> tuple[Any, str]:
    names = {"context_image_token": "<image>", "video_token": "<video>"}
    marks = {"start_image_token": "<start>", "end_image_token": "<end>"}
    words = tokenizer(names | marks, {IMAGE: "<image>", VIDEO: "<video>", START: "<start>", END: "<end>"})
    pictures = transformers.GotOcr2ImageProcessor(size={"height": 24, "width": 24}, crop_to_patches=True)
    films = transformers.InternVLVideoProcessor(size={"height": 24, "width": 24})
    return transformers.InternVLProcessor(pictures, words, films, image_seq_length=9), "<image>"


def _gemma3() -> tuple[Any, str]:
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    words = tokenizer(names, {IMAGE: "<image>", START: "<start>", END: "<end>"})
    pictures = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return transformers.Gemma3Processor(pictures, words, image_seq_length=16), "<start>"


PROCESSORS = {
    "llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl, "internvl": _internvl, "gemma3": _gemma3,
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """The tiny random model of a family; it says what letters it likes best."""
    model = families.fresh(family)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    model.to(torch.float32).save_pretrained(folder)
    processor, picture = PROCESSORS[family]()
    processor.chat_template = TURN.replace("PICTURE", picture).replace("FILM", picture.replace("image", "video"))
    processor.save_pretrained(folder)
    return folder


def embedded(kind: str, folder: Path) -> Path:
    """The embedded model for images or for videos, with a chat template that asks as it was taught to be asked."""
    from vtprune.evals import toys

    shutil.copytree(Path(toys.__file__).parent / kind / "checkpoint", folder)
    start, end = "<|vision_start|>", "<|vision_end|>"
    picture = "<image> " if kind == "image" else f"{start} <|image_pad|> {end} "
    turn = TURN.replace("PICTURE", picture).replace("FILM", f"{start} <|video_pad|> {end} ")
    (folder / "chat_template.jinja").write_text(f"<s> {turn} answer:")
    return folder
