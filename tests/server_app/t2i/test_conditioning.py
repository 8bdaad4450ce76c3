"""Prompts are encoded once, as far as the memory for them goes."""

import torch

from fedmmkt.common.config import T2IConfig
from fedmmkt.server_app.t2i import conditioning
from fedmmkt.server_app.t2i.conditioning import PromptEncoder
from fedmmkt.server_app.t2i.generator import Generator
from tests.server_app.t2i import variations

PROMPTS = ["the digit one", "the digit two", "the digit one", "the digit three"]


def counting_encoder(monkeypatch):
    generator = Generator(T2IConfig(inference_steps=1), 0)
    encoded, encode = [], generator.family.encode
    monkeypatch.setattr(generator.family, "encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    return generator, encoded, encode


def test_a_round_encodes_each_prompt_once(monkeypatch):
    generator, encoded, encode = counting_encoder(monkeypatch)

    made = generator.generate(PROMPTS, range(4), 1.5)
    variations(generator, made, PROMPTS, range(4), 1.5, explore_strength=0.9)
    generator.encoder.text_embeddings(PROMPTS[:2])
    generator.adapt(made, torch.ones(4), 2, 0)
    rows, _ = generator.encoder.conditioning(PROMPTS)(torch.tensor([3, 0, 2]))

    assert encoded == ["the digit one", "the digit two", "the digit three"]
    plain = encode(["the digit three", "the digit one", "the digit one"])
    assert torch.equal(rows["prompt_embeds"], plain["prompt_embeds"])


def test_prompts_beyond_the_memory_are_encoded_again_when_they_are_due(monkeypatch):
    generator, encoded, encode = counting_encoder(monkeypatch)
    one_prompt = generator.encoder.empty["prompt_embeds"].numel() * 4
    monkeypatch.setattr(conditioning, "KEPT_BYTES", 2 * one_prompt)

    of_samples = generator.encoder.conditioning(PROMPTS)
    parts = [of_samples(torch.tensor([index]))[0]["prompt_embeds"] for index in range(4)]

    assert torch.equal(torch.cat(parts), encode(PROMPTS)["prompt_embeds"])
    assert len(generator.encoder._kept) == 2
    assert len(encoded) > 3


def test_a_family_that_pads_to_the_longest_prompt_of_a_call_can_be_read_in_any_order(monkeypatch):
    generator, _, encode = counting_encoder(monkeypatch)

    def padded(prompts):
        longest = max(len(prompt.split()) for prompt in prompts)
        return {name: tensor[:, :longest] for name, tensor in encode(prompts).items()}

    monkeypatch.setattr(generator.family, "encode", padded)
    encoder = PromptEncoder(generator.family)
    encoder.conditioning(["one"])
    rows, _ = encoder.conditioning(["one", "the digit two"])(torch.tensor([0, 1]))

    assert rows["prompt_embeds"].shape[:2] == (2, 3)
