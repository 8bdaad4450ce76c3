"""Train the starter text-to-image model on typeset digits, from nothing, on a laptop's CPU.

``python -m starter.train`` renders digits in the fonts of pinned packages (the ``starter`` extra), trains
an autoencoder and then a latent diffusion model with its text encoder, and saves a Stable Diffusion
pipeline in half precision. No handwritten digit is seen: those stay with the clients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.dataset_files import DIGIT_NAMES

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
MODEL_FOLDER = Path(__file__).parent / "model"


def font_files() -> list[Path]:
    """List the font files of the pinned font packages, in a fixed order."""
    files: list[Path] = []
    for package in FONT_PACKAGES:
        folder = Path(str(resources.files(package))) / "files"
        files += sorted(path for path in folder.iterdir() if path.suffix in {".ttf", ".otf"})
    return files


def render_digit(digit: int, font_path: Path, rng: np.random.Generator) -> np.ndarray:
    """Typeset one digit, white on black, in random size, place, angle, shear and softness.

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
    """Render ``count`` captioned digits, as many of each class.

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


def build_tokenizer() -> CLIPTokenizer:
    """Train a byte-pair tokenizer of CLIP's kind on every caption there can be."""
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,-'"),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    names = [*DIGIT_NAMES, *map(str, range(10))]
    bpe.train_from_iterator([caption.format(name) for caption in CAPTIONS for name in names], trainer)
    content = json.loads(bpe.to_str())["model"]
    vocabulary = dict(content["vocab"])
    for symbol in "abcdefghijklmnopqrstuvwxyz0123456789.,-'":
        vocabulary.setdefault(f"{symbol}</w>", len(vocabulary))
    merges = [tuple(pair) for pair in content["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` index batches, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    start = 0
    for _ in range(steps):
        if start + size > count:
            order, start = torch.randperm(count, generator=generator), 0
        yield order[start : start + size]
        start += size


def train_autoencoder(images_NCHW: Tensor, steps: int, seed: int) -> AutoencoderKL:
    """Train the autoencoder on L1 and a small KL term, and set its latent scale to unit variance."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(batches(len(images_NCHW), 32, steps, seed), total=steps, desc="autoencoder", mininterval=2)
    for index in progress:
        batch = images_NCHW[index]
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(restored, batch) + F.mse_loss(restored, batch) + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    latents_NCHW = encode(vae.eval(), images_NCHW[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents_NCHW.std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images_NCHW: Tensor) -> Tensor:
    """Encode images to latents (posterior means, unscaled)."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images_NCHW.split(256)])


def train_diffusion(
    latents_NCHW: Tensor, captions: list[str], tokenizer: CLIPTokenizer, steps: int, seed: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train U-Net and text encoder together on the v-prediction loss, with 10% empty captions."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    tokens_NL = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    empty_L = tokenizer("", padding="max_length", max_length=16, return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(batches(len(latents_NCHW), 64, steps, seed), total=steps, desc="diffusion", mininterval=2)
    for index in progress:
        latents = latents_NCHW[index]
        dropped_N1 = torch.rand(len(index), 1, generator=generator) < 0.1
        states = text_encoder(torch.where(dropped_N1, empty_L, tokens_NL[index])).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator)
        timesteps_N = torch.randint(1000, (len(index),), generator=generator)
        predicted = unet(noise_scheduler.add_noise(latents, noise, timesteps_N), timesteps_N, states).sample
        loss = F.mse_loss(predicted, noise_scheduler.get_velocity(latents, noise, timesteps_N))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(parameters)
    return unet.eval(), text_encoder.eval()


def train_starter(images: int, autoencoder_steps: int, diffusion_steps: int, seed: int) -> StableDiffusionPipeline:
    """Train the whole pipeline; the sizes set the time it takes."""
    torch.manual_seed(seed)
    images_NCHW, captions = typeset_dataset(images, seed)
    tokenizer = build_tokenizer()
    vae = train_autoencoder(images_NCHW, autoencoder_steps, seed)
    latents_NCHW = encode(vae, images_NCHW) * vae.config.scaling_factor
    unet, text_encoder = train_diffusion(latents_NCHW, captions, tokenizer, diffusion_steps, seed)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in half precision; transformers is told to compute in single, as diffusers does by default."""
    pipeline.to(torch.float16).save_pretrained(folder)
    config_file = folder / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def draw_samples(folder: Path) -> None:
    """Draw eight samples of each digit beside the saved model, generated as any user would."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"the digit {word}" for word in DIGIT_NAMES for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, num_inference_steps=12, guidance_scale=3.0, generator=generator).images
    make_image_grid(images, rows=len(DIGIT_NAMES), cols=8).save(folder / "samples.png")


def main() -> None:
    """Parse the command line, train, save, and draw a sheet of samples beside the model."""
    parser = argparse.ArgumentParser(prog="python -m starter.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=12_000, help="typeset images to render")
    parser.add_argument("--autoencoder-steps", type=int, default=1_800)
    parser.add_argument("--diffusion-steps", type=int, default=2_900)
    arguments = parser.parse_args()
    pipeline = train_starter(arguments.images, arguments.autoencoder_steps, arguments.diffusion_steps, arguments.seed)
    save(pipeline, arguments.out)
    draw_samples(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"saved {arguments.out.resolve()} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
