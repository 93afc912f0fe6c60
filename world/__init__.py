"""The built-in world: data to learn from without a download, and the one definition of what is true in it."""
