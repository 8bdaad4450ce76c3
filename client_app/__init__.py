"""The client: private data, a task model of its own, and logits as its only answer."""
