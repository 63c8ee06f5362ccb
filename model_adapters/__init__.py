"""Which module of a Hugging Face model is what; no pruning maths."""
