"""The built-in text-to-image model, a small Stable Diffusion pipeline of typeset digits, and a part of MNIST.

The model's weights are in ``starter/model``. ``DiffusionPipeline.from_pretrained`` loads them.
``python -m fedmmkt.starter.train`` trains the model again. ``python -m fedmmkt.starter.mnist`` writes
``starter/mnist.parquet`` again, which ``data.dataset="mnist"`` reads.
"""
