"""Publication of a run's adapter: its model card, and the upload to a hub."""
