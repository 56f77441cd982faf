"""dataset.py: what becomes of a row, from its columns to its target tokens and its place in a step."""

import copy
import itertools
import json
import random
import re

import datasets
import pytest
from conftest import WORDS, make_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dataset import (
    Encoder,
    Triple,
    Unusable,
    UserError,
    end_of_turn_id,
    load_rows,
    prepare,
    read_triple,
)

SPECIAL = "contains a special token (text to which a template was applied already?)"


def turns(text):
    """Messages, each by its role's first letter: "s你 u天"."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[1:]} for turn in text.split()]


USER = turns("u天")
PLAIN = {"prompt": "天", "chosen": "好", "rejected": "坏"}


def pair(before="", **more):
    return {"chosen": turns(f"{before} a好"), "rejected": turns(f"{before} a坏")} | more


def coig(chosen="好", rejected="坏", conversations=None, **more):
    given = conversations if conversations is not None else [{"from": "human", "value": "天"}]
    sides = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
    return {"conversations": given, **sides, "domain": "chat"} | more


# --- rows to triples


@pytest.mark.parametrize("row, prompt", [
    (coig(), USER),
    (coig() | {"chosen": "好", "rejected": "坏"}, USER),
    (coig(system="你", tools="[]", images=[], history=None), turns("s你 u天")),  # LLaMA-Factory's columns
    (coig(conversations=turns("s你 u一 a二 u三")), turns("s你 u一 a二 u三")),
    (coig(conversations=turns("s你 u一"), system="你"), turns("s你 u一")),
    (coig(conversations=[{"from": "Human", "value": "一"}, {"role": "model", "content": "二"}, *USER]),
     turns("u一 a二 u天")),
    (coig(conversations=[{"role": "USER", "content": [{"type": "text", "text": t} for t in "天地"]}]),
     turns("u天地")),
    (PLAIN, "天"),
    ({"prompt": "天：", "chosen": "天：好", "rejected": "天：坏"}, "天："),  # the prompt stands once
    ({"prompt": "好", "chosen": "好", "rejected": "坏"}, "好"),  # one response begins as the prompt does: a quotation
    (pair(prompt=USER), USER),
    (pair(prompt="天"), USER),
    (pair("u天"), USER),  # TRL's implicit prompt
    (pair("u天", prompt="天"), USER),  # UltraFeedback: the prompt beside whole conversations
    (pair("s你 u天", prompt="天"), turns("s你 u天")),
    (pair("u天", prompt=turns("s你 u天")), turns("s你 u天")),
    (pair("u天", prompt=turns("s你")), turns("s你 u天")),
    (pair("u天", system="你"), turns("s你 u天")),
    (pair("a二 u三", prompt="天"), turns("u天 a二 u三")),  # the first turn of the answers is the same
    (pair("u天 a二 u三", prompt="天"), turns("u天 a二 u三")),
    (pair("u三", prompt=turns("u一 a二 u三")), turns("u一 a二 u三")),
    (pair("u天", conversations=[{"from": "human", "value": "天"}]), USER),
])  # fmt: skip
def test_forms(row, prompt):
    triple = read_triple(row)
    assert (triple.prompt, triple.chosen, triple.rejected) == (prompt, "好", "坏")


TEXTS = {"chosen": "It is water.", "rejected": "It is sand."}
BAD_ROWS = [
    ("row is not an object", ["text"]),
    ("chosen: missing", {"conversations": USER, "rejected": "坏"}),
    ("chosen: wrong type", coig() | {"chosen": 7}),
    ("rejected: wrong type", coig() | {"rejected": {"from": "gpt", "value": {"text": "坏"}}}),
    ("rejected: parts that are not text", coig() | {"rejected": {"from": "gpt", "value": [{"type": "image"}]}}),
    ("chosen: wrong type", coig() | {"chosen": {"from": "gpt"}}),
    ("chosen: unknown role None", coig() | {"chosen": {"value": "好"}}),
    ("conversations: unknown role tool", coig(conversations=[{"from": "tool", "value": "天"}])),
    *((f"{name}: not valid Unicode", coig() | {name: "\ud800"}) for name in ("chosen", "domain")),
    ("prompt: wrong type", PLAIN | {"prompt": 3}),
    ("prompt: empty", coig(conversations=turns("u"))),
    ("prompt: does not end with a user turn", coig(conversations=[{"from": "gpt", "value": "天"}])),
    ("prompt: chosen and rejected begin with another one", pair("u地", prompt="天")),
    ("response: not one assistant turn", coig() | {"chosen": {"from": "human", "value": "好"}}),
    ("response: empty", coig(rejected=" \n")),
    ("chosen equals rejected", coig(rejected="好")),
    ("no prompt; columns: chosen, domain, rejected", coig(conversations=[])),
    ("no prompt; columns: chosen, question, rejected", {"question": "What is ice?", **TEXTS}),
    ("no prompt; columns: chosen, input, instruction, rejected", {"instruction": "Name it", "input": "ice", **TEXTS}),
    ("no prompt; columns: chosen, query, rejected", {"query": "What is ice?", **TEXTS}),
    ("no prompt; columns: chosen, messages, rejected", {"messages": USER, **TEXTS}),
    ("no prompt; columns: chosen, rejected", {side: f"\n\nHuman: Hi\n\nAssistant: {side}" for side in TEXTS}),
    ("no prompt; columns: chosen, question, rejected", pair(question="天")),
    ("prompt and conversations: which is the prompt?", coig(prompt="天")),
    ("system: two that differ", pair("s他 u天", system="你")),
    ("system beside a prompt of plain text: make messages of them", PLAIN | {"system": "你"}),
    ("chosen and rejected begin with the prompt: repeated, or part of the responses?",
     {"prompt": "Hello", "chosen": "Hello! I am here.", "rejected": "Hellooo"}),
    ("chosen: messages written as one string", {"prompt": "天", **{k: json.dumps(turns(f"a{k}")) for k in TEXTS}}),
    ("prompt: messages written as one string", {"prompt": str(USER), **TEXTS}),
    *((f"{name}: not supported", coig(**{name: value})) for name, value in (
        ("tools", '[{"name": "f"}]'), ("images", [1]), ("history", [["一"]]), ("chat_template_kwargs", {"a": False}))),
    *((f"{name}: not supported", coig() | {"chosen": turns("a好")[0] | {name: "x"}})
      for name in ("tool_calls", "reasoning_content", "thinking")),
]  # fmt: skip


@pytest.mark.parametrize("cause, row", BAD_ROWS)
def test_bad_rows_are_named(cause, row):
    with pytest.raises(Unusable, match=f"^{re.escape(cause)}$"):
        read_triple(row)


# --- triples to tokens


def encode(tokenizer, prompt, chosen, rejected, max_length=512):
    return Encoder(tokenizer, max_length).encode([Triple(prompt, chosen, rejected)])[0]


def test_targets_are_the_response_and_one_end_of_turn(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(tokenizer) == end != tokenizer.eos_token_id
    row = encode(tokenizer, USER, "好!快", "坏")
    prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n天<|im_end|>\n"
    assert tokenizer.decode(row["prompt_ids"]) == prompt + "<|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "好!快<|im_end|>" and not row["truncated"]
    assert tokenizer.decode(row["rejected_ids"]) == "坏<|im_end|>" and row["rejected_ids"].count(end) == 1
    assert row == encode(tokenizer, USER, "好!快<|im_end|>\n", "坏<|endoftext|>")  # ends that the data brought along
    row = encode(tokenizer, "天地", "!!", "人")  # plain text ends with the eos; a mask by id would lose "!", which is 0
    assert tokenizer.decode(row["prompt_ids"]) == "天地" and row["chosen_ids"] == [0, 0, tokenizer.eos_token_id]
    without_eos = copy.deepcopy(tokenizer)
    without_eos.eos_token = None
    assert encode(without_eos, "天地", "!!", "人")["chosen_ids"] == [0, 0, end]


def test_plain_text_begins_with_the_bos_where_the_tokenizer_writes_one(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>"})
    assert other.decode(encode(other, "天", "好", "坏")["prompt_ids"]) == "天"
    bos = other.bos_token_id
    other.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos)])
    row = encode(other, "天", "好", "坏")
    assert other.decode(row["prompt_ids"]) == "<s>天" and other.decode(row["chosen_ids"]) == "好<|endoftext|>"
    assert bos not in encode(other, USER, "好", "坏")["prompt_ids"]  # there the template has the word


@pytest.mark.parametrize("behind, end", [
    ("<|im_end|>\n", "<|im_end|>"), ("<|im_end|><|endoftext|>", "<|im_end|>"), ("</s>", "<|endoftext|>"),
])  # fmt: skip
def test_end_of_turn(tokenizer, behind, end):
    """The first special token that the template writes behind an answer; the eos where it writes none."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("}}<|im_end|>\n", "}}" + behind)
    assert other.convert_ids_to_tokens(end_of_turn_id(other)) == end
    other.chat_template = "{% for m in messages %}{{ m['content'][0].text }}{% endfor %}"  # for images
    with pytest.raises(UserError, match="the chat template writes no answer that is a text"):
        end_of_turn_id(other)


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


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
def test_a_tokenizer_that_merges_across_line_breaks_loses_no_text(separator):
    """The line break that keeps the space away may be merged with what follows: then there is no telling them apart."""
    tokenizer, outcomes = tokenizer_with_a_space_in_front("always", separator), set()
    for text in itertools.chain(WORDS, ["\n" + word for word in WORDS], ["\n\n" + word for word in WORDS]):
        row = encode(tokenizer, "天", text, "!")
        outcomes.add(row["cause"])
        if not row["cause"]:
            assert tokenizer.decode(row["chosen_ids"]) == text + "</s>"
    assert outcomes == {"", "the tokenizer merges the response with the line break before it"}


@pytest.mark.parametrize("kind", ["no space", "always", "first", "byte level"])
def test_any_text_stands_in_its_tokens(tokenizer, kind):
    """200 pairs of random texts at four lengths: nothing is lost, added or exchanged, but by the rules of cutting.

    A response that begins with a line break does not merge with the prompt's last one. A space stands before a response
    only if the template writes it.
    """
    if kind != "no space":
        tokenizer = tokenizer_with_a_space_in_front(kind)
    rng, end = random.Random(0), end_of_turn_id(tokenizer)

    def text():
        words = ["天", *rng.choices([*WORDS[:9], "\n", "\n\n", " ", "!", "a"], k=rng.randint(1, 39))]
        return "".join(rng.sample(words, len(words)))

    triples = [Triple([{"role": "user", "content": text()}], text(), text()) for _ in range(100)]
    triples += [Triple(text(), text(), text()) for _ in range(100)]
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
                assert cut["cause"] == "chosen equals rejected after truncation"
            else:
                assert [cut["chosen_ids"], cut["rejected_ids"]] == expected
                assert cut["prompt_ids"] == row["prompt_ids"][-n_prompt:]
                assert cut["truncated"] == (n_prompt < len(row["prompt_ids"]) or expected != sides)


CONTENT = "{{ m['content'] }}"


@pytest.mark.parametrize("old, new, cause", [
    ("<|im_start|>assistant", "<|im_start|>model", "the chat template changes the prompt once it is answered"),
    (CONTENT, "{{ m['content'].split('</think>')[-1] }}", "the chat template removes part of the response"),
    (CONTENT, "{{ m['content'] if m['role'] != 'system' }}", "the chat template removes part of the prompt"),
    (CONTENT, "{{ m['content'] | trim }}", "the chat template makes chosen and rejected equal"),
    ("{% for", "{{ raise_exception('System role not supported') }}{% for",
     "the chat template says: System role not supported"),
    ("", None, "the tokenizer has no chat template, which messages need"),
])  # fmt: skip
def test_what_a_template_writes_is_compared_with_what_was_given(tokenizer, old, new, cause):
    other, removes = copy.deepcopy(tokenizer), "removes" in cause
    texts = (turns("s你 u天"), *(("<think>一</think>好", "坏") if removes else ("好", " 好")))
    assert encode(tokenizer, *texts)["cause"] == ""
    encoder = Encoder(other, 512)
    other.chat_template = new and tokenizer.chat_template.replace(old, new)
    assert encoder.encode([Triple(*texts)])[0]["cause"] == cause


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
    assert sorted(data.train.rows) == [i for i, prompt in enumerate(prompt_of) if prompt not in held_out]
    assert len({*zip(data.train.keys, train, strict=True)}) == len(set(train)) == len(set(data.train.keys))
    subset = prepare(load_rows(path), tokenizer, max_train_samples=11, max_eval_samples=20)
    assert subset.held_out.rows.tolist() == data.held_out.rows.tolist()  # the same for every subset
    for most in (0, 1, 3):
        some = prepare(load_rows(path), tokenizer, max_eval_samples=most)
        assert some.held_out.rows.tolist() == data.held_out.rows.tolist()[:most]
        assert not {prompt_of[i] for i in some.train.rows} & {prompt_of[i] for i in some.held_out.rows}


def test_every_row_is_accounted_for(tmp_path, tokenizer):
    rows = make_rows(40)
    table = load_rows(str(write_jsonl(tmp_path / "a.jsonl", [*rows, coig(rejected="好", score=1)])))
    whole, some = (prepare(table, tokenizer, 512, most, 4, ["math"]) for most in (None, 20))
    n_chat = sum(row["domain"] == "chat" for row in rows)
    assert {*some.train.domains, *some.held_out.domains} == {"math"}
    n_more = len(whole.train) - len(some.train)
    assert n_more > 0 and some.left_out == whole.left_out | {"more than --max_train_samples": n_more}
    assert whole.left_out["not in --domains"] == n_chat and f"left out {n_chat} rows: not in" in whole.summary()
    n_same_prompt = len(rows) - n_chat - len(whole.train) - len(whole.held_out)
    assert whole.left_out["their prompt is held out"] == n_same_prompt > 0
    assert whole.counts()["dropped"] == {"chosen equals rejected": 1}
    only_evaluated = prepare(table, tokenizer, max_train_samples=0)
    assert len(only_evaluated.train) == 0 < len(only_evaluated.held_out) and only_evaluated.train.read([]) == []
    with pytest.raises(UserError, match="--domains: no row has cooking; there is chat, math"):
        prepare(table, tokenizer, domains=["cooking"])
    data = prepare(datasets.Dataset.from_list([coig(f"好{i}", score=1) for i in range(20)]), tokenizer)  # of one prompt
    assert (len(data.train), len(data.held_out)) == (20, 0)


def test_held_out_rows_of_their_own(tmp_path, tokenizer):
    rows = make_rows(40)
    path, given = write_jsonl(tmp_path / "a.jsonl", rows), write(tmp_path, rows[:9], "given.parquet")
    data = prepare(load_rows(str(path)), tokenizer, held_out_rows=load_rows(str(given)))
    prompts = [row["conversations"] for row in rows[:9]]
    assert data.n_rows == len(rows) + 9 and sorted(data.held_out.rows) == [len(rows) + i for i in range(9)]
    assert sorted(data.train.rows) == [i for i, row in enumerate(rows) if row["conversations"] not in prompts]
    some = prepare(load_rows(str(path)), tokenizer, max_eval_samples=5, held_out_rows=load_rows(str(given)))
    assert some.left_out["more than --max_eval_samples"] == 4 and some.train.fingerprint == data.train.fingerprint


def test_the_tokens_that_end_responses(tmp_path, tokenizer):
    ids = [tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    for rows, ends, n in ([coig()], ids[1:], 0), ([PLAIN], ids[:1], 1), ([coig(), PLAIN], ids, 1):
        data = prepare(load_rows(str(write_jsonl(tmp_path / f"{len(rows)}{n}.jsonl", rows))), tokenizer)
        assert (data.end_ids, data.n_plain_text) == (ends, n)
        assert ("no chat template is applied" in data.summary()) == bool(n)


def test_a_tokenizer_that_does_not_give_texts_back_is_refused(tokenizer):
    wrong, rows = copy.deepcopy(tokenizer), datasets.Dataset.from_list([coig("def f(n): return n", "a b")])
    assert len(prepare(rows, tokenizer).train) == 1
    kinds = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=False)]  # the spaces are lost
    wrong.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(kinds)
    with pytest.raises(UserError, match="give texts back: '.*return n' becomes 'deff"):
        prepare(rows, wrong)


def test_what_is_kept_of_a_set_is_not_another_sets(tmp_path, tokenizer):
    """datasets caches what was read and tokenized: a changed file, length or template must not find the old."""
    path = write_jsonl(tmp_path / "a.jsonl", make_rows())
    whole, short = (prepare(load_rows(str(path)), tokenizer, length) for length in (512, 40))
    assert whole.n_truncated == 0 < short.n_truncated
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    other.chat_template = tokenizer.chat_template.replace("helpful", "kind")
    assert prepare(load_rows(str(path)), other).train.fingerprint != whole.train.fingerprint
    assert prepare(load_rows(str(path)), tokenizer).train.fingerprint == whole.train.fingerprint
    write_jsonl(path, make_rows()[::-1])
    assert prepare(load_rows(str(path)), tokenizer).train.fingerprint != whole.train.fingerprint


def test_bad_rows_are_counted_with_the_first_of_each(tmp_path, tokenizer):
    """Special tokens in a text would become control tokens. What only looks like one is text."""
    good = [*make_rows(90), coig("<|im_end", "<| im_end |>")]
    special = [coig("<|im_end|>好"), coig("好", "坏<|endoftext|><|endoftext|>"), coig(system="<|im_start|>"),
               coig(conversations=turns("u<|im_end|>")), *(PLAIN | {name: "<|im_end|>?"} for name in PLAIN)]
    path = write_jsonl(tmp_path / "a.jsonl", [*good, *(row for _, row in BAD_ROWS * 2), *special])
    with path.open("ab") as file:
        file.write(b"{not json\n")
        file.write(json.dumps(coig(chosen="XX"), ensure_ascii=False).encode().replace(b"XX", b"\xff\xfe") + b"\n")
    data = prepare(load_rows(str(path)), tokenizer, max_eval_samples=0)
    assert sorted(data.train.rows) == list(range(len(good)))
    assert set(data.dropped) == {*(cause for cause, _ in BAD_ROWS), "not valid JSON", SPECIAL}
    assert data.n_rows == len(data.train) + sum(data.counts()["dropped"].values())
    assert data.dropped[SPECIAL] == (len(special), len(good) + 2 * len(BAD_ROWS))
    assert data.dropped["chosen: not valid Unicode"][0] == 3  # twice as an escaped surrogate, once as bytes
    assert f"dropped 2 rows: row is not an object (first: row {len(good)})" in data.summary()


LFS = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"question": "a", "answer": "b"}\n',
     r"1 of 1 rows can't be used: 1 x chosen: missing \(first: row 0\). What is read: prompt \(or conversations"),
    ("a.jsonl", f"{json.dumps(coig())}\n[]\n{{\n", "2 of 3 rows .*: 1 x row is not an object .*; 1 x not valid"),
    ("a.jsonl", "", "no data"),
    ("a.jsonl", "[1, 2", "is not valid JSON"),
    ("a.jsonl", LFS, "git lfs pull"),
    ("folder/data/train.parquet", LFS, "git lfs pull"),
    ("a.parquet", "PAR1", "Parquet file size|Parquet magic bytes"),
    ("folder/a.csv", "a,b\n", "no .parquet, .json or .jsonl file of split train is in it; not read: a.csv"),
    ("a.csv", "a,b\n", "a single file must end in"),
    ("missing.jsonl", None, "no such file"),
])  # fmt: skip
def test_unusable_sets_are_refused(tmp_path, monkeypatch, tokenizer, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(load_rows("folder" if "folder" in name else name), tokenizer)
    assert "\n" not in str(error.value)


def test_every_file_of_a_folder_is_read_or_named(tmp_path, tokenizer):
    folder = tmp_path / "a [1]"
    (folder / "test").mkdir(parents=True)
    (folder / ".cache").mkdir()
    rows = [make_rows(8, seed) for seed in range(4)]
    write(folder, rows[0], "train.jsonl"), write(folder, rows[1], "extra_2025.json")
    write(folder, [row | {"score": 1.5} for row in rows[2]], "b.parquet"), write(folder, rows[3], "test/a.jsonl")
    write(folder, [coig()], ".cache/c.jsonl"), write(folder, [{"features": {}}], "dataset_info.json")
    for name in ("old.jsonl.bak", "a.csv", "x.arrow", "README.md"):
        (folder / name).write_text("x")
    data = prepare(load_rows(str(folder)), tokenizer, max_eval_samples=0)
    assert len(data.train) == data.n_rows == sum(map(len, rows[:3])) and not data.dropped
    read, not_read = data.summary().split("; read: ")[1].split("; not read: ")
    assert (read, len(not_read.split(", "))) == ("b.parquet, extra_2025.json, train.jsonl", 5) and "a.csv" in not_read
    assert len(load_rows(str(folder), "test")) == len(rows[3])
    with pytest.raises(UserError, match="no .*file of split dev is in it; not read: a.csv, b.parquet"):
        load_rows(str(folder), "dev")
    with pytest.raises(UserError, match="a single file .* has no split but train"):
        load_rows(str(folder / "train.jsonl"), "test")


def test_long_and_strange_texts(tokenizer):
    texts = ["好" * 100_000, "a" * 100_000, "\x00", "好\u202e\ufeff", "👩‍👩‍👧", "\r\n\t", "<|im_start|>" * 50]
    rows = Encoder(tokenizer, 128).encode([Triple(USER, text + "好", text + "坏的") for text in texts])
    assert [row["cause"] != "" for row in rows] == [True, True, False, False, False, False, True]
