"""Methods that act between the projector and the LLM."""
