"""Which pictures of a run show real images."""

import numpy as np
import pytest

from fedmmkt.common.config import RunConfig, T2IConfig
from fedmmkt.server_app.prompts import build_prompt_source
from fedmmkt.server_app.record.evaluation_images import EvaluationImages
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.generator import Generator

CLASSES = ("zero", "one")


@pytest.mark.parametrize("shown", [True, False])
def test_real_images_are_kept_only_where_the_run_may_show_them(shown, tmp_path):
    t2i = T2IConfig(evaluation_samples=12, inference_steps=1)
    config = RunConfig(t2i=t2i, show_real_images=shown)
    labels_N = np.arange(12) % 2
    pixels_NHWC = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
    judge = Judge(pixels_NHWC, labels_N, pixels_NHWC, labels_N, 2, seed=0)
    folder, generator = RunFolder.create(tmp_path / "run"), Generator(t2i, seed=0)
    folder.images.mkdir()
    folder.real_images.touch()  # As of a run that goes on.
    images = EvaluationImages(config, CLASSES, folder, generator, build_prompt_source(t2i, CLASSES), judge)

    images.measure(0, generator.adapter.state())

    assert folder.picture(0).exists()
    assert folder.real_images.exists() == shown
