"""What all task models share."""

import torch

from fedmmkt.client_app.models.task_model import tokenize


def test_tokens_are_the_same_everywhere_and_forgive_case_and_punctuation():
    tokens_NL = tokenize(["The digit three.", "the DIGIT three", "", "x" * 500])
    assert torch.equal(tokens_NL[0], tokens_NL[1])
    assert not tokens_NL[2].any()
