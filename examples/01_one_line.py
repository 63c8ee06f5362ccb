"""One line prunes a model: a quarter of the visual tokens, the same generate call, and everything undone at the end."""

import vtprune
from vtprune.evals import tiny

model, processor = tiny.load()
question = tiny.questions(per_capability=1, capabilities=["color"])[0]
inputs = processor(text=[question.prompt], images=[question.image], return_tensors="pt", add_special_tokens=False)


def answer() -> str:
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("asked:     ", question.prompt, f"({question.answer})")
print("all tokens:", answer())

with vtprune.patch(model, "divprune", keep=0.25) as handle:
    print("a quarter: ", answer())
    image = handle.last.units[0]
    print(f"kept {len(image.idx)} of {image.n} visual tokens: {image.idx.tolist()}")

print("unpatched: ", answer())
