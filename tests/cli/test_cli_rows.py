"""The training rows of examples: formatted by the chat template, in complete turns, with counts of dropped rows."""

from __future__ import annotations

import collections
import io
import json
import pathlib
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat_templates
from commands import Paths
from qlora_app.data import check_template, encode, encoding, held_out, pack, split, split_prompts, summary
from qlora_app.decoding.rollouts import _encoded
from qlora_app.errors import UserError
from qlora_app.main import main
from qlora_app.quantization.calibrate import CalibrationOptions, tokens_of
from qlora_app.training.settings import Settings
from tiny_models import add_special_tokens

ASKED, CALLED, FOUND, SAID = (
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two", "reasoning_content": "easy"},
)
OTHER = {"role": "assistant", "content": "three"}
TOOLS = [{"name": "add"}]


@pytest.fixture
def tokenizer(paths: Paths) -> Any:
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
    pair = {"prompt": [ASKED, SAID, ASKED], "chosen": [SAID], "rejected": [OTHER]}
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
    (plain,), _ = rows(tokenizer, {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]})
    assert [tokenizer.decode(ids) for ids in plain.values()] == ["1+1\n", "two<eos>", "three<eos>"]


@pytest.mark.parametrize(
    ("single", "begin", "end"),
    [("<bos> $A", "<bos>", ""), ("<bos> $A <eos>", "<bos>", "<eos>"), ("$A <eos>", "", "<eos>"), ("$A", "", "")],
)
def test_special_tokens_of_the_tokenizer(tokenizer: Any, single: str, begin: str, end: str) -> None:
    """A prompt begins as the tokenizer begins a text, and only texts and answers end."""
    add_special_tokens(tokenizer, single)
    preference = {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}
    (pair, ranked), _ = rows(tokenizer, [ASKED, SAID], preference)
    assert texts(tokenizer, pair) == (f"{begin}1+1\ntwo<eos>", "two<eos>")
    assert [tokenizer.decode(ids) for ids in ranked.values()] == [f"{begin}1+1\n", "two<eos>", "three<eos>"]
    prompt = {"prompt": [ASKED], "columns": {}}
    for row in split_prompts(tokenizer, [prompt] * 2, 10, 1, 0).train:
        assert row["prompt"] == "1+1\n"  # what a reward function gets
        assert tokenizer.decode(row["prompt_ids"]) == f"{begin}1+1\n"
    for text in ("count 1 2 3", f"{begin}count 1 2 3{end}"):
        found, _ = rows(tokenizer, text, seq_len=8)
        assert "".join(tokenizer.decode(row["input_ids"]).removeprefix(begin) for row in found) == f"count 1 2 3{end}"
        assert all(tokenizer.decode(row["input_ids"]).startswith(begin) for row in found)
        assert len(found[0]["input_ids"]) == 8
    _, left_out = rows(tokenizer, "")
    assert left_out == ["1 dropped: nothing to learn (no answer of the assistant, or a single token)"]


def test_a_chat_template_writes_all_special_tokens(tokenizer: Any) -> None:
    add_special_tokens(tokenizer, "<bos> $A <eos>")
    for begin in ("", "{{ bos_token }}"):
        tokenizer.chat_template = begin + chat_templates.PLAIN
        expected = tokenizer.apply_chat_template([ASKED, SAID])["input_ids"]
        preference = {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}
        (row, ranked), _ = rows(tokenizer, [ASKED, SAID], preference)
        assert row["input_ids"] == ranked["prompt_ids"] + ranked["chosen_ids"] == expected
        (prompt,) = split_prompts(tokenizer, [{"prompt": [ASKED], "columns": {}}] * 2, 50, 1, 0).train
        assert prompt["prompt_ids"] == ranked["prompt_ids"]
        (text,), _ = rows(tokenizer, tokenizer.decode(expected))
        assert text["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + chat_templates.PLAIN])
def test_questions_are_encoded_as_in_rows(
    paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    """By ``generate``, ``chat``, ``serve`` and the decoding of TRL's GRPO."""
    pytest.importorskip("starlette", reason="starlette is not installed")

    from qlora_app.serving.application import Application

    tokenizer = add_special_tokens(AutoTokenizer.from_pretrained(paths["model"]), "<bos> $A <eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    (row,), _ = rows(tokenizer, {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]})
    seen: list[list[int]] = []

    def complete(model: Any, tokenizer: Any, prompt: list[int], *options: Any) -> str:
        seen.append(prompt)
        return ""

    monkeypatch.setattr("qlora_app.commands.generate.complete", complete)
    monkeypatch.setattr("qlora_app.generation.conversation.complete", complete)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    generate = ["generate", "1+1", "--model", str(tmp_path), "--compile", "never"]
    for arguments in (generate, ["chat", *generate[2:]], [*generate, "--raw"]):
        assert main(arguments) == 0
    application = Application({}, tokenizer, len(tokenizer), None)
    assert [*seen[:2], application._tokens([ASKED], "messages", [])] == [row["prompt_ids"]] * 3
    raw = [tokenizer.bos_token_id, *tokenizer("1+1", add_special_tokens=False)["input_ids"]]
    assert [seen[2], application._tokens("1+1", "prompt", []), application._tokens("<bos>1+1", "prompt", [])] == [
        raw
    ] * 3
    assert _encoded(tokenizer, "1+1") == raw
    assert template is None or _encoded(tokenizer, [ASKED]) == row["prompt_ids"]


def test_sequences_to_measure_on_begin_as_texts(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    add_special_tokens(tokenizer, "<bos> $A <eos>")
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": "word " * n}) for n in range(1, 30)]
    data.write_text("\n".join(lines))
    options = CalibrationOptions(calibrate=str(data))
    for found in (held_out.blocks(str(data), tokenizer, 1000, 40), tokens_of(options, tokenizer, 1000, 40)):
        assert found.shape[1] == 40
        assert len(found) == 25
        assert (found[:, 0] == tokenizer.bos_token_id).all()


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
    monkeypatch.setattr(encoding, "_PIECE", 100)
    for text in ("a line\n" * 90, "word " * 120, "x" * 700, "short"):
        pieces = list(encoding._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 200
        found, _ = rows(tokenizer, text, seq_len=50)
        assert "".join(tokenizer.decode(row["input_ids"]) for row in found) == text
        assert all(len(row["input_ids"]) <= 50 for row in found)


def test_a_long_answer_is_tokenized_as_far_as_it_is_used(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
