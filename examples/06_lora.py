"""LoRA on a pruned model: adapters learn on a quarter of the visual tokens, and the loss falls."""

import torch
from peft import LoraConfig, get_peft_model  # pip install peft

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

adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
handle = vtprune.patch(adapted, "random", keep=0.05)  # finds the model inside the adapters
optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
losses = []
for _ in range(8):
    loss = adapted(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("loss:", " ".join(f"{loss:.3f}" for loss in losses))
print(handle.summary())
handle.remove()

# Refused: checkpointing runs a layer again for its gradients, which a stage inside the LLM cannot follow.
(getattr(adapted, "activation_checkpointing_enable", None) or adapted.gradient_checkpointing_enable)()  # its old name
for method in ("fastv", "divprune"):
    with vtprune.patch(adapted, method, keep=0.25):
        try:
            print(method, "with checkpointing: loss", round(adapted(**batch, labels=labels).loss.item(), 3))
        except vtprune.UnsupportedCall as error:
            print(f"{method} is refused: {error}")
