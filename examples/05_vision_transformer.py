"""A plain vision transformer: ToMe merges eight tokens a block; any timm, open_clip or transformers ViT would do."""

import torch
from transformers import Dinov2Config, Dinov2Model

import vtprune

model = Dinov2Model(Dinov2Config(hidden_size=64, num_attention_heads=2, num_hidden_layers=6, image_size=224)).eval()
images = torch.randn(2, 3, 224, 224)

with torch.inference_mode(), vtprune.patch(model, "tome", r=8) as handle:
    rows = model(images).last_hidden_state
    print(handle)
    print("rows behind every block:", handle.last.lengths)
    print("rows put out:", tuple(rows.shape), "and for a dense head:", tuple(handle.last.unmerge(rows).shape))
print("after removal:", tuple(model(images).last_hidden_state.shape))
