"""The built-in world: training data that is generated rather than downloaded, and a single source of truth about it."""
