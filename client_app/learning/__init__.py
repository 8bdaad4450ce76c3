"""The training of a client: losses, the training loop, and an optimizer that is fast to import."""
