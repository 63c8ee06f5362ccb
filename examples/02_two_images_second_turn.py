"""Two images in one prompt, then a second turn that goes on from the returned cache of pruned tokens."""

import torch

import vtprune
from vtprune.evals import tiny
from vtprune.model_adapters.cache_argument import NAME  # "cache"; before transformers 5.24 "past_key_values"

model, processor = tiny.load()
first, second = tiny.questions(per_capability=2, capabilities=["shape"])
vtprune.patch(model, "divprune", keep=0.25)

text = "<s> <image> <image> " + first.prompt.removeprefix("<s> <image> ")
turn = processor(text=[text], images=[[first.image, second.image]], return_tensors="pt", add_special_tokens=False)
out = model.generate(**turn, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
cache = out.past_key_values
print("first turn:", processor.decode(out.sequences[0, turn["input_ids"].shape[1] :], skip_special_tokens=True))

# The cache reports the length of the conversation as written, so the next turn needs no bookkeeping.
print("tokens written:", cache.get_seq_length(), " tokens stored:", cache.layers[0].keys.shape[-2])

more = processor.tokenizer("how many shapes are there ? answer:", return_tensors="pt", add_special_tokens=False)
ids = torch.cat([out.sequences, more["input_ids"]], dim=1)
reply = model.generate(input_ids=ids, **{NAME: cache}, max_new_tokens=4, do_sample=False)
print("second turn:", processor.decode(reply[0, ids.shape[1] :], skip_special_tokens=True))
