"""text_classifier: how probable each class is for a text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.ablation import ablated
from torchmgmt.handlers.inputs import InputRefused, read_each
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

    def get_insights(self, tensor_data: Any, _: Any, target: Any = 0) -> list[Any]:
        """Return for each text ``{"words": [...], "importances": [...]}``: what a word adds to the probability of ``target``.

        That is the class's probability, less what it is without this word (a token of the vocabulary or the tokenizer). Named as
        in TorchServe; needs no captum.

        Raises:
            InputRefused: ``target`` is not the number of a class.
        """
        if isinstance(tensor_data, Mapping):
            return [self._insight_of_tokens(tensor_data, row, target) for row in range(len(tensor_data["input_ids"]))]
        numbers, starts = tensor_data
        return [self._insight_of_numbers(text, target) for text in numbers.tensor_split(starts[1:].cpu())]

    def _insight_of_numbers(self, numbers: Tensor, target: Any) -> dict[str, Any]:
        def score(kept: Tensor) -> Tensor:
            count, length = kept.shape
            starts = torch.arange(count, device=self.device) * length
            return self._share((numbers[kept.to(self.device)].flatten(), starts), target)

        vocabulary = self.source_vocab if isinstance(self.source_vocab, Mapping) else {}
        names = {number: token for token, number in vocabulary.items()}
        words = [str(names.get(number, number)) for number in numbers.tolist()]
        return {"words": words, "importances": ablated(score, len(words), range(len(words)))}

    def _insight_of_tokens(self, tokens: Mapping[str, Tensor], row: int, target: Any) -> dict[str, Any]:
        own = {name: tensor[row] for name, tensor in tokens.items()}
        if "attention_mask" in own:  # padding is no part of the text
            own = {name: tensor[own["attention_mask"].bool()] for name, tensor in own.items()}

        def score(kept: Tensor) -> Tensor:
            return self._share({name: tensor[kept.to(self.device)] for name, tensor in own.items()}, target)

        tokenizer: Any = self.tokenizer
        numbers, special = own["input_ids"].tolist(), frozenset(tokenizer.all_special_ids)
        places = [place for place, number in enumerate(numbers) if number not in special]
        words = self.get_word_token(tokenizer.convert_ids_to_tokens([numbers[place] for place in places]))
        return {"words": words, "importances": ablated(score, len(numbers), places)}

    def _share(self, data: Any, target: Any) -> Tensor:
        """Return the probability of class ``target`` for each text."""
        shares = torch.softmax(main_tensor(self.inference(data)).float(), dim=1)
        if not str(target).isdecimal() or int(target) >= shares.shape[1]:
            raise InputRefused(f"target must be the number of a class, from 0 to {shares.shape[1] - 1}, not {target!r}")
        return shares[:, int(target)].cpu()

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
