"""The built-in text-to-image model: a small Stable Diffusion pipeline of typeset digits.

Its weights lie in ``starter/model`` and load with plain ``DiffusionPipeline.from_pretrained``.
``python -m starter.train`` makes them anew.
"""
