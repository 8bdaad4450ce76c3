"""Tiny models of transformers' real classes, saved as folders of its own form."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SENTENCE = "the a digit number picture of image an zero one two three four five six seven eight nine hand drawn by"
WORDS = SENTENCE.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer(**options):
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate((*SPECIAL, *WORDS))}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **(special | options))


def image_config(kind="vit", labels=3):
    if kind == "resnet":
        return transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=labels
        )
    size = {"image_size": 24, "patch_size": 8, "hidden_size": 16}
    return transformers.ViTConfig(**size, **LAYER, num_labels=labels)


def text_config(kind="bert", labels=3):
    vocabulary = len(SPECIAL) + len(WORDS)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=labels, eos_token_id=3
        )
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=vocabulary, max_position_embeddings=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32,
            num_labels=labels,
        )  # fmt: skip
    return transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=16, max_position_embeddings=16, **LAYER, num_labels=labels
    )


def dual_config(kind="clip"):
    text = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "max_position_embeddings": 16, **LAYER}
    vision = {"image_size": 24, "patch_size": 8, "hidden_size": 16, **LAYER}
    if kind == "siglip":
        return transformers.SiglipConfig(text_config=text, vision_config=vision)
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return transformers.CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=12)


def save(folder, config, weights=True, **processor):
    """Save a model with random weights, or its configuration alone, and what belongs to it."""
    name = type(config).__name__
    if weights:
        loader = transformers.AutoModel
        if name in ("ViTConfig", "ResNetConfig"):
            loader = transformers.AutoModelForImageClassification
        elif name not in ("CLIPConfig", "SiglipConfig"):
            loader = transformers.AutoModelForSequenceClassification
        loader.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    if name not in ("ViTConfig", "ResNetConfig"):
        tokenizer().save_pretrained(folder)
    if processor:
        transformers.ViTImageProcessor(**processor).save_pretrained(folder)
    return f"transformers:{folder}"
