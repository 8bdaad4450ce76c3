"""The server: the text-to-image model, and the strategy that lets it and the clients teach each other."""
