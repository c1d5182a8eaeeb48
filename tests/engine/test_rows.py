"""Rows: every common shape is read, and what cannot be used is named by file, line and reason."""

import contextlib
import gzip
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament.engine.examples import (
    COLUMNS,
    SHAPES,
    Captioned,
    Chat,
    Completion,
    Judged,
    Preference,
    Prompt,
    Stepwise,
    Text,
    Tokenised,
    turns_apart,
)
from temperament.engine.rows import Rows, held_out, read_rows
from temperament.errors import UserError

U, A = {"role": "user", "content": "two?"}, {"role": "assistant", "content": "yes"}
N = {"role": "assistant", "content": "no"}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


SHAPED = [
    ({"text": "hello"}, Text("hello")),
    ({"messages": [U, A]}, Chat([U, A])),
    ({"messages": [{**U, "tool_calls": None}, A]}, Chat([U, A])),
    ({"messages": json.dumps([U, A])}, Chat([U, A])),
    ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
    ({"prompt": [U], "completion": [A]}, Completion([U], [A])),
    ({"prompt": [U], "completion": "yes"}, Completion([U], [A])),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("a", "b", "c")),
    ({"prompt": "two?", "chosen": [U, A], "rejected": [U, N]}, Preference([U], [A], [N])),
    ({"chosen": [U, A], "rejected": [U, N]}, Preference([U], [A], [N])),
    (
        {"chosen": "\n\nHuman: hi\n\nAssistant: no way", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        Preference("\n\nHuman: hi\n\nAssistant:", " no way", " no"),
    ),
    ({"prompt": "a", "completion": "b", "label": True}, Judged("a", "b", True)),
    ({"messages": [U, A], "label": False}, Judged([U], [A], False)),
    ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, Stepwise("a", ["b", "c"], [True, False])),
    ({"prompt": "a", "answer": 4}, Prompt("a", meta={"answer": 4})),
    ({"prompt": [U], "reward_model": {"style": "rule"}}, Prompt([U], meta={"reward_model": {"style": "rule"}})),
    (
        {"instruction": "add", "input": "2 3", "output": "5", "system": "be", "history": [["a", "b"]]},
        Chat([
            {"role": "system", "content": "be"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "add\n2 3"}, {"role": "assistant", "content": "5"},
        ]),
    ),
    ({"instruction": "two?", "input": "", "output": "yes"}, Chat([U, A])),
    ({"instruction": "two?", "chosen": "yes", "rejected": "no"}, Preference([U], [A], [N])),
    (
        {"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "yes"}], "system": ""},
        Chat([{**U}, {**A}]),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "two?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "yes"},
            ],
            "tools": '[{"name": "f"}]',
        },
        Chat(
            [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "1"},
                A,
            ],
            tools=[{"name": "f"}],
        ),
    ),
    (
        {"conversations": [{"from": "human", "value": "two?"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
        Preference([U], [A], [N]),
    ),
    ({"file_name": "a.png", "text": "a cat"}, Captioned("a.png", "a cat")),
    ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, Tokenised([1, 2, 3], [0.0, 1.0, 1.0])),
    ({"prompt": "a", "completion": "b", "images": ["x.png"]}, Completion("a", "b", images=("x.png",))),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", SHAPED)
def test_shapes(row, expected, tmp_path):
    (example,) = read_rows([row])
    from dataclasses import replace

    assert replace(example, origin=expected.origin) == expected
    (from_file,) = read_rows(write(tmp_path / "a.jsonl", [row]))
    assert replace(from_file, origin=expected.origin) == expected
    assert from_file.origin.line == 1


# ---- bad rows ---------------------------------------------------------------------------------------------------------------

BAD = [
    ({"prompt": "a"}, "column 'completion' is missing"),
    ({"prompt": "a", "completion": ""}, "column 'completion' is empty"),
    ({"prompt": "a", "completion": 4}, "column 'completion' holds a number"),
    ({"prompt": ["x"], "completion": "b"}, "message 1 of 'prompt' is text"),
    ({"prompt": [U, A], "completion": "b"}, "already an answer"),
    ({"prompt": "a", "completion": "\ud800"}, "surrogate"),
    ("just text", "not an object"),
]
BAD_CHATS = [
    ([], "no messages"),
    ([U], "from user, not from the assistant"),
    ([U, {"role": "assistnt", "content": "x"}], "unknown role 'assistnt': did you mean 'assistant'"),
    ([U, {"role": "assistant", "content": " "}], "message 2 of 'messages' (assistant) is empty"),
    ([{"role": "user", "content": None}, A], "(user) is empty"),
    ([U, {"role": "assistant", "content": 7}], "has a number as content"),
    ([{"from": "human", "value": "x"}, A], "that is sharegpt"),
    ("hello", "holds text, not a list"),
    ([U, {**A, "weight": -1}], "weight is -1"),
]


@pytest.mark.parametrize("row, why", BAD)
def test_bad_rows_stop_or_are_listed(row, why):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError) as e:
        read_rows([good, row, good])
    assert why in str(e.value) and "row 2" in str(e.value) and "1 of 3 rows bad" in str(e.value)
    rows = read_rows([good, row, good], on_bad="skip")
    assert [b.origin.line for b in rows.bad] == [2] and why in rows.bad[0].reason
    assert [r.origin.line for r in rows] == [1, 3]


@pytest.mark.parametrize("messages, why", BAD_CHATS)
def test_bad_conversations(messages, why):
    rows = read_rows([{"messages": [U, A]}, {"messages": messages}], on_bad="skip")
    assert len(rows) == 1 and why in rows.bad[0].reason


@pytest.mark.parametrize(
    "row, why",
    [
        ({"chosen": "a", "rejected": "a"}, "equal"),
        ({"chosen": "xa", "rejected": "yb"}, "no prompt"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "not true or false"),
        ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "one label for each"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "shifted"),
        ({"input_ids": [1, True]}, "list of token ids"),
        ({"conversations": [{"from": "hooman", "value": "x"}]}, "did you mean 'human'"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]}, "not JSON"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history"),
        ({"messages": [U, A], "tools": "[broken"}, "starts like JSON"),
    ],
)
def test_other_bad_rows(row, why):
    with pytest.raises(UserError, match=why):
        read_rows([row])


LINES = [
    (b'{"text": "a"\n', "not JSON"),
    (b'{"text": "\xff"}\n', "not UTF-8: byte 0xff at position 11"),
    (b'\xef\xbb\xbf{"text": "b"}\n', "byte order mark"),
    (b'{"text": "a", "text": "b"}\n', "'text' occurs twice"),
    (b"[" * 100000 + b"\n", "not JSON|nested too deeply"),
    (b'["a"]\n', "not an object"),
    (b'{"text": ' + b"9" * 5000 + b"}\n", "not usable JSON"),
]


@pytest.mark.parametrize("line, why", LINES)
def test_bad_lines(line, why, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\n' + line + b'{"text": "last"}')
    with pytest.raises(UserError, match=why) as e:
        read_rows(path)
    assert f"{path}, line 3" in str(e.value)
    rows = read_rows(path, on_bad="skip")
    assert [r.text for r in rows] == ["first", "last"] and [r.origin.line for r in rows] == [1, 4]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("temperament.engine.rows.LONGEST_ROW", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n{"text": "' + b"x" * (3 << 20) + b'"}\n{"text": "last"}\n')
    rows = read_rows(path, on_bad="skip")
    assert [r.text for r in rows] == ["first", "last"] and rows.bad[0].origin.line == 2 and "longer than" in rows.bad[0].reason


# ---- files ------------------------------------------------------------------------------------------------------------------


def test_json_list_knows_its_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n  {"text": "a"},\n  {\n "text": "b"\n},\n\n {"text": ""}\n]')
    with pytest.raises(UserError, match="line 7"):
        read_rows(path)
    assert [r.origin.line for r in read_rows(path, on_bad="skip")] == [2, 3]
    path.write_text('[{"text": "a"},\n {"text": "b"]')
    with pytest.raises(UserError, match="line 2"):
        read_rows(path)
    path.write_text('[{"text": "a"} {"text": "b"}]')
    with pytest.raises(UserError, match="a comma or the end"):
        read_rows(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        read_rows(path)
    assert len(read_rows(write(path, [{"text": "a"}, {"text": "b"}]))) == 2  # one object a line under the name .json


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffprompt,completion,label\n"a, ""b""\nc",d,true\r\ne,f,0\n'.encode())
    a, b = read_rows(path)
    assert a.prompt == 'a, "b"\nc' and a.label is True and b.label is False and b.origin.line == 4
    path.write_bytes(b"prompt,completion\na\nb,c\nd,\n\xff,e\n")
    rows = read_rows(path, on_bad="skip")
    assert [x.reason for x in rows.bad] == [
        "has 1 fields where the first line names 2",
        "column 'completion' is missing",
        "column 'prompt' holds byte 0xff, which is not UTF-8 (character 1)",
    ]
    assert len(rows) == 1 and rows[0].origin.line == 3
    path.write_text('prompt,completion\n"a,b\n')
    with pytest.raises(UserError, match="close the quotes"):
        read_rows(path)
    path.write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="its own name"):
        read_rows(path)
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na\tb\n")
    assert read_rows(tmp_path / "a.tsv")[0].completion == "b"


def test_parquet_gzip_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [U, A], "n": i} for i in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "splits")
    for source in (data, tmp_path / "a.parquet", tmp_path / "a.jsonl.gz", tmp_path / "saved", tmp_path / "splits"):
        found = read_rows(source)
        assert [r.messages for r in found] == [[U, A]] * 5 and [r.meta["n"] for r in found] == list(range(5))
    assert len(read_rows(tmp_path / "splits", split="test")) == 1
    with pytest.raises(UserError, match="train, test"):
        read_rows(tmp_path / "splits", split="dev")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not readable Parquet"):
        read_rows(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_bytes((tmp_path / "a.parquet").read_bytes())
    with pytest.raises(UserError, match="by its content"):
        read_rows(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "d.jsonl.gz")


def test_folders(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-0.jsonl", [{"text": "a"}])
    write(tmp_path / "data" / "train-1.jsonl", [{"text": "b"}])
    assert [r.text for r in read_rows(tmp_path)] == ["a", "b"]
    write(tmp_path / "data" / "test.jsonl", [{"text": "c"}])
    with pytest.raises(UserError, match="test, train; choose one"):
        read_rows(tmp_path)
    assert [r.text for r in read_rows(tmp_path, split="train")] == ["a", "b"]
    write(tmp_path / "data" / "more.jsonl", [{"text": "d"}])
    (tmp_path / "data" / "train-0.jsonl").unlink()
    (tmp_path / "data" / "train-1.jsonl").unlink()
    with pytest.raises(UserError, match=r"files without a split in their names \(more.jsonl\)"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="split is 'validation'"):
        read_rows(tmp_path, split="validation")


def test_wrong_sources(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "u16.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    for source, why in [
        (tmp_path / "a.pkl", "pickles are never opened"),
        (tmp_path / "train.jsonl", "no rows"),
        (tmp_path / "trian.jsonl", "did you mean 'train.jsonl'"),
        (tmp_path / "nowhere" / "a.jsonl", "there is no folder"),
        (tmp_path / "empty", "no file that is read here"),
        (tmp_path / "u16.jsonl", "UTF-16"),
        ([], "no rows"),
        ({"train": []}, "of a dict of splits, one"),
        (7, "give a path"),
    ]:
        with pytest.raises(UserError, match=why) as e:
            read_rows(source)
        assert e.value.exit_code == 2 and "\n" not in str(e.value)


def test_columns():
    row = {"question": "a", "answer": "b", "prompt": "other"}
    (one,) = read_rows([row], columns={"prompt": "question", "completion": "answer"})
    assert (one.prompt, one.completion, one.meta) == ("a", "b", {"prompt (original)": "other"})
    for columns, why in [
        ({"promt": "question"}, "did you mean 'prompt'"),
        ({"prompt": "questoin"}, "did you mean 'question'"),
        ({"prompt": "question", "completion": "question"}, "two of our columns"),
    ]:
        with pytest.raises(UserError, match=why):
            read_rows([row], columns=columns)
    with pytest.raises(UserError, match=r"columns: \{prompt: question, completion: answer\}"):
        read_rows([{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="did you mean 'messages'"):
        read_rows([{"mesages": []}])
    with pytest.raises(UserError, match="shape"):
        read_rows([row], shape="complete")


def test_what_could_be_read_two_ways_is_said():
    both = {"prompt": "a", "completion": "b", "messages": [U, A]}
    rows = read_rows([both])
    assert rows.shape == "completion" and "chat" in rows.notes[0]
    assert read_rows([both], shape="chat").shape == "chat"
    assert "did you mean 'chosen'" in read_rows([{"prompt": "a", "choosen": "b", "rejected": "c"}]).notes[0]


def test_shape_follows_most_rows():
    rows = read_rows([{"prompt": "a"}, {"prompt": "a", "completion": "b"}], on_bad="skip")
    assert rows.shape == "completion" and len(rows.bad) == 1
    assert isinstance(rows, Rows) and rows.shape in SHAPES
    assert len(read_rows([{"text": "a"}] * 9, limit=4)) == 4


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
nested = lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3)
json_values = st.recursive(leaves, nested, max_leaves=6)
columns = st.sampled_from(COLUMNS)
messages = st.fixed_dictionaries({"role": json_values | st.just("user"), "content": json_values}) | st.just(A)
any_rows = st.dictionaries(columns, json_values | st.lists(messages, max_size=3), min_size=1, max_size=5) | json_values


@settings(max_examples=150, deadline=None)
@given(st.lists(any_rows, max_size=4))
def test_nothing_but_user_errors(rows):
    with contextlib.suppress(UserError):
        read_rows(rows, on_bad="skip")


# ---- splits -----------------------------------------------------------------------------------------------------------------


def test_held_out_rows():
    rows = list(read_rows([{"prompt": f"q{i % 40}", "completion": f"a{i}"} for i in range(60)]))
    train, held = held_out(rows, 0.1)
    assert len(train) + len(held) == 60 and 6 <= len(held) <= 7
    assert not {r.prompt for r in train} & {r.prompt for r in held}  # no question on both sides
    shuffled = held_out(rows[::-1], 0.1)[1]
    assert {r.prompt for r in shuffled} == {r.prompt for r in held}
    assert held_out(rows, 0)[1] == [] and len(held_out(rows, 5)[1]) in (5, 6)
    assert [r.origin.line for r in train] == sorted(r.origin.line for r in train)
    with pytest.raises(UserError, match="hold out fewer"):
        held_out(rows, 60)


def test_turns_apart():
    chat = Chat([U, A, U, {**A, "weight": 0}, U, N])
    assert [c.messages for c in turns_apart(chat)] == [chat.messages[:2], chat.messages]
