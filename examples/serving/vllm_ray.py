"""A pruned vLLM under Ray's LLM layer: a batch job (ray.data.llm), or a server (ray.serve.llm) with `--serve`.

Not run yet: it needs a GPU, and vLLM, Ray's LLM layer (pip install 'ray[llm]') and vtprune in one environment.
Every vLLM engine finds the plug-in by its entry point; what Ray has to pass on is the recipe alone.
"""

import sys

import ray
from ray import serve

import vtprune

MODEL = "llava-hf/llava-1.5-7b-hf"
RECIPE = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))
# The document itself and no path: an engine may start on a machine that does not have the file.
ENGINE = {"mm_processor_kwargs": {"vtprune": RECIPE.to_json()}, "max_model_len": 4096}


def batch(images):
    """What the model says to each address of an image, on two engines."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=MODEL,
        engine_kwargs=ENGINE,
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai"},
        concurrency=2,
        batch_size=16,
    )

    def asked(row):
        image = {"type": "image_url", "image_url": {"url": row["item"]}}
        content = [image, {"type": "text", "text": "What is in this picture?"}]
        return {"messages": [{"role": "user", "content": content}], "sampling_params": {"max_tokens": 64}}

    return build_processor(config, preprocess=asked)(ray.data.from_items(images)).take_all()


def server():
    """OpenAI's chat API over two replicas."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": MODEL},
        engine_kwargs=ENGINE,
        deployment_config={"num_replicas": 2},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        server()
    else:
        print(batch(sys.argv[1:]))
