"""TextHandler: texts in, tokens to the model. What the shipped handler for texts builds on, and those in the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers import texts
from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.inputs import InputRefused, payload_of
from torchmgmt.handlers.optional import needed
from torchmgmt.handlers.options import Options

__all__ = ["TextHandler"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_UNKNOWN = "<unk>"


class TextHandler(BaseHandler):
    """Loads what makes numbers of words beside the model: a vocabulary, or a tokenizer of transformers.

    ``source_vocab``: what ``torch.save`` wrote of a dictionary from token to number, or of a list of tokens, in the file that
    the manifest names as sourceVocab or in source_vocab.pt. Without one, a tokenizer.json or tokenizer_config.json in the
    archive is loaded with transformers, as :attr:`tokenizer`; and a config.json and weights as transformers saves them,
    without a model file, as the model.
    """

    auto_model = "AutoModel"
    """The class of transformers that loads the model."""

    def __init__(self) -> None:
        super().__init__()
        self.options = Options({})
        self.source_vocab: Any = None
        self.tokenizer: Callable[..., Any] = texts.basic_english
        self.input_text: Any = None
        self._lig: Any = None

    def initialize(self, context: Any) -> None:
        """Load the model, the vocabulary or tokenizer, and the options.

        Raises:
            ValueError: there is neither vocabulary nor tokenizer, or one that cannot be used; or an option is wrong.
            ImportError: transformers is needed and not installed.
            Exception: whatever loading the model raises.
        """
        super().initialize(context)
        self.options = Options.of(self.model_yaml_config)
        folder = Path(context.system_properties["model_dir"])
        if self.has_vocabulary(folder):
            self.source_vocab = self._read_vocabulary(Path(self.get_source_vocab_path(context)))
        elif any((folder / name).is_file() for name in _TOKENIZER_FILES):
            self.tokenizer = _transformers().AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        else:
            raise ValueError(
                f"{type(self).__name__} needs the vocabulary of its model (source_vocab.pt among the extra files, or"
                f" what sourceVocab in the manifest names) or a tokenizer of transformers ({' or '.join(_TOKENIZER_FILES)});"
                " the archive has neither"
            )

    def has_vocabulary(self, folder: Path) -> bool:
        """Whether the archive in ``folder`` has a vocabulary; it is used before a tokenizer then."""
        return bool(self.manifest.get("model", {}).get("sourceVocab")) or (folder / "source_vocab.pt").is_file()

    def get_source_vocab_path(self, ctx: Any) -> str:
        """Return the path of the vocabulary. Named as in TorchServe."""
        name = self.manifest.get("model", {}).get("sourceVocab") or "source_vocab.pt"
        return str(Path(ctx.system_properties["model_dir"], name))

    def text_of(self, row: Any) -> str:
        """Return the text of a request: in ``data``, ``body`` or ``text``. Raises InputRefused."""
        value = payload_of(row, "text")
        if isinstance(value, (bytes, bytearray, memoryview)):
            try:
                return bytes(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputRefused(f"the text must be UTF-8: {error}") from error
        if not isinstance(value, str):
            raise InputRefused(f"a text is needed, not an object of type {type(value).__qualname__}")
        return value

    def number_of(self, token: str) -> int | None:
        """Return the number of ``token`` in the vocabulary; that of ``<unk>`` for an unknown one; None if it has none."""
        vocabulary = self.source_vocab
        if isinstance(vocabulary, Mapping):
            number: int | None = vocabulary.get(token, vocabulary.get(_UNKNOWN))
            return number
        known: int = vocabulary[token]  # an object of torchtext, say, which has its own way with unknown ones
        return known

    def _read_vocabulary(self, file: Path) -> Any:
        weights_only = self.context.system_properties.get("weights_only") is not False
        try:
            vocabulary = torch.load(file, map_location="cpu", weights_only=weights_only)
        except FileNotFoundError as error:
            raise ValueError(f"the archive names the vocabulary {file.name} and does not hold it") from error
        except Exception as error:  # UnpicklingError, RuntimeError, and what the classes in it raise
            raise ValueError(
                f"the vocabulary {file.name} cannot be loaded; save a dictionary from token to number, or a list of tokens,"
                f" with torch.save: {error}"
            ) from error
        if isinstance(vocabulary, (list, tuple)):
            return {token: number for number, token in enumerate(vocabulary)}
        if not hasattr(vocabulary, "__getitem__") or isinstance(vocabulary, (str, bytes, Tensor)):
            raise ValueError(
                f"the vocabulary {file.name} must be a dictionary from token to number, or a list of tokens, not an object"
                f" of type {type(vocabulary).__qualname__}"
            )
        return vocabulary

    def _load_by_manifest(self, folder: Path, model: Mapping[str, Any]) -> Any:
        weights = model.get("serializedFile") or _TRANSFORMERS_WEIGHTS[0]
        if model.get("modelFile") or weights not in _TRANSFORMERS_WEIGHTS or not _is_of_transformers(folder):
            return super()._load_by_manifest(folder, model)
        loader = getattr(_transformers(), self.auto_model)
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

    def _expand_contractions(self, text: str) -> str:
        return texts.expand_contractions(text)

    def _remove_accented_characters(self, text: str) -> str:
        return texts.remove_accents(text)

    def _remove_html_tags(self, text: str) -> str:
        return texts.remove_html(text)

    def _remove_punctuation(self, text: str) -> str:
        return texts.remove_punctuation(text)

    def _remove_puncutation(self, text: str) -> str:
        """As TorchServe once misspelled it."""
        return self._remove_punctuation(text)

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(text)

    def get_word_token(self, input_tokens: Sequence[str]) -> list[str]:
        """Return tokens without the mark that byte-pair tokenizers put in place of a space. Named as in TorchServe."""
        return [token.replace("Ġ", "") for token in input_tokens]

    def summarize_attributions(self, attributions: Tensor) -> Tensor:
        """Return attributions over all steps as one number for each entry. Named as in TorchServe."""
        shares = torch.softmax(attributions, dim=-1)
        scaled: Tensor = shares / torch.linalg.vector_norm(shares.sum(dim=-1))
        return scaled

    @property
    def lig(self) -> Any:
        """Captum's LayerIntegratedGradients of ``model.embedding``. Raises ImportError without captum."""
        if self._lig is None:
            captum = needed("captum.attr", "captum", "explaining a prediction")
            self._lig = captum.LayerIntegratedGradients(self.model, self.model.embedding)
        return self._lig

    @lig.setter
    def lig(self, lig: Any) -> None:
        self._lig = lig


def _transformers() -> Any:
    transformers = needed("transformers", "transformers", "a model or tokenizer of transformers")
    # Nobody watches a worker load; the bar is a thread, too, because of which a model would not be shared.
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _is_of_transformers(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
