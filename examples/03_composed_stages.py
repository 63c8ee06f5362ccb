"""Stages add up: half of the tokens by diversity before the LLM, then a tenth by attention from decoder layer 2 on."""

import vtprune
from vtprune import Stage
from vtprune.evals import tiny

model, processor = tiny.load()
question = tiny.questions(per_capability=1, capabilities=["ocr"])[0]
inputs = processor(text=[question.prompt], images=[question.image], return_tensors="pt", add_special_tokens=False)

stages = [
    Stage("llm", vtprune.create("divprune"), keep=0.5),
    Stage(2, vtprune.create("fastv"), keep=0.1),  # a share of the tokens the image has unpruned
]
with vtprune.patch(model, stages) as handle:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    print(handle)
    print("tokens each decoder layer ran on:", handle.last.lengths)
    print("tokens each layer stores:        ", [layer.keys.shape[-2] for layer in out.past_key_values.layers])
    text = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{question.prompt} {text} (right: {question.answer})")
