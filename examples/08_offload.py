"""A model whose layers lie on disk and are fetched by accelerate as they run: pruned as if it lay in memory."""

import tempfile

import torch
from accelerate import cpu_offload, disk_offload  # pip install accelerate

import vtprune
from vtprune.evals import tiny

question = tiny.questions(per_capability=1, capabilities=["color"])[0]


def logits(model: torch.nn.Module, method: str) -> tuple[torch.Tensor, vtprune.Handle]:
    inputs = processor(text=[question.prompt], images=[question.image], return_tensors="pt", add_special_tokens=False)
    with vtprune.patch(model, method, keep=0.25) as handle, torch.inference_mode():
        return model(**inputs).logits, handle


for method in ("divprune", "fastv"):
    model, processor = tiny.load()
    wanted, _ = logits(model, method)
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        weights = {p.device.type for p in model.parameters()}
        ours, handle = logits(model, method)
        print(f"{method}, weights on {', '.join(weights)}: equal logits: {torch.equal(ours, wanted)}")
        print(handle.summary())
    model, _ = tiny.load()
    cpu_offload(model, execution_device=torch.device("cpu"))
    print(f"{method}, offloaded to memory: equal logits: {torch.equal(logits(model, method)[0], wanted)}")

# Refused: a copy of the model on each of several devices, whose hooks would find the original's modules. Nothing here
# has several devices; DataParallel over two raises UnsupportedModel, DistributedDataParallel is taken for its model.
