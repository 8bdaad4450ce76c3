"""What server and clients share: configuration, messages, images, datasets and files."""
