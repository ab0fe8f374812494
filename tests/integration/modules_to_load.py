"""Modules whose constructors and state dicts are as varied as those in the field: what test_mapped_loading loads.

Each source defines one module, with at least one parameter of 1 MiB, that notes how often it is made, and may define
``save(module, path)`` in place of saving its state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen


@frozen
class Case:
    """The constructor's body, what else is in the file, and what loading it is expected to come to."""

    body: str
    above: str = ""
    methods: str = ""
    save: str = ""
    is_mapped: bool = False
    """Whether the large parameters end up as views of the file."""
    made: int = 1
    """How often the constructor runs."""
    fails: str | None = None
    """The name of the error that loading it raises."""

    @property
    def source(self) -> str:
        """The text of a model file."""
        body = "".join(f"        {line}\n" for line in self.body.strip().splitlines())
        methods = "".join(f"    {line}\n" for line in self.methods.strip().splitlines())
        return f"{_HEAD}{self.above}\n{_CLASS}{body}{methods}\n{self.save}\n"


_HEAD = """
import functools
import torch
from torch import nn
import constructions
"""
_CLASS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        constructions.count += 1
"""
_SAVE = "def save(module, path):\n    state = module.state_dict()\n    "
_FORWARD = "def forward(self, rows):\n    return self.big(rows)\n"

BIG: Final = "self.big = nn.Linear(512, 512)\n"

MAPPED: Mapping[str, Case] = {
    "a linear layer": Case(BIG, methods=_FORWARD, is_mapped=True),
    "frozen": Case(BIG + "self.big.requires_grad_(False)", methods=_FORWARD, is_mapped=True),
    "whole numbers": Case(
        "self.big = nn.Parameter(torch.empty(512, 512, dtype=torch.int8).fill_(3), requires_grad=False)", is_mapped=True
    ),
    "half precision": Case("self.big = nn.Linear(1024, 1024)\nself.half()", is_mapped=True),
    "initialised in every way": Case(
        BIG
        + "for init in (nn.init.trunc_normal_, nn.init.orthogonal_, nn.init.xavier_normal_, nn.init.zeros_):\n"
        + "    init(self.big.weight)\n"
        + "with torch.no_grad():\n    self.big.weight.mul_(2).copy_(torch.ones(512, 512))",
        methods=_FORWARD,
        is_mapped=True,
    ),
    "made of what an initialiser returns": Case(
        BIG + "self.big.weight = nn.Parameter(self.big.weight.data.normal_(0, 0.1).clamp_(-1, 1))", is_mapped=True
    ),
    "values computed from small tensors": Case(
        BIG + "self.rates = [rate.item() for rate in torch.linspace(0, 1, 5)]\nself.where = torch.zeros(1).device",
        is_mapped=True,
    ),
    "buffers that are not saved": Case(
        BIG + "self.register_buffer('steps', torch.arange(512.0), persistent=False)\nself.empty = torch.empty(0)",
        methods="def forward(self, rows):\n    return self.big(rows) * self.steps",
        is_mapped=True,
    ),
    "statistics": Case(
        BIG + "self.norm = nn.BatchNorm1d(512)",
        methods="def forward(self, rows):\n    return self.norm(self.big(rows))",
        is_mapped=True,
    ),
    "recurrent": Case(
        "self.big = nn.LSTM(512, 512, bidirectional=True)",
        methods="def forward(self, rows):\n    return self.big(rows)[0]",
        is_mapped=True,
    ),
    "attention": Case(
        "self.big = nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, 512, dropout=0), 2)",
        methods=_FORWARD,
        is_mapped=True,
    ),
    "an embedding with padding": Case("self.big = nn.Embedding(1000, 512, padding_idx=3)", is_mapped=True),
    "one tensor under two names": Case(
        "self.big = nn.Embedding(1000, 512)\nself.out = nn.Linear(512, 1000, bias=False)\n"
        "self.out.weight = self.big.weight",
        methods="def forward(self, rows):\n    return self.out(rows)",
        is_mapped=True,
    ),
    "one tensor under two names, two in the file": Case(
        "self.big = nn.Linear(512, 512, bias=False)\nself.out = nn.Linear(512, 512, bias=False)\n"
        "self.out.weight = self.big.weight",
        methods=_FORWARD,
        save=_SAVE + "torch.save({**state, 'out.weight': torch.ones(512, 512)}, path)",
        is_mapped=True,
    ),
    "two tensors, one in the file": Case(
        "self.big = nn.Linear(512, 512, bias=False)\nself.out = nn.Linear(512, 512, bias=False)",
        methods=_FORWARD,
        save=_SAVE + "torch.save({**state, 'out.weight': state['big.weight']}, path)",
        is_mapped=True,
    ),
    "one module under two names": Case(BIG + "self.same = self.big", methods=_FORWARD, is_mapped=True),
    "parameters in lists": Case(
        "self.big = nn.ParameterList([nn.Parameter(torch.empty(512, 512)) for _ in range(2)])", is_mapped=True
    ),
    "parameters with attributes": Case(
        BIG + "self.big.weight.no_decay = True",
        methods="def get_marks(self):\n    return self.big.weight.no_decay",
        is_mapped=True,
    ),
    "the device is asked for": Case(
        BIG
        + "self.where = str(self.big.weight.device)\nself.hollow = self.big.weight.is_meta\n"
        + "self.steps = torch.arange(3, device=self.big.weight.device)",
        is_mapped=True,
    ),
    "weights that are loaded before": Case(
        BIG + "self.big.load_state_dict({'weight': torch.ones(512, 512), 'bias': torch.ones(512)})",
        methods=_FORWARD,
        is_mapped=True,
    ),
    "no metadata in the state dict": Case(
        BIG, methods=_FORWARD, save=_SAVE + "torch.save(dict(state), path)", is_mapped=True
    ),
    "parameters in the state dict": Case(
        BIG, methods=_FORWARD, save=_SAVE + "torch.save(module.state_dict(keep_vars=True), path)", is_mapped=True
    ),
}
"""Made once, without weights."""

COPIED: Mapping[str, Case] = {
    "small": Case("self.big = nn.Linear(3, 3)"),
    "made with values": Case("self.big = nn.Parameter(torch.zeros(512, 512))\nself.seen = [self.big, self.big[:2]]"),
    "another dtype in the file": Case(
        BIG, methods=_FORWARD, save=_SAVE + "torch.save({name: each.half() for name, each in state.items()}, path)"
    ),
    "other strides in the file": Case(
        BIG,
        methods=_FORWARD,
        save=_SAVE + "state['big.weight'] = state['big.weight'].t().contiguous().t()\n    torch.save(state, path)",
    ),
    "a part of a tensor in the file": Case(
        BIG,
        methods=_FORWARD,
        save=_SAVE + "state['big.weight'] = torch.rand(513, 512)[1:]\n    torch.save(state, path)",
    ),
    "a large buffer": Case(
        "self.register_buffer('big', torch.empty(512, 512))",
        methods="def forward(self, rows):\n    self.big.resize_(600, 600)\n    return self.big.size(0)",
    ),
    "a file of the old format": Case(
        BIG, methods=_FORWARD, save=_SAVE + "torch.save(state, path, _use_new_zipfile_serialization=False)"
    ),
    "a compressed file": Case(
        BIG + "self.noise = nn.Parameter(torch.empty(1024, 1024, dtype=torch.int8), requires_grad=False)",
        methods=_FORWARD,
        # Read as if it was not compressed, the first would be found where the second lies.
        save=_SAVE
        + "state['big.weight'] = torch.ones(512, 512)\n"
        + "    del state['noise']\n"
        + "    state['noise'] = torch.randint(-128, 127, (1024, 1024), dtype=torch.int8)\n"
        + "    torch.save(state, path)\n    constructions.repack(path, 8)",
    ),
    "a file packed by hand": Case(
        BIG, methods=_FORWARD, save=_SAVE + "torch.save(state, path)\n    constructions.repack(path, 0)"
    ),
}
"""Made once, but their weights are copies."""

MADE_TWICE: Mapping[str, Case] = {
    "a large buffer that is not saved": Case(
        BIG + "table = torch.empty(512, 512)\ntable[:] = 2\nself.register_buffer('table', table, persistent=False)",
        methods="def forward(self, rows):\n    return self.big(rows) @ self.table",
        made=2,
    ),
    "a view in an attribute": Case(
        BIG + "self.top = self.big.weight[:2]", methods="def forward(self, rows):\n    return rows @ self.top.T", made=2
    ),
    "a copy in an attribute": Case(
        BIG + "self.first = {'weights': nn.init.ones_(self.big.weight).detach().clone()}", made=2
    ),
    "a parameter in a plain list": Case(
        BIG + "self.weights = [self.big.weight]",
        methods="def forward(self, rows):\n    return rows @ self.weights[0]",
        made=2,
    ),
    "a parameter that is not registered": Case(
        BIG + "self.lost = {'it': [nn.Parameter(torch.empty(512, 512).fill_(2))]}",
        methods="def forward(self, rows):\n    return rows @ self.lost['it'][0]",
        made=2,
    ),
    "a parameter in a closure": Case(
        BIG + "weight = self.big.weight\nself.look = lambda rows: rows @ weight",
        methods="def forward(self, rows):\n    return self.look(rows)",
        made=2,
    ),
    "parameters that share memory": Case(
        BIG + "self.other = nn.Linear(512, 512)\nself.other.weight.data = self.big.weight.data",
        methods="def forward(self, rows):\n    return self.other(rows)",
        save=_SAVE + "state['other.weight'] = torch.ones(512, 512)\n    torch.save(state, path)",
        made=2,
    ),
    "shapes found by a trial run": Case(
        BIG + "self.small = nn.Linear(self.big(torch.zeros(2, 512)).shape[0], 3)", made=2
    ),
    "a value is computed with": Case(BIG + "self.scale = 1 if self.big.weight.sum().item() > 9e9 else 2", made=2),
    "values are asked for in vain": Case(
        BIG + "try:\n    self.rows = len(self.big.weight.tolist())\nexcept Exception:\n    self.rows = 0", made=2
    ),
    "numpy looks at values": Case(BIG + "self.rows = len(self.big.weight.detach().numpy())", made=2),
    "it is written as text": Case(BIG + "self.text = f'{self.big.weight}'[:6]", made=2),
    "the address is asked for": Case(BIG + "self.has_memory = self.big.weight.data_ptr() != 0", made=2),
    "a parameter of a class of its own": Case(
        "self.big = Special(torch.empty(512, 512))", above="class Special(nn.Parameter):\n    pass", made=2
    ),
    "its own way of loading": Case(
        BIG,
        methods="def _load_from_state_dict(self, state, prefix, *rest):\n"
        "    state['big.weight'] = state['big.weight'] * 2\n    super()._load_from_state_dict(state, prefix, *rest)",
        made=2,
    ),
    "its own way of loading, which writes to what is loaded": Case(
        BIG + "self.top = self.big.weight[:2]",
        methods="def _load_from_state_dict(self, state, prefix, *rest):\n"
        "    state['big.weight'].data.mul_(2)\n    super()._load_from_state_dict(state, prefix, *rest)",
        made=2,
    ),
    "a hook that writes to what is loaded": Case(
        BIG
        + "self.top = self.big.weight[:2]\n"
        + "self._register_load_state_dict_pre_hook(lambda state, *rest: state['big.weight'].data.mul_(2))",
        made=2,
    ),
    "its own load_state_dict": Case(
        BIG,
        methods="def load_state_dict(self, state, strict=True):\n"
        "    self.table = state['big.bias']\n    return super().load_state_dict(state, strict)",
        made=2,
    ),
    "a hook that renames": Case(
        BIG
        + "def rename(state, prefix, *rest):\n"
        + "    for name in [each for each in state if each.startswith('old')]:\n"
        + "        state[name.replace('old', 'big')] = state.pop(name)\n"
        + "self._register_load_state_dict_pre_hook(rename)",
        save=_SAVE + "torch.save({name.replace('big', 'old'): each for name, each in state.items()}, path)",
        made=2,
    ),
    "extra state": Case(
        BIG,
        methods="def get_extra_state(self):\n    return 'mine'\n"
        "def set_extra_state(self, state):\n    self.told = state\n",
        made=2,
    ),
    "weight normalisation": Case("self.big = nn.utils.parametrizations.weight_norm(nn.Linear(512, 512))", made=2),
    "tensors in a cache of the file": Case(
        BIG + "self.table = table()",
        above="@functools.lru_cache\ndef table():\n    return torch.empty(512, 512).fill_(2)",
        methods="def forward(self, rows):\n    return self.big(rows) @ self.table",
        made=2,
    ),
    "statistics of before they were counted": Case(
        BIG + "self.norm = nn.BatchNorm1d(512)",
        save=_SAVE + "del state['norm.num_batches_tracked']\n    torch.save(dict(state), path)",
        made=2,
    ),
    "a scalar saved as a row": Case(
        BIG + "self.factor = nn.Parameter(torch.tensor(1.0))",
        save=_SAVE + "state['factor'] = torch.tensor([3.0])\n    torch.save(state, path)",
        made=2,
    ),
    "a scripted part": Case(BIG + "self.big = torch.jit.script(self.big)", methods=_FORWARD, made=2),
    "lazy": Case(
        BIG + "self.lazy = nn.LazyLinear(4)",
        methods="def forward(self, rows):\n    return self.lazy(rows)",
        save="def save(module, path):\n    module(torch.rand(2, 512))\n    torch.save(module.state_dict(), path)",
        made=2,
    ),
    "hooks on a parameter": Case(BIG + "self.big.weight.register_hook(lambda grad: grad)", made=2),
}
"""Something of them cannot be loaded in any but the plain way."""

FAILING: Mapping[str, Case] = {
    "a missing key": Case(
        BIG, save=_SAVE + "del state['big.bias']\n    torch.save(state, path)", made=2, fails="RuntimeError"
    ),
    "an unexpected key": Case(
        BIG, save=_SAVE + "torch.save({**state, 'more': torch.ones(1)}, path)", made=2, fails="RuntimeError"
    ),
    "another shape": Case(
        BIG, save=_SAVE + "torch.save({**state, 'big.bias': torch.ones(1)}, path)", made=2, fails="RuntimeError"
    ),
    "no tensor": Case(BIG, save=_SAVE + "torch.save({**state, 'big.bias': 1}, path)", made=2, fails="RuntimeError"),
    "nested": Case(
        BIG, save=_SAVE + "torch.save({'state_dict': state, 'epoch': 3}, path)", made=2, fails="RuntimeError"
    ),
    "a list": Case(BIG, save=_SAVE + "torch.save(list(state.values()), path)", made=2, fails="TypeError"),
    "a whole module": Case(BIG, save=_SAVE + "torch.save(nn.Linear(3, 3), path)", fails="UnpicklingError"),
    "a pickle that runs code": Case(
        BIG,
        save="class Evil:\n    def __reduce__(self):\n        return print, ('it ran',)\n"
        + _SAVE
        + "torch.save({'big.weight': Evil()}, path)",
        fails="UnpicklingError",
    ),
    "no checkpoint at all": Case(BIG, save=_SAVE + "open(path, 'w').close()", fails="EOFError"),
    "a constructor that fails": Case(
        BIG + "if constructions.is_measured:\n    raise ValueError('on purpose')", made=2, fails="ValueError"
    ),
}
"""Cannot be loaded, and say so in the same words as ever."""

CASES: Mapping[str, Case] = {**MAPPED, **COPIED, **MADE_TWICE, **FAILING}
# Under these names the first case is loaded once more,
SHARED_BY_DEFAULT: Final = "shared by default"
"""where torch is set to write to the files that it maps;"""
NOT_MAPPABLE: Final = "not mappable"
"""where the file system maps no files."""
