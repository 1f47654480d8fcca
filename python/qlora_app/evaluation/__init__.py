"""Evaluation: the accuracy of a model on tasks, and whether two models differ.

``tasks`` says what a question is, and a module per source makes them; ``answering`` asks a model; ``answer_file`` saves
its answers; ``sandbox`` runs programs that it writes; ``evaluating`` puts these together, and
``comparing`` compares two models.

Example:
    >>> from qlora_app import evaluate
    >>> from qlora_app.evaluation import compare
    >>> def p_value(model, adapter):
    ...     for name, files in (("base", {"model": model}), ("adapted", {"adapter": adapter})):
    ...         evaluate(**files, tasks=["gym:chain_sum"], output=f"{name}.jsonl")
    ...     return compare("base.jsonl", "adapted.jsonl")["tasks"][0]["p"]
"""

from .comparing import compare
from .statistics import mcnemar, wilson

__all__ = ["compare", "mcnemar", "wilson"]
