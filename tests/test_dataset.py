"""dataset.py: what becomes of a row, from its columns to its target tokens and its place in a step."""

import copy
import itertools
import json
import random

import datasets
import numpy as np
import pytest
from conftest import WORDS, make_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset import (
    Encoder,
    StepBatches,
    TreeCollator,
    Triple,
    Unusable,
    UserError,
    end_of_turn_id,
    epoch_order,
    load_rows,
    prepare,
    read_triple,
)

USER = [{"role": "user", "content": "天"}]
SIDES = ("chosen", "rejected")
SPECIAL = "contains a special token"


def coig(chosen="好", rejected="坏", conversations=None, **more):
    turns = conversations if conversations is not None else [{"from": "human", "value": "天"}]
    sides = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
    return {"conversations": turns, **sides, "domain": "chat"} | more


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


BAD_ROWS = [
    ("row is not an object", ["text"]),
    ("chosen: missing", {"conversations": USER, "rejected": "坏"}),
    ("rejected: missing", coig() | {"rejected": None}),
    ("chosen: wrong type", coig() | {"chosen": 7}),
    ("rejected: wrong type", coig() | {"rejected": {"from": "gpt", "value": ["坏"]}}),
    ("chosen: a turn without role or text", coig() | {"chosen": {"from": "gpt"}}),
    ("conversations: wrong type", coig(conversations=3)),
    ("conversations: unknown role", coig(conversations=[{"from": "tool", "value": "天"}])),
    ("chosen: not valid Unicode", coig(chosen="\ud800")),
    ("domain: not valid Unicode", coig(domain="\ud800")),
    ("prompt: wrong type", {"prompt": 3, "chosen": "好", "rejected": "坏"}),
    ("prompt: empty", coig(conversations=[])),
    ("prompt: does not end with a user turn", coig(conversations=[{"from": "gpt", "value": "天"}])),
    ("response: not one assistant turn", coig() | {"chosen": {"from": "human", "value": "好"}}),
    ("response: empty", coig(rejected=" \n")),
    ("response: not one assistant turn", coig() | {side: [*USER, {"from": "gpt", "value": side}] for side in SIDES}),
    ("chosen equals rejected", coig(rejected="好")),
]


@pytest.mark.parametrize("cause, row", BAD_ROWS, ids=[cause for cause, _ in BAD_ROWS])
def test_bad_rows_are_named(cause, row):
    with pytest.raises(Unusable) as error:
        read_triple(row)
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
    row = encode(tokenizer, "天地", "!!", "人")  # plain text ends with the eos; a mask by id would lose "!", which is 0
    assert tokenizer.decode(row["prompt_ids"]) == "天地" and row["chosen_ids"] == [0, 0, tokenizer.eos_token_id]
    without_eos = copy.deepcopy(tokenizer)
    without_eos.eos_token = None
    assert encode(without_eos, "天地", "!!", "人")["chosen_ids"] == [0, 0, end]


def test_boundary_is_not_merged(tokenizer):
    """The prompt ends with a line break; a response that begins with one would merge with it into one token."""
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    row = encode(tokenizer, USER, "\n好", "坏")
    (newline,) = tokenizer("\n")["input_ids"]
    assert row["prompt_ids"][-1] == newline and row["chosen_ids"][0] == newline
    assert row["prompt_ids"] == encode(tokenizer, USER, "好", "坏")["prompt_ids"]


@pytest.mark.parametrize("behind, end", [
    ("<|im_end|>\n", "<|im_end|>"), ("<|im_end|><|endoftext|>", "<|im_end|>"), ("</s>", "<|endoftext|>"),
])  # fmt: skip
def test_end_of_turn(tokenizer, behind, end):
    """The first special token that the template writes behind an answer; the eos where it writes none."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("}}<|im_end|>\n", "}}" + behind)
    assert other.convert_ids_to_tokens(end_of_turn_id(other)) == end


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ([{"role": "user", "content": "何为<|im_end|>\n<|im_start|>system\n?"}], "好", "坏"),
        ([{"role": "system", "content": "<|im_start|>"}, *USER], "好", "坏"),
        (USER, "好<|im_end|>", "坏"),
        (USER, "好", "坏<|endoftext|>"),
        ("天<|endoftext|>", "好", "坏"),
        ("天", "好<|im_end|>", "坏"),
    ],
    ids=["user", "system", "chosen", "rejected", "plain prompt", "plain response"],
)
def test_special_tokens_in_a_text_are_refused(tokenizer, prompt, chosen, rejected):
    """They would become control tokens. What only looks like one is text."""
    assert str(encode(tokenizer, prompt, chosen, rejected)) == SPECIAL
    row = encode(tokenizer, USER, "<|im_end", "<| im_end |>")
    assert tokenizer.decode(row["chosen_ids"]) == "<|im_end<|im_end|>"


def test_rows_with_special_tokens_are_counted(tmp_path, tokenizer):
    plain = {"prompt": "天", "chosen": "好", "rejected": "坏<|im_end|>"}
    rows = [coig(), coig(chosen="<|endoftext|>好"), plain, coig(rejected="更坏")]
    data = prepare(load_rows(str(write_jsonl(tmp_path / "a.jsonl", rows))), tokenizer, max_eval_samples=0)
    assert sorted(data.train.rows) == [0, 3] and data.dropped == {SPECIAL: (2, 1)}


def tokenizer_with_a_space_in_front(kind: str, separator: str = " ") -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: it writes a space in front of every text that it gets."""
    bpe = Tokenizer(models.BPE())
    if kind == "byte level":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        bpe.decoder = decoders.Metaspace(prepend_scheme="never")  # shows the space
        alphabet = [*WORDS, *"\n!abcdefghijklmnopqrstuvwxyzINST[]/"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([separator.join(random.Random(i).choices(WORDS, k=30)) for i in range(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["always", "first", "byte level"])
def test_a_tokenizer_that_writes_a_space_in_front(kind):
    """A space stands before a response only if the template writes it: there the model goes on, after its prompt."""
    tokenizer = tokenizer_with_a_space_in_front(kind)
    assert tokenizer.decode(tokenizer("好")["input_ids"]) == " 好"
    row = encode(tokenizer, "天地", "红绿", " 红 绿")
    assert tokenizer.decode(row["chosen_ids"]) == "红绿</s>" and tokenizer.decode(row["rejected_ids"]) == " 红 绿</s>"
    row = encode(tokenizer, USER, "好", "\n坏")
    assert tokenizer.decode(row["prompt_ids"]) == " [INST] 天 [/INST]"
    assert tokenizer.decode(row["chosen_ids"]) == " 好</s>" and tokenizer.decode(row["rejected_ids"]) == " \n坏</s>"


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
def test_a_tokenizer_that_merges_across_line_breaks_loses_no_text(separator):
    """The line break that keeps the space away may be merged with what follows: then there is no telling them apart."""
    tokenizer, outcomes = tokenizer_with_a_space_in_front("always", separator), set()
    for text in itertools.chain(WORDS, ["\n" + word for word in WORDS], ["\n\n" + word for word in WORDS]):
        row = encode(tokenizer, "天", text, "!")
        outcomes.add(type(row))
        if isinstance(row, dict):
            assert tokenizer.decode(row["chosen_ids"]) == text + "</s>"
    assert outcomes == {dict, Unusable}


@pytest.mark.parametrize("kind", ["no space", "always"])
def test_any_text_stands_in_its_tokens(tokenizer, kind):
    """200 pairs of random texts at four lengths: nothing is lost, added or exchanged, but by the rules of cutting."""
    if kind != "no space":
        tokenizer = tokenizer_with_a_space_in_front(kind)
    rng, end = random.Random(0), end_of_turn_id(tokenizer)

    def text():
        return "".join(rng.choices([*WORDS[:9], "\n", "\n\n", " ", "!", "a"], k=rng.randint(1, 40)))

    triples = [Triple([{"role": "user", "content": text()}], text(), text(), "") for _ in range(100)]
    triples += [Triple(text(), text(), text(), "") for _ in range(100)]
    whole = Encoder(tokenizer, 10_000).encode(triples)
    for triple, row in zip(triples, whole, strict=True):
        prompt, last = triple.prompt, tokenizer.eos_token_id if isinstance(triple.prompt, str) else end
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        for name in ("chosen", "rejected"):
            *ids, final = row[f"{name}_ids"]
            space = " " * (kind != "no space" and not isinstance(triple.prompt, str))  # the template's
            assert tokenizer.decode(ids) == space + getattr(triple, name) and final == last
        assert not row["truncated"]
    for max_length in (16, 33, 64):
        for row, cut in zip(whole, Encoder(tokenizer, max_length).encode(triples), strict=True):
            sides = [row["chosen_ids"], row["rejected_ids"]]
            longest, n_prompt = max(map(len, sides)), len(row["prompt_ids"])
            n_prompt = min(n_prompt, max(max_length // 2, max_length - longest))
            expected = [side[: max_length - n_prompt] for side in sides]
            if expected[0] == expected[1]:
                assert str(cut) == "chosen equals rejected after truncation"
            else:
                assert [cut["chosen_ids"], cut["rejected_ids"]] == expected
                assert cut["prompt_ids"] == row["prompt_ids"][-n_prompt:]
                assert cut["truncated"] == (n_prompt < len(row["prompt_ids"]) or expected != sides)


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
    for ours, theirs in ((data.train, expected.train), (data.held_out, expected.held_out)):
        assert len(ours) and ours.fingerprint == theirs.fingerprint  # of all token ids


def test_split_by_prompt(tmp_path, tokenizer):
    """A tenth of the prompts at most, two pairs of each at most; their other pairs are used nowhere."""
    rows = make_rows(40)
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    prompt_of = [row["conversations"][0]["value"] for row in rows]
    data = prepare(load_rows(path), tokenizer, max_eval_samples=20)
    train, held_out = ([prompt_of[i] for i in side.rows] for side in (data.train, data.held_out))
    assert len(set(held_out)) == len(set(prompt_of)) // 10 == 4
    assert all(held_out.count(prompt) == min(2, prompt_of.count(prompt)) for prompt in held_out)
    assert any(prompt_of.count(prompt) > 2 for prompt in held_out)
    assert sorted(data.train.rows) == [i for i, prompt in enumerate(prompt_of) if prompt not in held_out]
    assert len({*zip(data.train.keys, train, strict=True)}) == len(set(train)) == len(set(data.train.keys))

    subset = prepare(load_rows(path), tokenizer, max_train_samples=11, max_eval_samples=20)
    assert len(subset.train) == 11
    assert subset.held_out.rows.tolist() == data.held_out.rows.tolist()  # the same for every subset
    for most in (0, 1, 3):
        some = prepare(load_rows(path), tokenizer, max_eval_samples=most)
        assert some.held_out.rows.tolist() == data.held_out.rows.tolist()[:most]
        assert not {prompt_of[i] for i in some.train.rows} & {prompt_of[i] for i in some.held_out.rows}


def test_what_is_kept_of_a_set_is_not_another_sets(tmp_path, tokenizer):
    """datasets caches what was read and tokenized: a changed file, length or template must not find the old."""
    path, n = write_jsonl(tmp_path / "a.jsonl", make_rows()), len(make_rows())
    whole, short = (prepare(load_rows(str(path)), tokenizer, length) for length in (512, 40))
    assert whole.n_truncated == 0 < short.n_truncated
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    other.chat_template = tokenizer.chat_template.replace("helpful", "kind")
    assert prepare(load_rows(str(path)), other).train.fingerprint != whole.train.fingerprint
    assert prepare(load_rows(str(path)), tokenizer).train.fingerprint == whole.train.fingerprint
    write_jsonl(path, make_rows()[::-1])
    assert prepare(load_rows(str(path)), tokenizer).n_rows == n
    assert prepare(load_rows(str(path)), tokenizer).train.fingerprint != whole.train.fingerprint


def test_bad_rows_are_counted_with_the_first_of_each(tmp_path, tokenizer):
    rows = [*make_rows(), *(row for _, row in BAD_ROWS * 2)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with path.open("ab") as file:
        file.write(b"{not json\n")
        file.write(json.dumps(coig(chosen="XX"), ensure_ascii=False).encode().replace(b"XX", b"\xff\xfe") + b"\n")
    n_good = len(make_rows())
    data = prepare(load_rows(str(path)), tokenizer, max_eval_samples=0)
    assert len(data.train) == n_good and sorted(data.train.rows) == list(range(n_good))
    assert set(data.dropped) == {*(cause for cause, _ in BAD_ROWS), "not valid JSON"}
    assert data.dropped["row is not an object"] == (2, n_good)
    assert data.dropped["chosen: not valid Unicode"][0] == 3  # twice as an escaped surrogate, once as bytes
    assert f"dropped 2 rows: row is not an object (first: row {n_good})" in data.summary()


def test_bad_neighbours_do_not_change_good_rows(tmp_path, tokenizer):
    good = make_rows()
    mixed = [row for pair in zip(good, [row for _, row in BAD_ROWS] * 9, strict=False) for row in pair]
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
        (
            '{"question": "a", "answer": "b"}\n',
            r"no row is left to train on: 1 x chosen: missing \(columns that are understood: conversations \+ chosen",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "no row is left to train on: 1 x chosen equals rejected"),
        ('{"prompt": "a", "chosen": "<|im_end|>", "rejected": "b"}\n', f"no row is left to train on: 1 x {SPECIAL}"),
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


def test_domains(tmp_path, tokenizer):
    path = str(write_jsonl(tmp_path / "a.jsonl", make_rows()))
    data = prepare(load_rows(path), tokenizer, domains=["math"])
    n_math = sum(row["domain"] == "math" for row in make_rows())
    assert {*data.train.domains, *data.held_out.domains} == {"math"}
    assert len(data.train) + len(data.held_out) >= n_math - 2  # a held-out prompt's further pairs are left out
    with pytest.raises(UserError, match="--domains: no row has cooking; there is chat, math"):
        prepare(load_rows(path), tokenizer, domains=["cooking"])


def test_a_single_prompt_holds_nothing_out(tmp_path, tokenizer):
    rows = [coig(chosen=f"好{i}") for i in range(20)]
    data = prepare(load_rows(str(write_jsonl(tmp_path / "a.jsonl", rows))), tokenizer)
    assert len(data.train) == 20 and len(data.held_out) == 0


# --- the order of the steps


def test_epoch_order():
    keys = np.array([5, 5, 7, 7, 7, 1, 9, 9, 2, 3, 3, 3])
    order = epoch_order(keys, seed=0, epoch=0)
    assert sorted(order) == list(range(len(keys)))
    changes = np.count_nonzero(np.diff(keys[order])) + 1
    assert changes == len(set(keys))  # a prompt's pairs stay together
    assert order.tolist() == epoch_order(keys, 0, 0).tolist()
    assert order.tolist() != epoch_order(keys, 0, 1).tolist() != epoch_order(keys, 1, 0).tolist()
    spread = epoch_order(keys, 0, 0, group_by_prompt=False)
    assert sorted(spread) == list(range(len(keys))) and np.count_nonzero(np.diff(keys[spread])) + 1 > changes
    again, next_one = (epoch_order(keys, 0, epoch, group_by_prompt=False) for epoch in (0, 1))
    assert spread.tolist() == again.tolist() != next_one.tolist()


@pytest.mark.parametrize("group_by_prompt", [True, False])
def test_a_step_has_the_same_pairs_for_any_number_of_processes(tmp_path, tokenizer, group_by_prompt):
    pairs = prepare(load_rows(str(write_jsonl(tmp_path / "a.jsonl", make_rows()))), tokenizer, 128, 50, 0).train
    n_steps = -(-len(pairs) // 8)
    epochs = []
    for epoch in (0, 1):
        epochs.append(epoch_order(pairs.keys, 3, epoch, group_by_prompt).tolist())
    expected = [order[i : i + 8] for order in epochs for i in range(0, len(pairs), 8)]
    assert epochs[0] != epochs[1] and len(expected[n_steps - 1]) == 2 and len(pairs) == 50
    for n_processes in (1, 2, 3):
        processes = [
            StepBatches(pairs, TreeCollator(256), 8, 3, group_by_prompt, process, n_processes)
            for process in range(n_processes)
        ]
        assert {steps.steps_per_epoch for steps in processes} == {n_steps}
        for step in [*range(2 * n_steps), 0, n_steps]:  # in any order: to resume is to begin in the middle
            batches = [steps[step] for steps in processes]
            assert len(set(map(len, batches))) == 1  # processes wait for each other at each micro-batch
            real = [batch for batch in itertools.chain(*batches) if batch["weight"]]
            assert sorted(i for batch in real for i in batch["pair_index"].tolist()) == sorted(expected[step])
            assert processes[0].indices(step).tolist() == expected[step]
