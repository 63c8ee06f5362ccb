"""A pipeline of transformers that answers a batch, pruned: patch takes the pipeline for the model in it."""

from transformers import pipeline

import vtprune
from vtprune.evals import tiny

model, processor = tiny.load()
processor.tokenizer.padding_side = "left"  # as for every batch that is generated from
pipe = pipeline("image-text-to-text", model=model, processor=processor)
asked = tiny.questions(per_capability=4, capabilities=["color"])
images, texts = [[q.image] for q in asked], [q.prompt for q in asked]


def answers() -> list[str]:
    options = {"add_special_tokens": False, "padding": True}
    found = pipe(images=images, text=texts, batch_size=4, max_new_tokens=3, return_full_text=False, **options)
    return [one["generated_text"].strip() for group in found for one in (group if isinstance(group, list) else [group])]


print("right:    ", [q.answer for q in asked])
print("dense:    ", answers())
with vtprune.patch(pipe, "divprune", keep=0.25) as handle:
    print("a quarter:", answers())
    print(handle.summary())

# Refused: a patch is of one model. A second one, of the model or of the pipeline, has to say that it adds stages.
with vtprune.patch(model, "divprune", keep=0.5):
    try:
        vtprune.patch(pipe, "fastv", keep=0.25)
    except ValueError as error:
        print("refused:", error)
