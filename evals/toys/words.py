"""The word-level tokenizer of both toys, and how their checkpoints are written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")  # the first words of either vocabulary
PAD, UNK, BOS, EOS = range(len(SPECIALS))


def vocabulary(specials: Iterable[str], words: Iterable[str]) -> dict[str, int]:
    """Token ids: the special ones first, then the words in order of the alphabet."""
    return {word: i for i, word in enumerate((*specials, *sorted(set(words))))}


def encode(text: str, ids: dict[str, int]) -> list[int]:
    """Token ids of space-separated words, without the tokenizer's overhead; an unknown word is a KeyError."""
    return [ids[word] for word in text.split()]


def build_tokenizer(ids: dict[str, int], visual: dict[str, str], longest: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `ids`; `visual` names its placeholders (attribute -> token); pads on the left."""
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=visual,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )


def write(model: Any, half: Any, processor: Any, folder: Path) -> None:
    """Write model's weights by way of `half`, a fresh one that becomes bfloat16; the toys share the ids of specials."""
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    half.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=4, do_sample=False
    )
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
