"""LoRA on a pruned model: adapters learn on a quarter of the visual tokens, and the loss falls."""

import torch
from peft import LoraConfig, inject_adapter_in_model  # pip install peft

import vtprune
from vtprune.evals import tiny

torch.manual_seed(0)
model, processor = tiny.load()
asked = tiny.questions(per_capability=4, capabilities=["color"])
texts = [f"{q.prompt} {q.answer}" for q in asked]
batch = processor(
    text=texts, images=[[q.image] for q in asked], return_tensors="pt", padding=True, add_special_tokens=False
)
labels = batch["input_ids"].clone()
labels[:, :-1] = -100  # only the answer counts, and the processor pads on the left

model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model)
handle = vtprune.patch(model.train(), "random", keep=0.05)  # as well of a PeftModel, which holds the model
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
losses = []
for _ in range(8):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("loss:", " ".join(f"{loss:.3f}" for loss in losses))
print(handle.summary())
handle.remove()

# Refused: checkpointing runs a layer again for its gradients, which a stage inside the LLM cannot follow.
(getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()  # its old name
for method in ("fastv", "divprune"):
    with vtprune.patch(model, method, keep=0.25):
        try:
            print(method, "with checkpointing: loss", round(model(**batch, labels=labels).loss.item(), 3))
        except vtprune.UnsupportedCall as error:
            print(f"{method} is refused: {error}")
