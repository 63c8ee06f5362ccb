"""vLLM with pruned images: `vllm serve MODEL --mm-processor-kwargs '{"vtprune": "recipe.json"}'`.

The plug-in is found by its entry point and does nothing unless an engine is given a recipe: a path, or the document
itself. A request may name a budget of its own: `"mm_processor_kwargs": {"keep_ratio": 0.25}`, or `keep_tokens`; the
server takes it if started with `--trust-request-mm-kwargs`. Where that is left out the recipe's holds.

>>> llm = vllm.LLM("llava-hf/llava-1.5-7b-hf", mm_processor_kwargs={"vtprune": "recipe.json"})

Tested on vLLM's CPU runner (V1); not run: a GPU, several devices, runner V2.
"""

import logging

KEY = "vtprune"  # the option of an engine that holds its recipe


def register() -> None:
    """Make the pruned models known to vLLM, which calls this in each of its processes; safe to call again.

    In a vLLM that lacks what the plug-in stands on it says so and does nothing, so that engines without a recipe run.
    """
    try:
        from .architectures import register_all

        register_all()
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.vtprune").error("vtprune cannot prune in this vLLM, and ignores recipes: %s", error)
