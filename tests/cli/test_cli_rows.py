"""The training rows of examples: formatted by the chat template, in complete turns, with counts of dropped rows."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import chat_templates
from commands import Paths
from qlora_ext.cli.data import check_template, encode, pack, split, summary
from qlora_ext.cli.errors import UserError
from qlora_ext.cli.training.settings import Settings

ASKED, CALLED, FOUND, SAID = (
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two", "reasoning_content": "easy"},
)
TOOLS = [{"name": "add"}]


@pytest.fixture
def tokenizer(paths: Paths) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def texts(tokenizer: Any, row: dict[str, list[int]]) -> tuple[str, str]:
    """A row's text, and the part with labels."""
    learnt = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learnt)


def rows(tokenizer: Any, *examples: Any, seq_len: int = 1000, **options: Any) -> tuple[list[Any], list[str]]:
    counts: collections.Counter[str] = collections.Counter()
    found = list(encode(tokenizer, examples, seq_len, counts, **options))
    return found, summary(counts, seq_len)


def test_tools_and_their_calls_are_written_and_learnt(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_templates.TOOLS
    (row,), left_out = rows(tokenizer, {"messages": [ASKED, CALLED, FOUND, SAID], "tools": TOOLS})
    text, learnt = texts(tokenizer, row)
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call></>'
    assert text == f'<tools>{{"name": "add"}}</tools><user>1+1</><assistant>{call}<tool>2</><assistant>two</>'
    assert learnt == f"{call}two</>"
    assert left_out == []


def test_every_turn_is_learnt_if_the_template_changes_earlier_ones(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_templates.THINKING
    found, left_out = rows(tokenizer, {"messages": [ASKED, SAID, {"role": "user", "content": "2+2"}, SAID]})
    assert [texts(tokenizer, row) for row in found] == [
        ("<user>1+1</><assistant>(easy)two</>", "(easy)two</>"),
        ("<user>1+1</><assistant>two</><user>2+2</><assistant>(easy)two</>", "(easy)two</>"),
    ]
    assert left_out == []


def test_an_answer_that_begins_otherwise_than_it_is_asked_for(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_templates.PROMPTING
    (row,), _ = rows(tokenizer, [ASKED, SAID])
    assert texts(tokenizer, row) == ("<user>1+1</><assistant>two</>", "<assistant>two</>")
    tokenizer.chat_template = chat_templates.REWRITING
    found, left_out = rows(tokenizer, [ASKED, SAID], [SAID])
    assert len(found) == 1  # the row of the answer without a question
    assert left_out == ["1 dropped: the chat template changes the question after it is answered"]


def test_cut_and_dropped_examples_are_counted(tokenizer: Any) -> None:
    long = {"role": "user", "content": "x" * 30}
    examples = [
        [ASKED, SAID],
        [ASKED, {"role": "assistant", "content": "y" * 30}],
        [long, SAID],
        [long, SAID],
        {"messages": [ASKED]},
        "z" * 50,
        "z",
        "",
    ]
    found, left_out = rows(tokenizer, *examples, seq_len=20)
    assert [len(row["input_ids"]) for row in found] == [8, 20, 20, 20, 10]
    assert left_out == [
        "3 dropped: nothing to learn (no answer of the assistant, or a single token)",
        "2 dropped: the answer begins beyond --seq-len 20",
        "1 cut to --seq-len 20",
    ]
    with pytest.raises(UserError, match="0 of 4 examples are usable.*4 dropped: the answer begins"):
        split(tokenizer, [[long, SAID]] * 4, 20, None, 1, 0)


def test_preferences(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_templates.PLAIN
    other = {"role": "assistant", "content": "three"}
    pair = {"prompt": [ASKED, SAID, ASKED], "chosen": [SAID], "rejected": [other]}
    (row,), _ = rows(tokenizer, pair)
    assert {name: tokenizer.decode(ids) for name, ids in row.items()} == {
        "prompt_ids": "<user>1+1</><assistant>two</><user>1+1</><assistant>",
        "chosen_ids": "two</>",
        "rejected_ids": "three</>",
    }
    size = len(row["prompt_ids"])
    found, left_out = rows(tokenizer, pair, seq_len=size + 2)
    assert [len(found[0][name]) for name in row] == [size, 2, 2]
    assert left_out == [f"1 cut to --seq-len {size + 2}"]
    assert rows(tokenizer, pair, seq_len=size) == (
        [],
        [f"1 dropped: the answer begins beyond --seq-len {size}"],
    )
    same = rows(tokenizer, pair | {"rejected": [SAID]})
    assert same == ([], ["1 dropped: chosen and rejected are the same, up to --seq-len 1000"])
    (chosen,), _ = rows(tokenizer, pair, preferences=False)
    assert texts(tokenizer, chosen)[1] == "two</>two</>"
    tokenizer.chat_template = None
    (plain,), _ = rows(tokenizer, {"prompt": [ASKED], "chosen": [SAID], "rejected": [other]})
    assert [tokenizer.decode(ids) for ids in plain.values()] == ["1+1\n", "two<eos>", "three<eos>"]


def test_conversations_need_a_template_that_supports_their_messages(tokenizer: Any) -> None:
    talk = {"messages": [ASKED, SAID]}
    several = {"prompt": [ASKED, SAID, ASKED], "chosen": [SAID], "rejected": [CALLED]}
    for example in (talk, several):
        with pytest.raises(UserError, match="--data D has conversations, but the tokenizer of M has no chat template"):
            check_template(tokenizer, ["text", example], "D", "M")
    check_template(tokenizer, ["text", [ASKED, SAID], several | {"prompt": [ASKED]}], "D", "M")
    tokenizer.chat_template = chat_templates.PLAIN
    check_template(tokenizer, [talk, several | {"rejected": [SAID]}], "D", "M")
    for example, part in ((talk | {"tools": TOOLS}, "tools"), ({"messages": [ASKED, CALLED]}, "tool_calls")):
        with pytest.raises(UserError, match=f"--data D has {part}, which the chat template of M does not support"):
            check_template(tokenizer, [example], "D", "M")
    tokenizer.chat_template = chat_templates.TOOLS
    check_template(tokenizer, [{"messages": [ASKED, CALLED, FOUND, SAID], "tools": TOOLS}], "D", "M")


def test_epochs_count_as_the_trainer_does(tokenizer: Any) -> None:
    settings = Settings(epochs=1.5, batch_size=2, grad_accum=3)
    assert settings.train_rows is None
    assert [settings.steps(rows) for rows in (1, 6, 7, 12, 13)] == [2, 2, 3, 3, 5]
    assert Settings(max_steps=7).steps(1000) == 7
    examples = [[{"role": "user", "content": f"{i} "}, SAID] for i in range(40)]
    all_of_them = split(tokenizer, examples, 20, None, 5, seed=3)
    assert len(all_of_them.held_out) == 4  # a tenth
    assert sum(row["position_ids"].count(0) for row in all_of_them.train) == 36
    few = split(tokenizer, examples, 20, 3, 5, seed=3)
    assert len(few.train) == 3
    assert len(few.held_out) == 5


def test_packing_stops_when_there_is_enough() -> None:
    def endless() -> Any:
        while True:
            yield {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}

    packed = pack(endless(), 7, max_rows=2)
    assert [row["input_ids"] for row in packed] == [[1, 2, 3, 1, 2, 3]] * 2


def test_finetune_reports_dropped_examples(
    refused: Any, paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are raised before the model is read, if possible."""
    monkeypatch.setattr(
        "qlora_ext.cli.models.loading.Loader.while_loading", lambda *a: pytest.fail("the model was read")
    )
    data = tmp_path / "data.jsonl"
    arguments = ["finetune", "--model", paths["model"], "--data", data, "--output", tmp_path / "run"]
    data.write_text("".join(json.dumps({"prompt": "q" * 300, "completion": "r"}) + "\n" for _ in range(5)))
    assert "5 dropped: the answer begins beyond --seq-len 256" in refused(*arguments)
    data.write_text(json.dumps({"messages": [ASKED, SAID]}) + "\n")
    assert "no chat template" in refused(*arguments)
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "r"}) + "\n" for i in range(5)))
    for options, part in (
        (["--target-modules", "nowhere"], "nowhere"),
        (["--optimizer", "sgdd"], "sgdd"),
        (["--method", "dpo"], "rows with prompt, chosen and rejected"),
        (["--epochs", "1", "--max-steps", "5"], "give one of them"),
        (["--epochs", "-1"], "--epochs -1"),
        (["--beta", "0"], "--beta 0"),
        (["--beta", "0.2"], "--beta is an option of DPO"),
    ):
        assert part in refused(*arguments, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answered", ["", " \n"])
def test_an_empty_answer_teaches_nothing(tokenizer: Any, answered: str) -> None:
    silent = {"role": "assistant", "content": answered}
    user = {"role": "user", "content": "q"}
    preference = {"prompt": [user], "chosen": [silent], "rejected": [{"role": "assistant", "content": "no"}]}
    for example in ([user, silent], {"messages": [user, silent]}, preference):
        for options in ({}, {"preferences": False}):
            found, left_out = rows(tokenizer, example, **options)
            assert found == []
            assert left_out == ["1 dropped: nothing to learn (no answer of the assistant, or a single token)"]
    later = [user, silent, user, {"role": "assistant", "content": "r"}]
    tokenizer.chat_template = chat_templates.TOOLS
    (row,), left_out = rows(tokenizer, {"messages": later})
    assert texts(tokenizer, row)[1] == "r</>"
    assert left_out == []


def test_a_long_text_goes_to_the_tokenizer_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of lines, of words, or of one word: all tokens are learnt."""
    from qlora_ext.cli.data import encoding

    monkeypatch.setattr(encoding, "_PIECE", 100)
    for text in ("a line\n" * 90, "word " * 120, "x" * 700, "short"):
        pieces = list(encoding._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 200
        found, _ = rows(tokenizer, text, seq_len=50)
        assert "".join(tokenizer.decode(row["input_ids"]) for row in found) == text
        assert all(len(row["input_ids"]) <= 50 for row in found)


def test_a_long_answer_is_tokenized_as_far_as_it_is_used(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_ext.cli.data import encoding

    seen: list[int] = []

    class Counting:
        chat_template = None
        eos_token = tokenizer.eos_token

        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

    monkeypatch.setattr(encoding, "_PIECE", 100)
    monkeypatch.setattr(encoding, "_MAX_TOKEN_CHARACTERS", 4)
    pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y" * 5000}]
    (row,), left_out = rows(Counting(), pair, seq_len=50)
    assert max(seen) == 100 + 4 * 50
    assert len(row["input_ids"]) == 50
    assert left_out == ["1 cut to --seq-len 50"]
