"""Handlers in the styles of the field, packed by the real torch-model-archiver, run unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.compat.real import Packer
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import HandlerFailed

SERVICE = """
import logging
import os

logger = logging.getLogger(__name__)

class ModelHandler(object):
    '''The oldest style: a class, one object of it, and a function that initialises it with the first call.'''

    def __init__(self):
        self.error = None
        self._batch_size = 0
        self.initialized = False

    def initialize(self, context):
        properties = context.system_properties
        self._batch_size = properties["batch_size"]
        with open(os.path.join(properties.get("model_dir"), "words.txt")) as words:
            self.words = words.read().split()
        self.initialized = True
        logger.info("ready")

    def handle(self, data, context):
        metrics = context.metrics
        metrics.add_counter("requests", len(data))
        return [self.words[int(row.get("data") or row.get("body"))] for row in data]

_service = ModelHandler()

def handle(data, context):
    if not _service.initialized:
        _service.initialize(context)
    if data is None:
        return None
    return _service.handle(data, context)
"""
FUNCTION = """
from words import WORDS

def entry(data, context):
    if not data:
        return
    return [WORDS[int(row["body"])] for row in data]
"""
ABC_CLASS = """
from abc import ABC
from ts.torch_handler.base_handler import BaseHandler
from ts.handler_utils.timer import timed
from ts.utils.util import PredictionException

class Steps(BaseHandler, ABC):
    '''A subclass of BaseHandler that has an initialize of its own, as most for transformers do.'''

    def __init__(self):
        super(Steps, self).__init__()
        self.initialized = False

    def initialize(self, ctx):
        self.manifest = ctx.manifest
        self.words = open("words.txt").read().split()
        self.setup = ctx.model_yaml_config["handler"]["prefix"]
        self.initialized = True

    @timed
    def preprocess(self, requests):
        return [int(request.get("data") or request.get("body")) for request in requests]

    def inference(self, numbers, *args, **kwargs):
        if any(number > 2 for number in numbers):
            raise PredictionException("there are three words", 413)
        return [self.words[number] for number in numbers]

    def postprocess(self, words):
        self.context.set_response_content_type(0, "text/plain")
        return [self.setup + word for word in words]
"""
MICRO = """
from ts.handler_utils.micro_batching import MicroBatching
from ts.torch_handler.base_handler import BaseHandler

class Micro(BaseHandler):
    '''A batch in parts, as in TorchServe's example: the object that cuts takes the place of handle.'''

    def __init__(self):
        super().__init__()
        self.handle = MicroBatching(self)

    def initialize(self, ctx):
        self.words = open("words.txt").read().split()
        options = ctx.model_yaml_config["micro_batching"]
        self.handle.micro_batch_size = options["micro_batch_size"]
        self.handle.parallelism = options["parallelism"]

    def preprocess(self, data):
        return [int(row["body"]) for row in data]

    def inference(self, data):
        return [(number, self.handle.get_micro_batch_idx()) for number in data]

    def postprocess(self, data):
        return [self.words[number] for number, part in data if part is not None]
"""
CLASS_OF_MODEL = """
from net import Words
from ts.torch_handler.base_handler import BaseHandler

class Finder(BaseHandler):
    '''A model file that the handler imports, too, and what is set beside the answers.'''

    def initialize(self, context):
        super().initialize(context)
        assert type(self.model) is Words and self.model_yaml_config["handler"]["profile"]

    def preprocess(self, data):
        return [int(row["body"]) for row in data]

    def inference(self, data, *args, **kwargs):
        return [self.model(number) for number in data]

    def postprocess(self, data):
        for index in range(len(data)):
            self.context.set_response_content_type(index, "text/plain")
        return data
"""
NET = """
import torch

class Words(torch.nn.Module):
    def forward(self, number):
        return ["zero", "one", "two"][number]
"""
CONFIG = (
    "handler:\n  prefix: ''\n  profile: true\nmicro_batching:\n  micro_batch_size: 1\n  parallelism: {inference: 2}\n"
)
FILES: Mapping[str, str | Path] = {"words.txt": "zero one two", "words.py": "WORDS = ['zero', 'one', 'two']\n"}
STYLES = {"imported": CLASS_OF_MODEL, "service": SERVICE, "class": ABC_CLASS, "function": FUNCTION, "micro": MICRO}


@pytest.fixture(scope="module")
def packer(tmp_path_factory: pytest.TempPathFactory) -> Packer:
    return Packer(tmp_path_factory.mktemp("packing"), tmp_path_factory.mktemp("store"))


@pytest.fixture
def manager(packer: Packer, backend: ProcessBackend) -> Iterator[ModelManager]:
    with ModelManager(packer.store, backend=backend) as manager:
        yield manager


@pytest.mark.parametrize("style", STYLES)
def test_a_handler_of_each_style_answers_batches(manager: ModelManager, packer: Packer, style: str) -> None:
    """Each style finds its files, its configuration and its siblings; its model is shared by the workers' fork."""
    model_file = NET if style == "imported" else ""
    archive = packer.pack(style, STYLES[style], None, model=model_file, config=CONFIG, files=FILES)
    handler = "handler:entry" if style == "function" else None
    model = manager.register(archive.name, handler=handler, initial_workers=2, batch_size=4, max_batch_delay=50)
    assert list(model.map([2, 0, 1, 2, 2])) == ["two", "zero", "one", "two", "two"]
    assert model.describe().sharing.is_shared


def test_an_error_of_the_field_keeps_its_code(manager: ModelManager, packer: Packer) -> None:
    """PredictionException gives the caller its message and its code."""
    archive = packer.pack("refusing", ABC_CLASS, None, config=CONFIG, files=FILES)
    with pytest.raises(HandlerFailed, match="there are three words") as caught:
        manager.register(archive.name).predict(7)
    assert caught.value.error_code == 413
