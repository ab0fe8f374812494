"""text_classifier: how probable each class is for a text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.inputs import read_each
from torchmgmt.handlers.outputs import labelled, main_tensor
from torchmgmt.handlers.text_handler import TextHandler
from torchmgmt.handlers.texts import ngrams
from torchmgmt.handlers.timing import timed

__all__ = ["TextClassifier"]


class TextClassifier(TextHandler):
    """Answers each text with ``{name: probability}`` of all classes, in the model's order.

    With a vocabulary the model is called as ``model(numbers, offsets)``, the way of :class:`torch.nn.EmbeddingBag`: the
    numbers of all texts of the batch after one another, and where each text begins. With a tokenizer of transformers it
    is called with what that returns, by name. It returns scores (logits) of shape [batch, classes].

    Names are those in index_to_name.json, else those of the model of transformers, else numbers. In the ``handler`` section
    of model-config.yaml: ``topk``, so many classes and the most probable first; ``ngrams``, up to how many neighbouring
    words are a token of the vocabulary (2 unless set); ``max_length``, after how many tokens the tokenizer cuts a text.
    """

    auto_model = "AutoModelForSequenceClassification"
    ngrams = 2
    topk: int | None = None

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises what :meth:`TextHandler.initialize` does."""
        super().initialize(context)
        self.topk = self.options.count_or_none("topk", self.topk)
        self.ngrams = self.options.count("ngrams", self.ngrams)
        self.max_length = self.options.count_or_none("max_length", None)
        if self.mapping is None:
            names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
            self.mapping = {str(number): name for number, name in names.items()} or None

    @timed
    def preprocess(self, data: Sequence[Any]) -> Any:
        """Return the tokens of the batch: ``(numbers, offsets)``, or a mapping from a tokenizer of transformers.

        Raises:
            InputRefused: some of the batch sent no text.
        """
        given = read_each(data, self.text_of)
        if self.source_vocab is None:
            return self._tokenized(given)
        numbers = [self._numbers(text) for text in given]
        starts = [0, *itertools.accumulate(map(len, numbers[:-1]))]
        together = list(itertools.chain.from_iterable(numbers))
        return (
            torch.tensor(together, dtype=torch.int64, device=self.device),
            torch.tensor(starts, dtype=torch.int64, device=self.device),
        )

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the batch."""
        with torch.inference_mode():
            if isinstance(data, Mapping):
                return self.model(*args, **data, **kwargs)
            return self.model(*data, *args, **kwargs)

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make an answer for each text of the model's output.

        Raises:
            TypeError: the output holds no tensor.
            ValueError: its shape is not [batch, classes].
        """
        scores = main_tensor(data)
        if scores.ndim != 2:
            raise ValueError(
                f"the model returned scores of shape {list(scores.shape)}; text_classifier needs [batch, classes]"
            )
        shares = torch.softmax(scores.float(), dim=1)
        if self.topk is None:
            classes = range(shares.shape[1])
            return [labelled(row, self.mapping, classes) for row in shares.tolist()]
        best = torch.topk(shares, min(self.topk, shares.shape[1]), dim=1)
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [labelled(values, self.mapping, each) for values, each in rows]

    def _numbers(self, text: str) -> list[int]:
        plain = self._expand_contractions(self._remove_html_tags(text).lower())
        tokens = self._tokenize(self._remove_punctuation(self._remove_accented_characters(plain)))
        numbers = (self.number_of(token) for token in ngrams(tokens, self.ngrams))
        return [number for number in numbers if number is not None]

    def _tokenized(self, given: list[str]) -> Mapping[str, Tensor]:
        tokens = self.tokenizer(given, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        # A TorchScript model refuses what it does not declare, and was often made for less than the tokenizer gives.
        declared = getattr(getattr(self.model, "forward", None), "schema", None)
        wanted = None if declared is None else {argument.name for argument in declared.arguments}
        return {name: tensor.to(self.device) for name, tensor in tokens.items() if wanted is None or name in wanted}
