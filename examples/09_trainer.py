"""The Trainer of transformers on a pruned model: LoRA adapters learn on a twentieth of the visual tokens."""

import tempfile

from peft import LoraConfig, inject_adapter_in_model  # pip install peft accelerate
from transformers import Trainer, TrainingArguments

import vtprune
from vtprune.evals import tiny

model, processor = tiny.load()
questions = tiny.questions(per_capability=8, capabilities=["color"])


def batch_of(asked: list) -> dict:
    texts = [f"{q.prompt} {q.answer}" for q in asked]
    batch = processor(
        text=texts, images=[[q.image] for q in asked], return_tensors="pt", padding=True, add_special_tokens=False
    )
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100  # only the answer counts, and the processor pads on the left
    return {**batch, "labels": labels}


model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model)
with tempfile.TemporaryDirectory() as folder, vtprune.patch(model, "random", keep=0.05) as handle:
    arguments = TrainingArguments(
        folder, max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, prediction_loss_only=True,
        remove_unused_columns=False,  # batch_of makes the columns, and of whole questions
        use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=questions, eval_dataset=questions, data_collator=batch_of)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss: {before:.3f} {trainer.evaluate()['eval_loss']:.3f}")
    print(handle.summary())
