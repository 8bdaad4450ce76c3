"""The private data of a client, and a decoded copy of it."""
