"""The built-in world: training data without a download, and the single definition of what is true in it."""
