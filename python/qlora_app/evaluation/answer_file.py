"""The answers of a model in a file of JSON lines, which are added one at a time.

The first line describes the run: the model and the options. For each task, a line with the number and the digest of its
questions is followed by one line per answer, in any order.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from qlora_ext.untrusted import FileError, Schema, check, excerpt, parse_json, printable, read_text

from ..errors import UserError
from ..outputs.files import append_json_line, write_json_lines

MARK = "qlora-ext evaluate"  # identifies the files
_MAX_BYTES = 4 << 30
_HEAD: Schema = {"written_by": str, "model": str, "digest": str, "tasks": [str], "options": dict}
_TASK: Schema = {"task": str, "questions": int, "digest": str}
_ANSWER: Schema = {"task": str, "id": int, "answer": str, "score": float, "correct": bool}


@dataclasses.dataclass
class Answers:
    """The answers to a task so far.

    Attributes:
        questions: how many the task has.
        digest: of its questions.
        records: the lines of the file, by the number of the question.
    """

    questions: int
    digest: str
    records: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def correct(self) -> int:
        return sum(record["correct"] for record in self.records.values())

    @property
    def scores(self) -> list[float]:
        return [record["score"] for record in self.records.values()]


class AnswerFile:
    """The answers of a run, in memory and, if they are saved, in a file.

    Attributes:
        head: the first line.
        tasks: the answers to each task.
    """

    def __init__(self, head: dict[str, Any], path: pathlib.Path | None = None) -> None:
        self.head, self._path = head, path
        self.tasks: dict[str, Answers] = {}

    @classmethod
    def begin(cls, head: dict[str, Any], path: pathlib.Path | None) -> AnswerFile:
        """A file without answers. An earlier one is replaced."""
        head = {"written_by": MARK, **head}
        if path is not None:
            write_json_lines(path, [head])
        return cls(head, path)

    @classmethod
    def read(cls, path: pathlib.Path) -> AnswerFile:
        """The answers in a file. A last line that an interruption has cut is ignored.

        Raises:
            FileError: the file is damaged, or of another kind.
        """
        shown = printable(path)
        lines = read_text(path, _MAX_BYTES).split("\n")
        lines.pop()  # empty, or cut
        if not lines or MARK not in lines[0]:
            raise FileError(f"{shown}: expected answers that qlora-ext evaluate wrote, got another file")
        found = cls(parse_json(lines[0], f"{shown}, line 1", _HEAD), path)
        for number, line in enumerate(lines[1:], 2):
            found._take(parse_json(line, f"{shown}, line {number}", dict), f"{shown}, line {number}")
        return found

    def _take(self, record: dict[str, Any], place: str) -> None:
        if "questions" in record:
            check(record, _TASK, place)
            if record["task"] in self.tasks:
                raise FileError(f"{place}: the task {excerpt(record['task'])} is there twice")
            self.tasks[record["task"]] = Answers(record["questions"], record["digest"])
            return
        check(record, _ANSWER, place)
        answers = self.tasks.get(record["task"])
        if answers is None or not 0 <= record["id"] < answers.questions or record["id"] in answers.records:
            raise FileError(f"{place}: expected one answer per question of a task above, got {excerpt(record)}")
        answers.records[record["id"]] = record

    def repair(self) -> None:
        """Removes a cut last line from the file, after ``read``."""
        assert self._path is not None
        records = [self.head]
        for name, answers in self.tasks.items():
            records += [{"task": name, "questions": answers.questions, "digest": answers.digest}]
            records += answers.records.values()
        write_json_lines(self._path, records)

    def add(self, record: dict[str, Any]) -> None:
        """Adds the line of a task or an answer."""
        self._take(record, "evaluate")
        if self._path is not None:
            append_json_line(self._path, record)

    def start(self, task: str, questions: int, digest: str) -> Answers:
        """The answers to a task, none if it was not begun before.

        Raises:
            UserError: it was begun with other questions.
        """
        if task not in self.tasks:
            self.add({"task": task, "questions": questions, "digest": digest})
        found = self.tasks[task]
        if (found.questions, found.digest) != (questions, digest):
            raise UserError(
                f"--output {self._path}: has answers to other questions of {excerpt(task)}; name another file, or add "
                "--overwrite"
            )
        return found

    def require_complete(self) -> None:
        """Rejects answers of an interrupted run.

        Raises:
            UserError: answers are missing.
        """
        for name in self.head["tasks"]:
            answers = self.tasks.get(name)
            count, of = (0, "its") if answers is None else (len(answers.records), answers.questions)
            if count != of:
                raise UserError(
                    f"{self._path}: has {count} of {of} answers to {excerpt(name)}; "
                    "finish it with the command that began it"
                )
