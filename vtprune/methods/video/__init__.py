"""Rules that look at a video before the LLM: what changes from frame to frame, and what stays."""
