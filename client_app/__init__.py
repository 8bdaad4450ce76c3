"""The client app: it trains its own task model on private data and answers the server with logits."""
