"""The phases of a fine-tuning run: prepare, load, train, save."""

from __future__ import annotations

from ..outputs.directory import claim
from .run import Finetuned, Request


def finetune_once(request: Request) -> Finetuned:
    """Trains one adapter, with the output directory locked. Each phase updates the ``Run``."""
    from .load import load  # here, because the command's parser needs no torch
    from .prepare import prepare
    from .save import save
    from .train import begin, train

    with claim(request.output, request.overwrite) as output:
        run = prepare(request, output)
        load(run)
        begin(run)
        train(run)
        return save(run)
