"""The mid model put together: a stock LLaVA of a DINOv2-small tower and SmolLM2-135M-Instruct with our adapter.

The adapter is a PEFT one: LoRA on the projections of the language model, and the projector as a whole.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import (
    BitImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.evals.toys.mid.bases import IMAGE, parts
from vtprune.evals.toys.mid.scenes import PATCH, SIDE

# Asks as the model was taught to be asked.
CHAT_TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.content is string %}{{ '\\n' + m.content }}{% else %}\
{% for c in m.content %}{% if c.type == 'image' %}<image>{% endif %}{% endfor %}\
{% for c in m.content %}{% if c.type == 'text' %}{{ '\\n' + c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{{ '\\nAnswer:' }}"""
FEATURE_LAYER = -2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that DINOv2 was trained on
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
RANK = 16


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The stock processor: pictures become 224 x 224, one `<image>` as many placeholders as there are patches."""
    images = BitImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(out: Path | None = None) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """The pretrained parts in one LLaVA, float32, with a projector that knows nothing yet; and the tokenizer."""
    tower, llm, tokenizer = parts(out)
    image: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=image,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def adapt(model: LlavaForConditionalGeneration, rank: int = RANK) -> Any:
    """The model as a PEFT one with fresh adapters; everything but these and the projector is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, modules_to_save=["multi_modal_projector"])
    return get_peft_model(model, config)


def merge(model: LlavaForConditionalGeneration, adapter: Path) -> LlavaForConditionalGeneration:
    """The model with a saved adapter merged in: a plain LLaVA again."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT asks by a name that transformers calls deprecated, whatever a caller does.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.eval()
