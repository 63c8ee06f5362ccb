"""A method of one's own: a rule of one line, and a trained scorer (any nn.Module) wrapped as a method."""

from dataclasses import dataclass

import torch
from torch import nn

import vtprune
from vtprune import Assignment, Method, Visual
from vtprune.evals import tiny


@vtprune.register("norm", paper="https://example.org/your-paper", seam="pre_llm")
class Norm(Method):
    def __call__(self, v: Visual) -> Assignment:
        return Assignment(v.x.float().norm(dim=-1).topk(v.budget).indices.sort().values)


@vtprune.register("router", paper="https://example.org/your-router", seam="pre_llm")
@dataclass(frozen=True)
class Router(Method):
    scorer: nn.Module

    def __call__(self, v: Visual) -> Assignment:
        scores = self.scorer((v.x + v.text.mean(0)).float()).squeeze(-1)
        order = scores.argsort(descending=True, stable=True)[: v.budget]
        return Assignment(order.sort().values, order=order, scores=scores)


model, processor = tiny.load()
question = tiny.questions(per_capability=1, capabilities=["exist"])[0]
inputs = processor(text=[question.prompt], images=[question.image], return_tensors="pt", add_special_tokens=False)
scorer = nn.Sequential(nn.Linear(128, 32), nn.GELU(), nn.Linear(32, 1))  # torch.load your trained weights here

for method in (vtprune.create("norm"), vtprune.create("router", scorer=scorer)):
    with vtprune.patch(model, method, keep=0.25) as handle, torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        print(method.name, "kept", len(handle.last.units[0].idx), "->", processor.decode(ids[0, -3:]))
