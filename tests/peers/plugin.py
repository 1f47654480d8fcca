"""A pytest plugin that puts our 4-bit layers into the models of other libraries' tests, which stay unmodified.

With ``--layers dense``, models stay as they are, and each test only reports how many layers would have been replaced.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit as BitsandbytesLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

import qlora_ext
from qlora_ext.integrations.transformers import QLoRAConfig
from qlora_ext.nn import Packed4bit, conversion_of, to_be_quantized

BLOCK_SIZE = 32  # most weights in these tests have a few hundred values


class Replacement:
    """Replaces the linear layers of models when they are made, or only counts them.

    Attributes:
        layers: how many layers it has replaced or counted since ``layers`` was last set to 0.
        only_asked: only models that are loaded with a ``BitsAndBytesConfig`` become 4-bit.
    """

    only_asked = False

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.layers = 0

    def replace(self, model: nn.Module) -> None:
        """Replaces the dense layers in ``model``, unless it has an adapter, or is a linear layer itself."""
        modules = list(model.modules())
        if conversion_of(model) is not None or any(isinstance(module, BaseTunerLayer) for module in modules):
            return
        self.layers += sum(isinstance(module, (Packed4bit, BitsandbytesLinear)) for module in modules)
        found = 0 if self.only_asked else len(to_be_quantized(model))
        self.layers += found
        if found and not self.dense:
            qlora_ext.quantize_model(model, block_size=BLOCK_SIZE)

    def install(self) -> None:
        """Replaces layers in what test modules construct and load, and in what gets an adapter."""
        after_init = self._after_init

        def init_subclass(cls: type[nn.Module], **options: Any) -> None:
            super(nn.Module, cls).__init_subclass__(**options)
            if cls.__module__.startswith("tests.") and not issubclass(cls, BaseTunerLayer):
                cls.__init__ = after_init(cls.__init__)  # type: ignore[method-assign]

        nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment, method-assign]
        load, adapt = PreTrainedModel.from_pretrained.__func__, BaseTuner.__init__

        def from_pretrained(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
            model = load(cls, name, *arguments, **options)
            self.replace(model[0] if isinstance(model, tuple) else model)
            return model

        def init_tuner(tuner: Any, model: nn.Module, *arguments: Any, **options: Any) -> None:
            self.replace(model)
            adapt(tuner, model, *arguments, **options)

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        BaseTuner.__init__ = init_tuner
        if not self.dense:
            transformers.BitsAndBytesConfig = _bitsandbytes_config

    def _after_init(self, init: Any) -> Any:
        @functools.wraps(init)
        def initialize(module: nn.Module, *arguments: Any, **options: Any) -> None:
            init(module, *arguments, **options)
            if type(module).__init__ is initialize:
                self.replace(module)

        return initialize


def _bitsandbytes_config(**options: Any) -> Any:
    """A ``QLoRAConfig`` in place of a ``BitsAndBytesConfig`` for 4 bits."""
    return QLoRAConfig(**options) if options.get("load_in_4bit") else _BitsAndBytesConfig(**options)


_BitsAndBytesConfig = transformers.BitsAndBytesConfig


class _EveryModel(collections.Counter):
    """PEFT's list of the models that need not be asked from the hub."""

    def __contains__(self, name: object) -> bool:
        return True


def _why(error: Any) -> str:
    """The message of a failed or skipped test, and the statement that failed."""
    if isinstance(error, tuple):
        return str(error[2])
    if not hasattr(error, "reprcrash"):
        return str(error)
    return "\n".join([error.reprcrash.message, *error.reprtraceback.reprentries[-1].lines])


class Plugin:
    """Chooses the tests, and reports what became of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.replacement = Replacement(config.getoption("layers") == "dense")
        self.replacement.install()

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        only = self.config.getoption("only")
        wanted = self._sample(items) if only is None else set(json.loads(pathlib.Path(only).read_text()))
        items[:] = [item for item in items if item.nodeid in wanted]
        utilities = sys.modules.get("tests.testing_utils")
        if utilities is not None:
            utilities._HUB_MODEL_ACCESSES = _EveryModel()  # PEFT's tests would go online otherwise

    def _sample(self, items: list[pytest.Item]) -> set[str]:
        """Up to ``--sample`` cases of each test, which depend on its name and ``--seed`` only."""
        cases = collections.defaultdict(list)
        for item in items:
            cases[item.nodeid.partition("[")[0]].append(item.nodeid)
        size, seed = self.config.getoption("sample"), self.config.getoption("seed")
        return {
            case
            for test, ids in cases.items()
            for case in random.Random(f"{seed} {test}").sample(sorted(ids), min(size, len(ids)))
        }

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        torch.manual_seed(0)
        self.replacement.layers = 0
        self.replacement.only_asked = "BitsAndBytesConfig" in vars(getattr(item, "module", None) or object)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        item.user_properties[:] = [("layers", self.replacement.layers)]
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self.outcomes.setdefault(report.nodeid, {"outcome": "passed", "layers": 0, "why": ""})
        outcome["layers"] = max([outcome["layers"], *(count for _, count in report.user_properties)])
        if report.outcome != "passed" and outcome["outcome"] != "failed":
            outcome["outcome"] = report.outcome
            outcome["why"] = _why(report.longrepr)

    def pytest_sessionfinish(self) -> None:
        if not hasattr(self.config, "workerinput"):
            pathlib.Path(self.config.getoption("outcomes")).write_text(json.dumps(self.outcomes, indent=1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layers", choices=("dense", "4bit"), required=True, help="which layers the models get")
    parser.addoption("--sample", type=int, default=1, help="how many cases of each test to run")
    parser.addoption("--seed", type=int, default=0, help="of the sample")
    parser.addoption("--only", metavar="FILE", help="a JSON list of the tests to run")
    parser.addoption("--outcomes", metavar="FILE", required=True, help="the JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(config), "peers")
