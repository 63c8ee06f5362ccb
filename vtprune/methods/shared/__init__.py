"""What several methods use, and algorithms that have a name of their own; old paths such as `methods.clips` go on."""
