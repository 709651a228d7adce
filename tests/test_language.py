"""Texts as rows, padding that counts in nothing, and the models that read words and sub-words."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedinit.data import DATASETS
from fedinit.data.clients import Choice
from fedinit.data.federated_dataset import IGNORED
from fedinit.data.shakespeare import shakespeare_texts
from fedinit.data.text import WORD_CHARACTERS, TextDataset, Texts, split_words
from fedinit.errors import RequestError
from fedinit.measurements.evaluation import correct_by_row, evaluate, per_example
from fedinit.models import MODELS
from fedinit.models.language import CharLM
from fedinit.results import RunFolder

TINY = {"layers": 2, "heads": 2, "width": 16, "positions": 32}


def of(texts: dict[str, list[str]]) -> TextDataset:
    """A source with these texts of these authors, and no split of its own."""
    owners = np.array([owner for owner, own in texts.items() for _ in own])
    found = Texts(owners, [text for own in texts.values() for text in own])
    return TextDataset(lambda _data_dir, choice: (found.of(choice), None))


def spelled(word: str) -> list[int]:
    codes = [1, *word.encode(), 2]
    return codes + [0] * (WORD_CHARACTERS - len(codes))


def test_words_as_rows():
    """Of 'The cat sat. the dog.' the most frequent are '.' and 'the': numbers 3 and 4, after
    unknown 0, start 1 and end 2. In rows of three: start the cat | sat . the | dog . (padding)."""
    texts = {"a": ["The cat sat. the dog."], "b": ["."]}
    data = of(texts)(length=3, vocabulary=2, test_share=0.5)
    if len(data.inputs) == 1:  # a was held out: the vocabulary would be b's alone
        data = of(texts)(length=3, vocabulary=2, test_share=0.5, seed=1)
    rows = [["<s>", "the", "cat"], ["sat", ".", "the"], ["dog", "."]]
    expected = [[spelled(word) for word in row] for row in rows]
    expected[2].append([0] * WORD_CHARACTERS)
    assert data.inputs.tolist() == expected
    assert data.targets.tolist() == [[4, 0, 0], [3, 4, 0], [3, 2, IGNORED]]
    assert data.num_classes == 5
    assert data.test_targets.tolist() == [[3, 2, IGNORED]]
    assert list(data.owners) == ["a"]


def test_words_are_split_at_punctuation_and_tags_stay_whole():
    text = "I don't KNOW <url>, do you?"
    assert split_words(text) == ["i", "don't", "know", "<url>", ",", "do", "you", "?"]


def test_characters_as_rows():
    """Windows of two: of 'ab' the start mark and an unknown one before it predict 'a', then 'b'."""
    vocabulary = DATASETS["shakespeare"](window=2, examples_per_client=1, test_examples=1)
    numbers = json.loads(
        (Path(__file__).parents[1] / "fedinit/assets/charrnn-vocab.json").read_text()
    )
    a, b, start = numbers["a"], numbers["b"], numbers["<s>"]
    data = of({"x": ["ab", "b"], "y": ["a"], "z": ["a"]})(
        tokens="characters", length=2, test_share=0.34, min_examples=1
    )
    by_target = {
        (tuple(row), target)
        for row, target in zip(data.inputs.tolist(), data.targets.tolist(), strict=True)
    }
    everything = {((0, start), a), ((start, a), b), ((0, start), b)}
    assert by_target <= everything
    assert data.num_classes == vocabulary.num_classes
    assert data.labels == vocabulary.labels


def test_a_vocabulary_of_ones_own_and_its_name(tmp_path):
    """The same words in the same order are the same labels, whoever speaks them."""
    (tmp_path / "words.txt").write_text("the\ncat\n")
    one = of({"a": ["the cat"], "b": ["cat"]})(vocabulary=str(tmp_path / "words.txt"))
    other = of({"a": ["dog dog"], "b": ["dog"]})(vocabulary=str(tmp_path / "words.txt"))
    own = of({"a": ["dog dog"], "b": ["dog"]})(vocabulary=2)
    assert one.labels == other.labels != own.labels
    assert other.targets.tolist()[0][:2] in ([0, 0], [0, 2])
    (tmp_path / "lines.txt").write_text("The\nice cream\n\n Cat \n")
    lines = of({"a": ["the cat"], "b": ["cat"]})(vocabulary=str(tmp_path / "lines.txt"))
    assert lines.num_classes == one.num_classes + 1  # one more line
    with pytest.raises(RequestError, match=r"vocabulary: /none: "):
        of({"a": ["x"], "b": ["y"]})(vocabulary="/none")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tokens": "word"}, "did you mean 'words'?"),
        ({"length": 0}, "length: expected a whole number from 1"),
        ({"vocabulary": -1}, "vocabulary: expected a whole number from 1"),
        ({"max_test_examples": 0}, "max_test_examples"),
        ({"tokens": "subwords", "tokenizer": "/no/such/folder"}, "tokenizer.json"),
        ({"min_examples": 9}, "no client has 9 examples"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, expected):
    with pytest.raises(RequestError) as refused:
        of({"a": ["x y"], "b": ["z"]})(**arguments)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_padding_counts_in_no_loss_and_no_accuracy():
    """Losses 1, 2 and 9 (padding): 1.5 for the row; over both rows' three targets 2."""
    targets = torch.tensor([[5, 1, IGNORED], [0, IGNORED, IGNORED]])
    losses = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    assert per_example(losses, targets).tolist() == [1.5, 3.0]
    scores = torch.zeros(2, 6, 3)
    scores[:, 1] = 1.0  # says 1 everywhere: right once
    assert correct_by_row(scores, targets).sum() == 1
    found = evaluate(torch.nn.Identity(), lambda _o, _t: losses, [(scores, targets)])
    assert found["num-examples"] == 3
    assert found["loss"] == pytest.approx(2.0)
    assert found["accuracy"] == pytest.approx(1 / 3)
    by_row = evaluate(torch.nn.Identity(), lambda _o, _t: losses[:, 0], [(scores, targets)])
    assert by_row == {"num-examples": 2, "loss": 2.0, "accuracy": 0.25}  # half of the first row


def test_a_row_of_nothing_but_padding_has_no_loss():
    targets, losses = torch.tensor([[1, IGNORED], [IGNORED, IGNORED]]), torch.full((2, 2), 4.0)
    assert per_example(losses, targets).tolist() == [4.0, 0.0]
    scores = torch.zeros(2, 3, 2)
    nothing = evaluate(torch.nn.Identity(), lambda _o, _t: losses[1:], [(scores[1:], targets[1:])])
    assert nothing == {"num-examples": 0, "loss": 0, "accuracy": 0}


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_of_a_single_score_there_is_no_accuracy(shape):
    """Of one logit for each row the highest is always the first: label 0 would be called right."""
    assert correct_by_row(torch.ones(shape), torch.tensor([0, 1, 1])) is None


def test_one_step_on_tokens_end_to_end(finals):
    """Scores b = 0 of two tokens; texts 0 0 1 and 1. Training weighs texts alike: the frequencies
    are ((2/3, 1/3) + (0, 1)) / 2 = (1/3, 2/3), so gd with rate 1 goes to b = (-1/6, 1/6).

    Tested by token, two of each: loss log 2 before; after, (log(1 + e^1/3) + log(1 + e^-1/3)) / 2.
    """
    settings = {
        "dataset": "plugged_in:two_tokens",
        "model": "plugged_in:Unigram",
        "client": {"optimizer": "gd", "batch_size": 1},
        "cohort": 1,
        "rounds": 1,
        "workers": 2,
    }
    (run,) = finals(settings).values()
    assert RunFolder(run).weights["scores"].tolist() == pytest.approx([-1 / 6, 1 / 6], abs=1e-6)
    before, after = RunFolder(run).rounds
    assert before["test_perplexity"] == pytest.approx(2.0)
    loss = (math.log1p(math.exp(1 / 3)) + math.log1p(math.exp(-1 / 3))) / 2
    assert after["test_loss"] == pytest.approx(loss, rel=1e-6)
    assert after["test_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert after["test_accuracy"] == after["train_accuracy"] == 0.5
    assert after["train_loss"] == pytest.approx(math.log(2))
    summary = json.loads((run.parent / "summary.json").read_text())["runs"][0]
    assert summary["final_test_perplexity"] == after["test_perplexity"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def charlm_by_hand(weights: dict[str, np.ndarray], words: np.ndarray) -> np.ndarray:
    """Kim et al. 2016, equations 1 to 9, word by word and in float64: scores (length, classes)."""
    states = [np.zeros((2, weights["lstm.weight_hh_l0"].shape[1])) for _ in range(2)]  # h, c
    scores = []
    for word in words:
        spelled = weights["characters.weight"][word]  # (size, 15)
        pooled = []
        for place in range(6):
            filters = weights[f"convolutions.{place}.weight"]  # (25 w, 15, w)
            width = filters.shape[2]
            feature = [
                np.einsum("oiw,wi->o", filters, spelled[at : at + width])
                for at in range(len(spelled) - width + 1)
            ]
            bias = weights[f"convolutions.{place}.bias"]
            pooled.append(np.tanh(np.array(feature) + bias).max(0))
        y = np.concatenate(pooled)
        t = sigmoid(weights["gate.weight"] @ y + weights["gate.bias"])
        g = np.maximum(weights["transform.weight"] @ y + weights["transform.bias"], 0)
        x = t * g + (1 - t) * y
        for layer in range(2):
            h, c = states[layer]
            gates = (
                weights[f"lstm.weight_ih_l{layer}"] @ x
                + weights[f"lstm.bias_ih_l{layer}"]
                + weights[f"lstm.weight_hh_l{layer}"] @ h
                + weights[f"lstm.bias_hh_l{layer}"]
            )
            i, f, new, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
            x = sigmoid(o) * np.tanh(c)
            states[layer] = np.stack([x, c])
        scores.append(weights["output.weight"] @ x + weights["output.bias"])
    return np.array(scores)


def test_charlm_computes_what_the_paper_says():
    torch.manual_seed(0)
    model = CharLM(7, hidden=5, dropout=0.5).eval().double()
    weights = {name: value.numpy() * 5 for name, value in model.state_dict().items()}
    weights["characters.weight"][0] = 0  # padding
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    words = np.array([spelled(word) for word in ("where", "to", "begin", "?")])
    scores = model(torch.from_numpy(words)[None])
    assert tuple(scores.shape) == (1, 7, 4)
    assert scores[0].T.detach().numpy() == pytest.approx(charlm_by_hand(weights, words), abs=1e-9)


def test_charlm_begins_as_its_paper_does():
    model = MODELS["charlm"].build(10)
    assert model.gate.bias.eq(-2).all()
    assert model.characters.weight[0].eq(0).all()
    others = [p for n, p in model.named_parameters() if n not in ("gate.bias",)]
    assert all(each.abs().max() <= 0.05 for each in others)


def test_charlm_without_weights_has_the_perplexity_of_a_guess(finals, tmp_path):
    """All zero: every word is as likely, so the perplexity is the number of words, here 53."""
    model = MODELS["charlm"].build(53)
    zero = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    save_file(zero, tmp_path / "zero.safetensors")
    settings = {
        "dataset": "shakespeare-texts",
        "dataset_args": {"vocabulary": 50, "length": 6, "max_clients": 4, "max_test_examples": 9},
        "model": "charlm",
        "initialization": str(tmp_path / "zero.safetensors"),
        "rounds": 0,
        "cohort": 1,
        "workers": 1,
    }
    (run,) = finals(settings).values()
    assert RunFolder(run).rounds[0]["test_perplexity"] == pytest.approx(53)


def learn_tokenizer(folder: Path) -> None:
    """Write a real byte-level BPE tokenizer, learnt from Shakespeare, in the layout of the hub."""
    speeches = shakespeare_texts(None, Choice())[0].texts
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(
        speeches, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    marks = {"eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, **marks).save_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    learn_tokenizer(folder)
    return folder


def subword_settings(tokenizer: Path) -> dict:
    arguments = {"tokens": "subwords", "tokenizer": str(tokenizer), "length": 16}
    return {
        "dataset": "shakespeare-texts",
        "dataset_args": {**arguments, "max_clients": 6, "max_examples_per_client": 4},
        "model": "distilgpt2",
        "model_args": TINY,
        "client": {"lr": 0.5, "batch_size": 4},
        "cohort": 2,
        "rounds": 2,
        "evaluate_every": 1,
        "workers": 2,
    }


def test_subwords_spell_the_text(tokenizer):
    """What is read and what is predicted is the text, shifted by one, between two end marks."""
    text = "Where to begin?"
    texts = of({"a": [text], "b": [text]})
    data = texts(tokens="subwords", tokenizer=str(tokenizer), length=30, test_share=0.5)
    read, predicted = data.inputs[0].tolist(), data.targets[0].tolist()
    count = sum(target != IGNORED for target in predicted)
    learnt = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    assert read[0] == predicted[count - 1] == learnt.eos_token_id
    assert learnt.decode(read[1:count]) == learnt.decode(predicted[: count - 1]) == text
    assert data.num_classes == 400


def test_distilgpt2_trains_and_its_head_alone(tokenizer, finals):
    """The head is the tied embedding; with `trainable: head` nothing else moves."""
    runs = finals(subword_settings(tokenizer) | {"grid": {"trainable": ["all", "head"]}})
    (start,) = finals(subword_settings(tokenizer) | {"rounds": 0}, "start").values()
    x = load_file(start / "final.safetensors")
    assert "lm_head.weight" not in x
    for trainable, run in runs.items():
        y = load_file(run / "final.safetensors")
        moved = {name for name in x if not torch.equal(x[name], y[name])}
        assert "transformer.wte.weight" in moved
        assert (moved == {"transformer.wte.weight"}) == (trainable == "trainable=head")
        losses = [line["test_loss"] for line in RunFolder(run).rounds]
        assert losses[-1] < losses[0]


def test_distilgpt2_takes_weights_in_the_hubs_layout(tokenizer, finals, tmp_path):
    """As transformers saves them, with the masks of older files: the same scores for each token."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=400, n_layer=2, n_head=2, n_embd=16, n_positions=32)
    published = GPT2LMHeadModel(config).eval()
    published.save_pretrained(tmp_path / "hub")
    path = tmp_path / "hub" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}, path)
    settings = subword_settings(tokenizer) | {"rounds": 0, "initialization": str(path)}
    (run,) = finals(settings).values()
    record = RunFolder(run).initialization
    assert record["fresh"] == []
    assert record["unused"] == ["transformer.h.0.attn.bias"]
    final = load_file(run / "final.safetensors")
    assert torch.equal(final["transformer.wte.weight"], published.lm_head.weight)

    ours = MODELS["distilgpt2"].build(400, **TINY).eval()
    ours.load_state_dict({**final, "lm_head.weight": final["transformer.wte.weight"]})
    tokens = torch.randint(400, (2, 9))
    with torch.no_grad():
        theirs = published(tokens).logits
        assert torch.allclose(ours(tokens).transpose(1, 2), theirs, atol=1e-6)


def test_any_text_file_may_be_the_proxy(tmp_path):
    """Lines are texts, blank ones are none; parquet files come with the hub's split."""
    (tmp_path / "a.txt").write_text("one two\n\nthree\n  \nfour\n")
    data = DATASETS["wikitext"](str(tmp_path), length=4, vocabulary=9, test_share=0.34)
    assert len(data.inputs) == 2
    assert data.test_size == 1
    for split, lines in (("train", ["one", "", "two"]), ("test", ["three"])):
        path = tmp_path / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"text": lines}), path)
    split = DATASETS["wikitext"](str(tmp_path), length=4, vocabulary=9)
    assert (len(split.inputs), split.test_size) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "a.txt: 'utf-8' codec"),
        ("a.txt", b" \n", "no text"),
        ("train.parquet", b"PAR1", "train.parquet"),
        ("a.md", b"", "holds no *.parquet and no *.txt"),
    ],
)
def test_a_damaged_text_file_is_one_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as refused:
        DATASETS["wikitext"](str(tmp_path))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_the_network_wikitext_says_what_to_do():
    with pytest.raises(RequestError, match=r"Salesforce/wikitext.*dataset_args\.data_dir"):
        DATASETS["wikitext"]()
