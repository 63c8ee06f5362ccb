"""What transformers calls the cache among the arguments and outputs of a model."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# Renamed in transformers 5.24.
NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def renamed(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with its cache under the name of today, as transformers itself takes the old one."""
    if NAME in call or "past_key_values" not in call:
        return call
    return {NAME if key == "past_key_values" else key: value for key, value in call.items()}
