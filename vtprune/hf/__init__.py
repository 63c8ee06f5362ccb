"""The Hugging Face engine: what hooks read and change while a model of transformers or timm runs."""
