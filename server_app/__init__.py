"""The server app: the text-to-image model, and the strategy with which it and the clients teach each other."""
