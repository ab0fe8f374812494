"""text_classifier: texts with a vocabulary or with a tokenizer of transformers, the whole batch in one call."""

from __future__ import annotations

import collections
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.shipped import answers, context_of, initialised, one_thread
from torchmgmt.handlers import texts
from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.text_classifier import TextClassifier
from torchmgmt.handlers.text_handler import TextHandler

__all__ = ["one_thread"]

VOCABULARY = {
    token: number
    for number, token in enumerate(["<unk>", "film", "was", "good", "bad", "not", "not good", "was bad", "a", "cafe"])
}
BAG = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.EmbeddingBag({len(VOCABULARY)}, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, numbers, offsets):
        return 5 * self.head(self.embedding(numbers, offsets))
"""
TEXTS = ["The film was good", "a <b>bad</b> film, wasn't good!", "", "Café, not good; was bad"]


def classifier(folder: Path, options: Any = None, vocabulary: Any = VOCABULARY, **properties: Any) -> TextClassifier:
    folder.mkdir(exist_ok=True)
    torch.save(vocabulary, folder / "source_vocab.pt")
    (folder / "index_to_name.json").write_text(json.dumps({"0": "World", "1": "Sports", "2": "Business"}))
    return initialised(TextClassifier, folder, BAG, options, **properties)


@pytest.mark.parametrize(
    "text, expanded",
    [
        ("don't", "do not"),
        ("i can't and won't", "i cannot and will not"),
        ("couldn't've", "could not have"),
        ("he's, she'd, they'll, we've, you're, i'm", "he is, she would, they will, we have, you are, i am"),
        ("the dog's bone", "the dogs bone"),
        ("let's go at five o'clock, ma'am", "let us go at five of the clock, madam"),
        ("y'all've seen it 'cause it's so", "you all have seen it because it is so"),
        ("ain't sha'n't shan't've", "is not shall not shall not have"),
        ("Won't", "Will not"),
        ("'quoted'", "quoted"),
        ("do n't 't '", "do  not t "),
    ],
)
def test_contractions_are_expanded(text: str, expanded: str) -> None:
    """Words that are contracted become whole; other apostrophes go."""
    assert texts.expand_contractions(text) == expanded


def test_text_is_made_plain() -> None:
    """Tags and entities, accents, punctuation."""
    assert texts.remove_html("<p>a&nbsp;b&#39;c</p> 1 < 2") == "abc 1 < 2"
    assert texts.remove_accents("Café naïve Ωmega") == "Cafe naive mega"
    assert texts.remove_punctuation("a, b. (c)!") == "a b c"


def test_tokens_are_those_of_torchtext() -> None:
    """Punctuation by itself, quotes and colons away."""
    assert texts.basic_english('You can "now", (it\'s) done: ok?') == (
        ["you", "can", "now", ",", "(", "it", "'", "s", ")", "done", "ok", "?"]
    )


def test_ngrams_come_by_their_length() -> None:
    """Single tokens, then neighbours."""
    assert list(texts.ngrams(["here", "we", "are"], 3)) == ["here", "we", "are", "here we", "we are", "here we are"]
    assert list(texts.ngrams([], 2)) == []


@pytest.mark.parametrize("step", [texts.remove_html, texts.expand_contractions])
@pytest.mark.parametrize("piece", ["<", "&", "a'", "'", "&#", "'ve"])
def test_no_text_makes_the_steps_slow(step: Any, piece: str) -> None:
    """Twice as long a text takes no more than a few times as long: a request cannot hold a worker up."""

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        step("a" + piece * count)
        return time.perf_counter() - begin

    assert min(seconds(16_000) for _ in range(3)) < 8 * min(seconds(4_000) for _ in range(3)) + 0.05


def test_answers_are_those_of_the_network_called_directly(tmp_path: Path) -> None:
    """Every class by its name, in the network's order, for each text of a batch, an empty one included."""
    handler = classifier(tmp_path)
    found = answers(handler, *TEXTS)
    numbers = [[0, 1, 2, 3, 0, 0, 0], [8, 4, 1, 2, 5, 3, 0, 0, 0, 0, 6], [], [9, 5, 3, 2, 4, 0, 6, 0, 7]]
    for given, answer in zip(numbers, found, strict=True):
        with torch.inference_mode():
            scores = handler.model(torch.tensor(given, dtype=torch.int64), torch.tensor([0]))
        assert list(answer) == ["World", "Sports", "Business"]
        assert list(answer.values()) == pytest.approx(torch.softmax(scores, dim=1)[0].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "text", [TEXTS[0].encode(), {"data": TEXTS[0]}, {"text": TEXTS[0]}, bytearray(b"The film was good")]
)
def test_a_text_comes_as_bytes_or_in_json(tmp_path: Path, text: Any) -> None:
    """As it does as text."""
    handler = classifier(tmp_path)
    assert answers(handler, text) == answers(handler, TEXTS[0])


def test_topk_and_ngrams_are_options(tmp_path: Path) -> None:
    """The most probable first then."""
    handler = classifier(tmp_path, {"topk": 2, "ngrams": 1})
    (answer,) = answers(handler, "not good")
    assert len(answer) == 2
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert handler.preprocess([{"body": "not good"}])[0].tolist() == [5, 3]


@pytest.mark.parametrize(
    "vocabulary", [list(VOCABULARY), collections.OrderedDict(VOCABULARY), collections.Counter(VOCABULARY)]
)
def test_a_vocabulary_is_a_mapping_or_a_list(tmp_path: Path, vocabulary: Any) -> None:
    """In a list the place of a token is its number."""
    assert answers(classifier(tmp_path, vocabulary=vocabulary), *TEXTS) == answers(classifier(tmp_path), *TEXTS)


def test_a_text_is_explained_by_what_each_word_adds(tmp_path: Path) -> None:
    """The share of the class for the text, less that without the word: as the network gives them when called directly."""
    handler = classifier(tmp_path, {"ngrams": 1})
    (insight, empty) = handler.get_insights(handler.preprocess([{"body": "film was good"}, {"body": ""}]), None, "2")
    assert empty == {"words": [], "importances": []}
    assert insight["words"] == ["film", "was", "good"]

    def share(*numbers: int) -> float:
        with torch.inference_mode():
            scores: torch.Tensor = handler.model(torch.tensor(numbers), torch.tensor([0]))
        return torch.softmax(scores, dim=1)[0, 2].item()

    wanted = [share(1, 2, 3) - share(*left) for left in ((2, 3), (1, 3), (1, 2))]
    assert insight["importances"] == pytest.approx(wanted, abs=1e-5)
    handler.context.begin_batch(["0"], [{"explain": "True"}])
    assert handler.handle([{"body": {"text": "film was good", "target": 2}}], handler.context) == [insight]
    for wrong in (3, -1, "Business", None):
        with pytest.raises(InputRefused, match="target must be the number of a class, from 0 to 2"):
            handler.get_insights(handler.preprocess([{"body": "film"}]), None, wrong)


def test_without_unk_unknown_tokens_are_left_out(tmp_path: Path) -> None:
    """There is no number for them."""
    known = {token: number for token, number in VOCABULARY.items() if number}
    assert classifier(tmp_path, vocabulary=known).preprocess([{"body": "a new film"}])[0].tolist() == [8, 1]


def test_the_manifest_may_name_the_vocabulary(tmp_path: Path) -> None:
    """As archives have it whose manifest was written by hand or by older tools."""
    classifier(tmp_path)
    (tmp_path / "source_vocab.pt").rename(tmp_path / "words.bin")
    handler = TextClassifier()
    handler.initialize(context_of(tmp_path, {"modelFile": "net.py", "sourceVocab": "words.bin"}))
    assert handler.source_vocab == VOCABULARY
    with pytest.raises(ValueError, match="names the vocabulary gone"):
        TextClassifier().initialize(context_of(tmp_path, {"modelFile": "net.py", "sourceVocab": "gone.pt"}))


class Vocabulary:
    """As torchtext's: an object with a way of its own."""

    def __getitem__(self, token: str) -> int:
        return VOCABULARY.get(token, 0)


def test_a_vocabulary_that_is_code_needs_trust(tmp_path: Path) -> None:
    """It is refused, with what to save instead, unless weights_only is off."""
    with pytest.raises(ValueError, match=r"source_vocab\.pt cannot be loaded; save a dictionary"):
        classifier(tmp_path, vocabulary=Vocabulary())
    trusted = classifier(tmp_path, vocabulary=Vocabulary(), weights_only=False)
    assert answers(trusted, *TEXTS) == answers(classifier(tmp_path), *TEXTS)


@pytest.mark.parametrize("vocabulary", [torch.zeros(2), 5, "text"])
def test_a_vocabulary_that_is_none_is_refused(tmp_path: Path, vocabulary: Any) -> None:
    """With what it is instead."""
    with pytest.raises(ValueError, match=type(vocabulary).__name__):
        classifier(tmp_path, vocabulary=vocabulary)


def test_without_vocabulary_and_tokenizer_loading_fails(tmp_path: Path) -> None:
    """With the ways to give one."""
    with pytest.raises(ValueError, match=r"source_vocab\.pt among the extra files.*tokenizer\.json"):
        initialised(TextClassifier, tmp_path, BAG)


@pytest.mark.parametrize(
    "payload, what", [(b"\xff\xfe", "UTF-8"), (5, "int"), (["a"], "list"), ({"words": "a"}, "text")]
)
def test_what_is_no_text_is_refused(tmp_path: Path, payload: Any, what: str) -> None:
    """With a 400 and its place in the batch."""
    with pytest.raises(InputRefused, match=what) as raised:
        answers(classifier(tmp_path), "good", payload)
    assert (raised.value.error_code, raised.value.indexes) == (400, (1,))


def test_without_transformers_loading_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an archive with a tokenizer of transformers needs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    classifier(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match=re.escape("pip install 'transformers'")):
        initialised(TextClassifier, tmp_path / "b", BAG)


def test_the_names_that_subclasses_in_the_field_call_are_there() -> None:
    """Those of TorchServe's TextHandler, the misspelled one included."""
    handler = TextHandler()
    assert handler._remove_puncutation("a.b") == handler._remove_punctuation("a.b") == "ab"
    assert handler._expand_contractions("it's") == "it is"
    assert handler._remove_accented_characters("é") == "e"
    assert handler._remove_html_tags("<a>") == ""
    assert handler._tokenize("A b") == ["a", "b"]
    assert handler.get_word_token(["Ġthe", "re"]) == ["the", "re"]
    assert handler.summarize_attributions(torch.zeros(1, 3, 2)).shape == (1, 3, 2)
