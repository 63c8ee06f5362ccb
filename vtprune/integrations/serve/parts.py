"""The parts of `transformers serve` that this package stands on; no other module of it imports them.

They are not public, so releases may change them: what is used is named in `SURFACE`, which a test reads, and an
installed transformers that lacks one is refused by name before a model is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

BASE = "transformers.cli.serving"
# Module: symbol: the members of it that are used or overridden.
SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "model_manager": {
        "ModelManager": ("_load_model", "_load_processor", "get_model_modality", "loaded_models", "shutdown"),
    },
    "chat_completion": {
        "ChatCompletionHandler": (
            "_build_chunk_sse",
            "_build_completion",
            "_build_generation_config",
            "_non_streaming",
            "chunk_to_sse",
            "get_processor_inputs_from_messages",
            "handle_request",
        ),
    },
    "utils": {
        "BaseGenerateManager": ("generate_non_streaming", "generate_streaming", "stop"),
        "DirectStreamer": ("cancel", "end", "put", "total_tokens"),
        "GenerationState": (),
        "InferenceThread": ("async_submit",),
        "Modality": (),
        "ReasoningText": (),
        "ToolCall": (),
        "build_response_parser": (),
        "get_response_template": (),
    },
}
# Set in __init__, so the class itself does not show them.
OF_INSTANCES = {("ModelManager", "loaded_models"), ("DirectStreamer", "total_tokens")}


def missing() -> list[str]:
    """The symbols of `SURFACE` that the installed transformers lacks, as dotted names."""
    found = []
    for module, symbols in SURFACE.items():
        try:
            loaded: Any = import_module(f"{BASE}.{module}")
        except ImportError:
            found.append(f"{BASE}.{module}")
            continue
        for symbol, members in symbols.items():
            part = getattr(loaded, symbol, None)
            names = [symbol] if part is None else []
            for member in members if part is not None else ():
                if (symbol, member) in OF_INSTANCES:
                    there = f"self.{member}" in inspect.getsource(getattr(part, "__init__"))  # noqa: B009
                else:
                    there = hasattr(part, member)
                names += [] if there else [f"{symbol}.{member}"]
            found += [f"{BASE}.{module}.{name}" for name in names]
    return found


def check() -> None:
    """Raise ImportError where parts of the installed transformers are missing."""
    lacking = missing()
    if lacking:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} lacks what vtprune serve stands on ({', '.join(lacking)}): "
            "install a release between 5.17 and 5.24, or a newer vtprune"
        )


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a function of the installed transformers has; 5.17 knows no `tools` in some places."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


check()

from transformers.cli.serving.chat_completion import ChatCompletionHandler  # noqa: E402
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402
from transformers.cli.serving.utils import (  # noqa: E402
    BaseGenerateManager,
    DirectStreamer,
    GenerationState,
    InferenceThread,
    Modality,
    ReasoningText,
    ToolCall,
    build_response_parser,
    get_response_template,
)

__all__ = [
    "BaseGenerateManager", "ChatCompletionHandler", "DirectStreamer", "GenerationState", "InferenceThread", "Modality",
    "ModelManager", "ReasoningText", "ToolCall", "accepted", "build_response_parser", "check",
    "get_response_template", "missing",
]  # fmt: skip
