"""The teacher of ``--method distill``: a model, or the file of its log-probabilities."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from typing import TYPE_CHECKING, Any

import torch

from qlora_ext.form import Form
from qlora_ext.untrusted import excerpt, printable

from ..data import Row
from ..data.store import Stored
from ..errors import UserError, path_named
from ..models.conversion import load_streamed
from ..models.devices import parse_computing_dtype, parse_dtype
from ..models.loading import Loader, load_dense
from ..models.pretrained import has_4bit_blocks, is_4bit, load_config, load_tokenizer
from ..models.sources import ModelSource, resolve
from ..models.validate_model import longest_input, weight_files
from ..outputs.directory import Output
from ..terminal.bars import counted
from .identity import digest_of_files
from .settings import STORED

if TYPE_CHECKING:
    from .run import Run


def find_teacher(run: Run, config: Any, named: bool) -> None:
    """Finds the teacher of a run that has a tokenizer, and the number of tokens that both models predict.

    Args:
        config: of the run's model.
        named: whether the user named the teacher, and not the record of a run.

    Raises:
        UserError: there is no such model, or it has another vocabulary.
    """
    s = run.settings
    source = resolve(s.teacher, run.request.trust_remote_code, "--teacher", trusted=named or not run.resumes)
    run.output.protect("--teacher", s.teacher, source.on_disk)
    if s.teacher_cache:
        _check_place(run)
    own, teachers = run.tokenizer.get_vocab(), load_tokenizer(source).get_vocab()
    if own != teachers:
        token = min(set(own.items()) ^ set(teachers.items()))[0]
        raise UserError(
            f"--teacher {s.teacher}: expected the vocabulary of --model {run.source.name}, whose tokenizer has "
            f"{len(own):,} tokens, got one of {len(teachers):,} tokens; {excerpt(token)} is not the same in both"
        )
    sizes = [found.get_text_config().vocab_size for found in (config, load_config(source))]
    run.vocabulary = min(sizes)  # a model may have further rows, which belong to no token
    if sizes[0] != sizes[1] and run.vocabulary <= max(own.values()):
        raise UserError(
            f"--teacher {s.teacher}: expected a model of at least {max(own.values()) + 1:,} tokens, those of the "
            f"tokenizer, got {run.vocabulary:,}"
        )
    if s.teacher_cache and s.teacher_top_k >= run.vocabulary:
        raise UserError(f"--teacher-top-k {s.teacher_top_k}: expected less than the vocabulary, {run.vocabulary:,}")
    run.teacher_source = source


def _check_place(run: Run) -> None:
    path = path_named(run.settings.teacher_cache, "--teacher-cache").resolve()
    if path.is_relative_to(run.directory):
        raise UserError(f"--teacher-cache {path}: lies inside --output {run.directory}; name a file elsewhere")
    if not path.parent.is_dir():
        raise UserError(f"--teacher-cache {path}: there is no directory {path.parent}")


def load_teacher(run: Run) -> None:
    """Sets ``run.teacher``, before the model of the run is loaded. Without a teacher, it does nothing.

    Raises:
        UserError: the teacher's files or its cache are damaged, or it differs from the one that the run started with.
    """
    s, source = run.settings, run.teacher_source
    if source is None:
        return
    digest = run.shared.once(("teacher's digest", source), lambda: _digest(source))
    run.identify("teacher", digest, f"--teacher {s.teacher}")
    if s.teacher_cache:
        run.teacher = _completed_cache(run, digest)
    else:
        run.teacher = run.shared.once(("teacher", source, s.teacher_load), lambda: _model(run))


def _rows(run: Run) -> Stored[Row]:
    """The rows to train on and the held-out ones, as the trainer collates them."""
    from .trainer import packed

    return Stored(itertools.chain(run.parts.train, packed(run.parts.held_out)))


def _digest(source: ModelSource) -> str:
    """SHA-256 over the files of a model on this machine; over the name of one of the hub."""
    if source.directory is not None:
        return digest_of_files(source.directory / "config.json", *weight_files(source.directory))
    if source.on_disk is not None:
        return digest_of_files(pathlib.Path(source.on_disk))
    return hashlib.sha256(source.name.encode()).hexdigest()


def _model(run: Run) -> Any:
    """The teacher, frozen, as ``--teacher-load`` says."""
    s, source = run.settings, run.teacher_source
    assert source is not None
    run.report(f"teacher {printable(source.name)}")
    dtype, compute = parse_dtype(s.dtype), parse_computing_dtype(s.dtype, run.device)
    if s.teacher_load == STORED and not (is_4bit(source) or has_4bit_blocks(source)):
        model = load_dense(source, dtype, run.device, compute)
    else:
        loader = Loader(source, Form(), dtype, run.device, compute)
        stream = s.teacher_load if s.teacher_load in ("ram", "disk") else "none"
        base = Output(run.directory.with_name(f"{run.directory.name}-teacher"), run.request.overwrite)
        model = load_streamed(loader, stream, None, base)
    longest = max(max(row["position_ids"]) + 1 for row in _rows(run))
    limit = longest_input(model)
    if limit is not None and longest > limit:
        raise UserError(f"--teacher {s.teacher}: it reads at most {limit} tokens, and an example has {longest}")
    return model.eval().requires_grad_(False)


def _completed_cache(run: Run, digest: str) -> Any:
    """The cache of ``--teacher-cache``, with all rows of the run. The teacher is loaded if some are missing."""
    # Deferred, because importing the decoder takes seconds, and no other method needs it here.
    from qlora_ext.divergence import Logits, TopK

    from .teacher_cache import TeacherCache
    from .trainer import collate

    s = run.settings
    load = STORED if s.teacher_load == STORED else "4bit"  # streaming does not change what it computes
    key = {"teacher": digest, "load": load, "top_k": s.teacher_top_k, "vocabulary": run.vocabulary}
    cache = TeacherCache(path_named(s.teacher_cache, "--teacher-cache"), key)
    rows = _rows(run)
    missing = cache.missing(rows)
    run.report(f"teacher's log-probabilities: {len(rows) - len(missing):,} of {len(rows):,} rows are in the cache")
    if not missing:
        return cache
    teacher = _model(run)
    with counted("teaching") as progress, torch.no_grad():
        for begin in range(0, len(missing), s.batch_size):
            part = [rows[i] for i in missing[begin : begin + s.batch_size]]
            inputs = {name: value.to(run.device) for name, value in collate(part).items()}
            learnt = inputs.pop("labels")[:, 1:] != -100
            cache.add(part, TopK.of(Logits.of(teacher, inputs, learnt, run.vocabulary), s.teacher_top_k))
            progress(begin + len(part), len(missing), "")
    return cache
