"""A server for one pruned model that speaks OpenAI's chat API, on the parts of `transformers serve`.

    served = ServedModel("llava-hf/llava-1.5-7b-hf", vtprune.Recipe.load("recipe.json"))
    app = create_app(served, limits=Limits(new_tokens=256))

`vtprune serve` runs such an application; it needs the extra `vtprune[serve]`.
"""

from vtprune.integrations.serve.app import create_app
from vtprune.integrations.serve.limits import Limits
from vtprune.integrations.serve.model import ServedModel

__all__ = ["Limits", "ServedModel", "create_app"]
