"""The T2I model. Some tests vary samples as a whole, which a run does part by part."""

from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples


def variations(generator: Generator, parents: Samples, *how: object, **settings: object) -> Samples:
    """Return all variations of samples; ``how`` is what `Generator.vary_parts` is told after the parents.

    ``settings`` change those of the generator for this once.
    """
    before = generator.config
    generator.config = before.model_copy(update=settings)
    try:
        return Samples.gather(generator.vary_parts(parents.latents_NCHW, *how), len(parents))
    finally:
        generator.config = before
