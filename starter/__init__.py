"""The built-in text-to-image model: a small Stable Diffusion pipeline of typeset digits.

Its weights are in ``starter/model``. ``DiffusionPipeline.from_pretrained`` loads them.
``python -m fedmmkt.starter.train`` trains the model again.
"""
