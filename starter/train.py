"""Train the starter text-to-image model from scratch on typeset digits, on a laptop's CPU.

``python -m fedmmkt.starter.train`` renders digits in the fonts of pinned packages (the ``starter`` extra), trains
an autoencoder and then a latent diffusion model with its text encoder, and saves a Stable Diffusion
pipeline in half precision. It uses no handwritten digits; only clients have those.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from tqdm import tqdm

from fedmmkt.common.dataset_files import DIGIT_NAMES
from fedmmkt.starter.pretraining import Architecture, build_tokenizer, draw_samples, pretrain, save

FONT_PACKAGES = (
    "font_amatic_sc",
    "font_caladea",
    "font_fredoka_one",
    "font_hanken_grotesk",
    "font_intuitive",
    "font_lato",
    "font_source_sans_pro",
    "font_source_serif_pro",
)
CAPTIONS = (
    "{}",
    "the digit {}",
    "the number {}",
    "a picture of the digit {}",
    "a picture of the number {}",
    "an image of a {}",
    "a printed {}",
    "a digit {} on a dark background",
)
IMAGE_SIZE = 32
TOKENS = 16  # tokens per caption
MODEL_FOLDER = Path(__file__).parent / "model"


def font_files() -> list[Path]:
    """List the font files of the pinned font packages, in a fixed order."""
    files: list[Path] = []
    for package in FONT_PACKAGES:
        folder = Path(str(resources.files(package))) / "files"
        files += sorted(path for path in folder.iterdir() if path.suffix in {".ttf", ".otf"})
    return files


def render_digit(digit: int, font_path: Path, rng: np.random.Generator) -> np.ndarray:
    """Typeset one digit, white on black, with random size, position, angle, shear, blur and brightness.

    Returns
    -------
    numpy.ndarray
        uint8, height x width.
    """
    side = 128
    canvas = Image.new("L", (side, side))
    font = ImageFont.truetype(str(font_path), 96)
    ImageDraw.Draw(canvas).text((side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm")
    left, top, right, bottom = canvas.getbbox() or (0, 0, side, side)
    scale_y = rng.uniform(0.55, 1.05) * side / (bottom - top)
    scale_x = scale_y * rng.uniform(0.75, 1.35)
    shift_x, shift_y = rng.uniform(-0.08, 0.08, size=2) * side
    shear = rng.uniform(-0.3, 0.3)
    # PIL maps output to input: x_in = a x + b y + c, y_in = d x + e y + f.
    a, b, e = 1 / scale_x, shear / scale_x, 1 / scale_y
    c = (left + right) / 2 - a * (side / 2 + shift_x) - b * side / 2
    f = (top + bottom) / 2 - e * (side / 2 + shift_y)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (a, b, c, 0, e, f), Image.Resampling.BILINEAR)
    canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 6))))
    pixels = np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float32)
    return (pixels / pixels.max() * rng.uniform(160, 255)).astype(np.uint8)


def typeset_dataset(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Render ``count`` captioned digits, equally many of each class.

    Returns
    -------
    images_NCHW : torch.Tensor
        float32 in [-1, 1], three equal channels.
    captions : list of str
    """
    rng = np.random.default_rng(seed)
    fonts = font_files()
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    captions = []
    for index in tqdm(range(count), desc="rendering", mininterval=2):
        digit = index % 10
        images[index] = render_digit(digit, fonts[rng.integers(len(fonts))], rng)
        name = DIGIT_NAMES[digit] if rng.random() < 0.7 else str(digit)
        captions.append(CAPTIONS[rng.integers(len(CAPTIONS))].format(name))
    images_NCHW = torch.from_numpy(images).float().div(127.5).sub(1)[:, None].repeat(1, 3, 1, 1)
    return images_NCHW, captions


def train_starter(images: int, autoencoder_steps: int, diffusion_steps: int, seed: int) -> StableDiffusionPipeline:
    """Train the whole pipeline; the time depends on the numbers of images and steps."""
    torch.manual_seed(seed)
    images_NCHW, captions = typeset_dataset(images, seed)
    names = [*DIGIT_NAMES, *map(str, range(10))]
    tokenizer = build_tokenizer([caption.format(name) for caption in CAPTIONS for name in names], TOKENS)
    return pretrain(images_NCHW, captions, tokenizer, Architecture(), autoencoder_steps, diffusion_steps, seed)


def main() -> None:
    """Parse the command line, train, save the model, and save a grid of samples beside it."""
    parser = argparse.ArgumentParser(prog="python -m fedmmkt.starter.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=12_000, help="typeset images to render")
    parser.add_argument("--autoencoder-steps", type=int, default=1_800)
    parser.add_argument("--diffusion-steps", type=int, default=2_900)
    arguments = parser.parse_args()
    pipeline = train_starter(arguments.images, arguments.autoencoder_steps, arguments.diffusion_steps, arguments.seed)
    save(pipeline, arguments.out)
    draw_samples(arguments.out, [f"the digit {word}" for word in DIGIT_NAMES])
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"saved {arguments.out.resolve()} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
