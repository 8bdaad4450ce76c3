"""Tiny text-to-image pipelines of diffusers' real classes, with random weights, saved as folders."""

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests import ROOT

STARTER = ROOT / "starter" / "model"
SENTENCE = "the a digit number picture of image an zero one two three four five six seven eight nine"
WORDS = SENTENCE.split()


def clip_tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(STARTER / "tokenizer")


def word_tokenizer():
    """Tokenize words, as stands for the sentence pieces of T5 and Gemma."""
    special = ("<pad>", "</s>", "<unk>", "<bos>")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate((*special, *WORDS))}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def clip_text(projected=False):
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return model(config)


def t5_text():
    config = transformers.T5Config(
        vocab_size=len(WORDS) + 4, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config)


def autoencoder(**changes):
    settings = {
        "block_out_channels": (16, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**settings | changes)


def unet(**changes):
    settings = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, "norm_num_groups": 8,
        "cross_attention_dim": 32,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**settings | changes)


def stable_diffusion(prediction="epsilon", latent_channels=4, sample_size=8):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        autoencoder(latent_channels=latent_channels), clip_text(), clip_tokenizer(),
        unet(in_channels=latent_channels, out_channels=latent_channels, sample_size=sample_size), scheduler, None,
        None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl():
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(), clip_text(), clip_text(projected=True), clip_tokenizer(), clip_tokenizer(),
        unet(cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
             projection_class_embeddings_input_dim=80, use_linear_projection=True),
        diffusers.EulerDiscreteScheduler(steps_offset=1), add_watermarker=False,
    )  # fmt: skip


def playground():
    """Make a Stable Diffusion XL as Playground v2.5 is: latents by channel, trained as EDM."""
    pipeline = stable_diffusion_xl()
    pipeline.vae.register_to_config(
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155], latents_std=[8.4927, 5.9022, 6.5498, 5.2299], scaling_factor=0.5
    )
    pipeline.register_modules(scheduler=diffusers.EDMDPMSolverMultistepScheduler())
    return pipeline


def stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip_text(projected=True),
        clip_tokenizer(), clip_text(projected=True), clip_tokenizer(), t5_text(), word_tokenizer(),
    )  # fmt: skip


def pixart(kind="alpha"):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    pipeline = {"alpha": diffusers.PixArtAlphaPipeline, "sigma": diffusers.PixArtSigmaPipeline}[kind]
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline(word_tokenizer(), t5_text(), autoencoder(), transformer, scheduler)


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    text = transformers.Gemma2Model(transformers.Gemma2Config(
        vocab_size=len(WORDS) + 4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    ))  # fmt: skip
    return diffusers.SanaPipeline(
        word_tokenizer(), text, vae, transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    )


PIPELINES = {
    "sd-epsilon": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "playground": playground,
    "sd3": stable_diffusion_3,
    "pixart-alpha": pixart,
    "pixart-sigma": lambda: pixart("sigma"),
    "sana": sana,
}


def save(kind, folder):
    """Save a tiny pipeline with random weights."""
    torch.manual_seed(0)
    PIPELINES[kind]().save_pretrained(folder)
    return str(folder)
