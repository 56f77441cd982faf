"""dataset.py: what becomes of a row, from its columns to its target tokens."""

import json

import datasets
import numpy as np
import pytest
from conftest import make_rows, write_jsonl

from dataset import Encoder, Triple, Unusable, UserError, end_of_turn_id, epoch_order, load_rows, prepare, read_triple

USER = [{"role": "user", "content": "天"}]


def coig(chosen="好", rejected="坏", conversations=None, **more):
    turns = conversations if conversations is not None else [{"from": "human", "value": "天"}]
    return {
        "conversations": turns, "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected}, "domain": "chat", **more,
    }  # fmt: skip


# --- rows to triples


@pytest.mark.parametrize(
    "row, prompt",
    [
        (coig(), USER),
        ({"conversations": USER, "chosen": "好", "rejected": "坏"}, USER),
        ({"prompt": "天", "chosen": "好", "rejected": "坏"}, "天"),
        ({"chosen": "天好", "rejected": "天坏"}, "天"),
        (
            {
                "prompt": USER,
                "chosen": [{"role": "assistant", "content": "好"}],
                "rejected": [{"role": "assistant", "content": "坏"}],
            },
            USER,
        ),
        (
            {
                "chosen": [*USER, {"role": "assistant", "content": "好"}],
                "rejected": [*USER, {"role": "assistant", "content": "坏"}],
            },
            USER,
        ),
        (  # UltraFeedback's: the prompt as text beside whole conversations
            {
                "prompt": "天",
                "chosen": [*USER, {"role": "assistant", "content": "好"}],
                "rejected": [*USER, {"role": "assistant", "content": "坏"}],
            },
            USER,
        ),
    ],
    ids=["COIG-P", "responses as text", "text", "text, implicit", "messages", "messages, implicit", "UltraFeedback"],
)
def test_forms(row, prompt):
    triple = read_triple(row)
    assert (triple.prompt, triple.chosen, triple.rejected) == (prompt, "好", "坏")


def test_all_turns_and_the_system_turn_are_kept():
    turns = [
        {"from": "system", "value": "你"}, {"from": "human", "value": "一"}, {"from": "gpt", "value": "二"},
        {"from": "human", "value": "三"},
    ]  # fmt: skip
    roles = [(turn["role"], turn["content"]) for turn in read_triple(coig(conversations=turns)).prompt]
    assert roles == [("system", "你"), ("user", "一"), ("assistant", "二"), ("user", "三")]
    assert read_triple(coig(system="你")).prompt == [
        {"role": "system", "content": "你"},
        *USER,
    ]  # LLaMA-Factory's column


BAD_ROWS = {
    "row is not an object": ["text"],
    "chosen: missing": {"conversations": USER, "rejected": "坏"},
    "rejected: missing": coig() | {"rejected": None},
    "chosen: wrong type": coig() | {"chosen": 7},
    "rejected: wrong type": coig() | {"rejected": {"from": "gpt", "value": ["坏"]}},
    "chosen: a turn without role or text": coig() | {"chosen": {"from": "gpt"}},
    "conversations: wrong type": coig(conversations=3),
    "conversations: unknown role": coig(conversations=[{"from": "tool", "value": "天"}]),
    "chosen: not valid Unicode": coig(chosen="\ud800"),
    "prompt: wrong type": {"prompt": 3, "chosen": "好", "rejected": "坏"},
    "prompt: empty": coig(conversations=[]),
    "prompt: does not end with a user turn": coig(conversations=[{"from": "gpt", "value": "天"}]),
    "response: not one assistant turn": coig() | {"chosen": {"from": "human", "value": "好"}},
    "response: empty": coig(rejected=" \n"),
    "chosen equals rejected": coig(rejected="好"),
}


@pytest.mark.parametrize("cause", BAD_ROWS)
def test_bad_rows_are_named(cause):
    with pytest.raises(Unusable) as error:
        read_triple(BAD_ROWS[cause])
    assert str(error.value) == cause


# --- triples to tokens


def encode(tokenizer, prompt, chosen, rejected, max_length=512):
    return Encoder(tokenizer, max_length).encode([Triple(prompt, chosen, rejected, "")])[0]


def test_targets_are_the_response_and_one_end_of_turn(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(tokenizer) == end != tokenizer.eos_token_id
    row = encode(tokenizer, USER, "好!快", "坏")
    prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n天<|im_end|>\n"
    assert tokenizer.decode(row["prompt_ids"]) == prompt + "<|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "好!快<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "坏<|im_end|>"
    assert row["chosen_ids"].count(end) == row["rejected_ids"].count(end) == 1
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
    assert not row["truncated"]


def test_token_0_counts(tokenizer):
    """In Qwen's vocabulary id 0 is "!": a mask by id would lose it."""
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    assert encode(tokenizer, USER, "!!!", "坏")["chosen_ids"][:3] == [0, 0, 0]


def test_boundary_is_not_merged(tokenizer):
    """The prompt ends with a line break; a response that begins with one would merge with it into one token."""
    merged = tokenizer("\n\n")["input_ids"]
    assert len(merged) == 1
    row = encode(tokenizer, USER, "\n好", "坏")
    (newline,) = tokenizer("\n")["input_ids"]
    assert row["prompt_ids"][-1] == newline and row["chosen_ids"][0] == newline
    assert row["prompt_ids"] == encode(tokenizer, USER, "好", "坏")["prompt_ids"]


def test_special_tokens_in_a_text_are_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    question = [{"role": "user", "content": "何为<|im_end|>\n<|im_start|>system\n?"}]
    row = encode(tokenizer, question, "<|im_end|>与<|endoftext|>", "坏<|im_end|>坏")
    plain = encode(tokenizer, USER, "好", "坏")
    specials = set(tokenizer.all_special_ids)
    count = lambda ids: sum(i in specials for i in ids)  # noqa: E731
    assert count(row["prompt_ids"]) == count(plain["prompt_ids"])
    assert count(row["chosen_ids"]) == count(row["rejected_ids"]) == 1 and row["rejected_ids"][-1] == end
    assert tokenizer.decode(row["chosen_ids"][:-1]) == "<|im_end|>与<|endoftext|>"
    assert "何为<|im_end|>\n<|im_start|>system\n?<|im_end|>" in tokenizer.decode(row["prompt_ids"])
    marks = encode(tokenizer, USER, "\ufdd07\ufdd1<|im_end|>", "坏")  # our own marks in a text are text, too
    assert tokenizer.decode(marks["chosen_ids"][:-1]) == "\ufdd07\ufdd1<|im_end|>"


def test_plain_text_ends_with_eos(tokenizer):
    row = encode(tokenizer, "天地", "玄黄", "人")
    assert tokenizer.decode(row["prompt_ids"]) == "天地"
    assert tokenizer.decode(row["chosen_ids"]) == "玄黄<|endoftext|>"


def test_truncation_keeps_the_header_and_fakes_no_end(tokenizer):
    end = end_of_turn_id(tokenizer)
    whole = encode(tokenizer, USER, "好" * 10, "坏" * 200)
    n_prompt, n_long = len(whole["prompt_ids"]), len(whole["rejected_ids"])
    exact = encode(tokenizer, USER, "好" * 10, "坏" * 200, max_length=n_prompt + n_long)
    assert exact == whole
    short = encode(tokenizer, USER, "好" * 10, "坏" * 200, max_length=n_prompt + n_long - 1)
    assert short["truncated"]
    assert len(short["prompt_ids"]) + len(short["rejected_ids"]) == n_prompt + n_long - 1
    half = encode(tokenizer, USER, "好" * 10, "坏" * 200, max_length=64)
    assert half["prompt_ids"] == whole["prompt_ids"][-32:]  # its last tokens: the assistant's header stays
    assert half["rejected_ids"] == whole["rejected_ids"][:32] and half["rejected_ids"][-1] != end
    assert half["chosen_ids"] == whole["chosen_ids"][:32]


def test_a_pair_that_differs_behind_the_cut_is_dropped(tokenizer):
    row = encode(tokenizer, USER, "好" * 200 + "快", "好" * 200 + "慢", max_length=64)
    assert isinstance(row, Unusable) and str(row) == "chosen equals rejected after truncation"


def test_a_template_that_rewrites_answered_prompts_is_refused(tokenizer, monkeypatch):
    encoder, triple = Encoder(tokenizer, 512), Triple(USER, "好", "坏", "")
    monkeypatch.setattr(tokenizer, "chat_template", "{% if add_generation_prompt %}A{% else %}B{% endif %}")
    assert "chat template changes the prompt" in str(encoder.encode([triple])[0])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    assert str(encoder.encode([triple])[0]) == "refused by the chat template"


# --- whole sets


def write(tmp_path, rows, name):
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif name.endswith(".jsonl"):
        write_jsonl(path, rows)
    else:
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "data/train-00000-of-00001.parquet"])
def test_every_file_form_gives_the_same_pairs(tmp_path, tokenizer, name):
    path = write(tmp_path, make_rows(), name)
    data = prepare(load_rows(str(tmp_path if "/" in name else path)), tokenizer)
    expected = prepare(load_rows(str(write(tmp_path, make_rows(), "other.jsonl"))), tokenizer)
    assert data.n_rows == len(make_rows()) and not data.dropped
    assert data.fingerprint == expected.fingerprint  # of all token ids and of the split


def test_split_by_prompt(tmp_path, tokenizer):
    rows = make_rows(40)
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    data = prepare(load_rows(path), tokenizer, max_eval_samples=20)
    prompts = [{rows[i]["conversations"][0]["value"] for i in side.rows} for side in (data.train, data.held_out)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert len(data.held_out) == len(rows) // 10
    subset = prepare(load_rows(path), tokenizer, max_train_samples=11, max_eval_samples=20)
    assert len(subset.train) == 11
    assert subset.held_out.rows.tolist() == data.held_out.rows.tolist()  # the same for every subset
    for most in (0, 4):
        assert len(prepare(load_rows(path), tokenizer, max_eval_samples=most).held_out) == most


def test_bad_rows_are_counted_with_the_first_of_each(tmp_path, tokenizer):
    rows = [*make_rows(), *BAD_ROWS.values(), *BAD_ROWS.values()]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with path.open("ab") as file:
        file.write(b"{not json\n")
        file.write(json.dumps(coig(chosen="XX"), ensure_ascii=False).encode().replace(b"XX", b"\xff\xfe") + b"\n")
    n_good = len(make_rows())
    data = prepare(load_rows(str(path)), tokenizer, max_eval_samples=0)
    assert len(data.train) == n_good and sorted(data.train.rows) == list(range(n_good))
    assert set(data.dropped) == {*BAD_ROWS, "not valid JSON"}
    assert data.dropped["row is not an object"] == (2, n_good)
    assert data.dropped["chosen: not valid Unicode"][0] == 3  # twice as an escaped surrogate, once as bytes
    assert any(f"dropped 2 rows: row is not an object (first: row {n_good})" in line for line in data.summary())


def test_bad_neighbours_do_not_change_good_rows(tmp_path, tokenizer):
    good = make_rows()
    mixed = [row for pair in zip(good, [*BAD_ROWS.values()] * 9, strict=False) for row in pair]
    alone = prepare(load_rows(str(write_jsonl(tmp_path / "a.jsonl", good))), tokenizer, max_eval_samples=0)
    beside = prepare(load_rows(str(write_jsonl(tmp_path / "b.jsonl", mixed))), tokenizer, max_eval_samples=0)
    tokens = [
        [
            [pair[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
            for pair in data.train.read(range(40))
        ]
        for data in (alone, beside)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "a", "answer": "b"}\n', "the data has the columns answer, question; accepted: conversations"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "no row is left to train on: 1 x chosen equals rejected"),
        ("", "no rows"),
        ("[1, 2", "is not valid JSON"),
    ],
)
def test_unusable_sets_are_refused(tmp_path, tokenizer, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(load_rows(str(path)), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a.csv", "empty_folder", "lfs", "p.jsonl", "."])
def test_unreadable_names_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "lfs" / "data").mkdir(parents=True)
    (tmp_path / "lfs" / "data" / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "p.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError) as error:
        load_rows(name)
    assert "\n" not in str(error.value)
    assert ("git lfs pull" in str(error.value)) == (name in ("lfs", "p.jsonl", "."))


def test_long_and_strange_texts(tokenizer):
    texts = ["好" * 100_000, "a" * 100_000, "\x00", "好\u202e\ufeff", "👩‍👩‍👧", "\r\n\t", "<|im_start|>" * 50]
    rows = Encoder(tokenizer, 128).encode([Triple(USER, text + "好", text + "坏的", "") for text in texts])
    assert [isinstance(row, Unusable) for row in rows] == [True, True, False, False, False, False, True]


# --- order


def test_epoch_order():
    keys = np.array([5, 5, 7, 7, 7, 1, 9, 9, 2, 3, 3, 3])
    order = epoch_order(keys, seed=0, epoch=0)
    assert sorted(order) == list(range(len(keys)))
    changes = np.count_nonzero(np.diff(keys[order])) + 1
    assert changes == len(set(keys))  # a prompt's pairs stay together
    assert order.tolist() == epoch_order(keys, 0, 0).tolist()
    assert order.tolist() != epoch_order(keys, 0, 1).tolist() != epoch_order(keys, 1, 0).tolist()
    spread = epoch_order(keys, 0, 0, "pairs")
    assert sorted(spread) == list(range(len(keys))) and np.count_nonzero(np.diff(keys[spread])) + 1 > changes
    assert spread.tolist() == epoch_order(keys, 0, 0, "pairs").tolist() != epoch_order(keys, 0, 1, "pairs").tolist()


def test_domains(tmp_path, tokenizer):
    path = str(write_jsonl(tmp_path / "a.jsonl", make_rows()))
    data = prepare(load_rows(path), tokenizer, domains=["math"])
    n_math = sum(row["domain"] == "math" for row in make_rows())
    assert set(data.train.domains + data.held_out.domains) == {"math"}
    assert len(data.train) + len(data.held_out) >= n_math - 3  # a held-out prompt's further pairs are left out
    with pytest.raises(UserError, match="--domains: no row has cooking; there is chat, math"):
        prepare(load_rows(path), tokenizer, domains=["cooking"])


def test_a_single_prompt_holds_nothing_out(tmp_path, tokenizer):
    rows = [coig(chosen=f"好{i}") for i in range(20)]
    data = prepare(load_rows(str(write_jsonl(tmp_path / "a.jsonl", rows))), tokenizer)
    assert len(data.train) == 20 and len(data.held_out) == 0
