"""The text-to-image model: generation, the supported model families, and the LoRA adapter."""
