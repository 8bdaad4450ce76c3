"""Long texts: how much of them models read, what they learn from it, and what is said of the rest."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmmkt.client_app.client import Client
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, evaluate, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.small import TextTransformer, WordModel
from fedmmkt.client_app.models.task_model import (
    LEAST_WIDTH,
    LONGEST_TEXT,
    TEXT_BUCKETS,
    Inputs,
    TaskModel,
    TextLengths,
    compact,
    split_words,
    tokenize,
)
from fedmmkt.common.config import ClientConfig, RunConfig
from fedmmkt.server_app.app import build_strategy

SENTENCE = "the report describes a usual visit and history of this person who came in last week before"
FILLER = SENTENCE.split()


def report(length, word="", place=0):
    words = [FILLER[index % len(FILLER)] for index in range(length)]
    words[place : place + bool(word)] = [word] * bool(word)
    return " ".join(words)


def build(name):
    torch.manual_seed(0)
    return build_task_model(name, 2, 8).eval()


# ---------------------------------------------------------------------- tokens


def test_short_texts_are_padded_to_one_width_and_long_ones_to_the_longest():
    short, long = tokenize(["a cat", "dog"]), tokenize(["a cat", report(200)])
    assert short.shape == (2, LEAST_WIDTH)
    assert long.shape[1] > 1000
    assert torch.equal(long[0, :LEAST_WIDTH], short[0])
    assert not long[0, LEAST_WIDTH:].any()
    assert bool(long[1].all())


def test_as_many_words_are_read_as_is_documented():
    within = tokenize([report(LONGEST_TEXT, "feline", LONGEST_TEXT - 1), report(LONGEST_TEXT)])
    beyond = tokenize([report(LONGEST_TEXT + 1, "feline", LONGEST_TEXT), report(LONGEST_TEXT)])
    assert not torch.equal(*within)
    assert torch.equal(*beyond)


def test_a_text_without_spaces_is_many_words():
    letters = "".join(chr(0x4E00 + index) for index in range(1000))
    assert [len(word) for word in split_words(letters)] == [32] * 31 + [8]
    assert len(set(tokenize([letters])[0].tolist())) > 500
    assert split_words('The "Digit", three. -') == ["the", "digit", "three", "-"]
    assert split_words("... a") == ["", "a"]


def test_the_first_token_of_each_word_is_marked():
    plain, marked = tokenize(["one two"])[0], tokenize(["one two"], mark_words=True)[0]
    assert torch.equal(marked % TEXT_BUCKETS, plain)
    assert torch.nonzero(marked >= TEXT_BUCKETS)[:, 0].tolist() == [0, 4]  # <one>, three trigrams, <two>


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5))
def test_tokens_are_kept_small_and_read_as_they_were(values):
    tokens = torch.tensor([values])
    kept = compact(tokens)
    fits = max(map(abs, values))
    assert kept.dtype == (torch.int16 if fits < 2**15 else torch.int32 if fits < 2**31 else torch.int64)
    assert torch.equal(Inputs(None, kept)[torch.tensor([0])].tokens_BL, tokens)


# ---------------------------------------------------------------------- encoders


@pytest.mark.parametrize("name", ["text", "text-transformer", "dual"])
def test_what_is_read_of_a_text_does_not_depend_on_the_others(name):
    model = build(name)
    texts = ["a cat", report(300), "", report(90)]
    together = model.text_encoder(model.tokenize(texts))
    alone = torch.cat([model.text_encoder(model.tokenize([text])) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert bool(together.isfinite().all())


def test_a_word_is_the_mean_of_its_tokens():
    encoder = TextTransformer()
    plain, marked = tokenize(["cat dogs", "", "a"]), tokenize(["cat dogs", "", "a"], mark_words=True)
    words_BWD = encoder.word_vectors(marked, marked >= TEXT_BUCKETS, 2)
    weight = encoder.embedding.weight
    assert torch.allclose(words_BWD[0, 0], weight[plain[0, :4]].mean(0), atol=1e-6)  # <cat>, <ca, cat, at>
    assert torch.allclose(words_BWD[0, 1], weight[plain[0, 4:9]].mean(0), atol=1e-6)
    assert torch.allclose(words_BWD[2, 0], weight[plain[2, 0]], atol=1e-6)
    assert not words_BWD[1].any()
    assert not words_BWD[2, 1].any()


def test_a_word_counts_once_in_a_long_text_and_each_time_in_a_short_one():
    encoder = build("text").text_encoder
    once, twice = "report " * 8 + "visit", "report " * 8 + "visit visit"
    assert not torch.allclose(*encoder(tokenize([once, twice])), atol=1e-4)
    once, twice = (f"{report(30)} {text}" for text in (once, twice))
    assert torch.allclose(*encoder(tokenize([once, twice])), atol=1e-6)


@pytest.mark.parametrize(("name", "epochs"), [("text", 15), ("text-transformer", 12)])
def test_a_late_word_is_learned_as_well_as_an_early_one(name, epochs):
    generator = np.random.default_rng(0)
    labels_N = torch.arange(400) % 2

    def accuracy(place):
        texts = []
        for label in labels_N:
            words = [FILLER[index] for index in generator.integers(len(FILLER), size=60)]
            words[place] = ("feline", "canine")[label]
            texts.append(" ".join(words))
        torch.manual_seed(0)
        model = AlignedModel(build_task_model(name, 2, 8), 0)
        inputs, config = Inputs(None, model.task_model.tokenize(texts)), ClientConfig()
        optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
        private = PrivateSet(Inputs(None, inputs.tokens_BL[:320]), labels_N[:320])
        train(model, optimizer, private, None, config, epochs, torch.Generator().manual_seed(0))
        return evaluate(model.task_model, Inputs(None, inputs.tokens_BL[320:]), labels_N[320:])[0]

    assert min(accuracy(3), accuracy(40)) > 0.9


# ---------------------------------------------------------------------- what is said of cut texts


def test_cut_texts_are_counted():
    lengths = build("text").text_lengths([report(600), "a cat", report(512), report(513)])
    assert lengths == TextLengths([600, 2, 512, 513], 512, "words")
    assert lengths.describe_cut() == (
        "2 of 4 are longer than the 512 words that the model reads, and are cut: 89 of 1627 words are not read "
        "(the longest has 600)"
    )
    assert TextLengths([512, 3], 512, "words").describe_cut() == ""


def test_nothing_is_said_of_texts_that_an_own_tokenizer_reads():
    class Own(TaskModel):
        def tokenize(self, texts):
            return torch.ones(len(texts), 3, dtype=torch.int64)

    assert Own(2, 4, text_encoder=torch.nn.Embedding(2, 4)).text_lengths(["a"]) is None
    assert WordModel(2, 4, text_encoder=TextTransformer(4)).text_lengths(["a b"]).lengths == [2]


def test_clients_warn_once_of_texts_that_are_cut(tmp_path, tiny_run, make_grid, caplog):
    texts = [report(600 if row < 8 else 30) for row in range(40)]
    table = {"text": texts, "label": ["cat", "dog"] * 20}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "reports.parquet")
    changes = {"data__dataset": str(tmp_path / "reports.parquet"), "data__partitioner": "iid"}
    run_config = tiny_run(client__models="text,text-transformer", rounds=2, data__min_examples=1, **changes)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2))
    said = [record.getMessage() for record in caplog.records if "are cut" in record.getMessage()]
    trained = [text for text in said if "of the training texts" in text]
    tested = [text for text in said if "of the test texts" in text]
    assert sorted(text.split(":")[0] for text in trained) == ["text-0 (text)", "text-transformer-1 (text-transformer)"]
    assert sum(int(text.split(" texts, ")[1].split()[0]) for text in (*trained, tested[0])) == 8
    assert all("longer than the 512 words that the model reads" in text for text in said)


def test_prompts_of_several_batches_are_padded_alike():
    client = object.__new__(Client)
    client.reads_images, client.reads_texts, client.device = False, True, torch.device("cpu")
    client.model = AlignedModel(build("text"), 0)
    batches = [
        SimpleNamespace(prompts=prompts, prompted_N=np.zeros(len(prompts), np.int64))
        for prompts in (["a cat", "a dog"], [report(100)])
    ]
    inputs = client.synthetic_inputs(batches)
    assert len(inputs) == 3
    assert bool((inputs.tokens_BL >= 0).all())
    assert torch.equal(inputs.tokens_BL[:, :90].long(), tokenize(["a cat", "a dog", report(100)])[:, :90])
