"""Methods that act inside the vision tower."""
