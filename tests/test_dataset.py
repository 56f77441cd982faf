"""dataset.py: what becomes of a row, from its columns to its target tokens and its place in a step."""

import copy
import json
import random
import re

import pytest
from conftest import WORDS, make_rows, write_jsonl
from datasets import Dataset
from tokenizers import normalizers, pre_tokenizers, processors

from dataset import IDS, Unusable, UserError, load_rows, prepare, read_triple

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


def test_white_space_between_a_repeated_prompt_and_the_response_is_kept():
    triple = read_triple({"prompt": "天", "chosen": "天 好", "rejected": "天\n坏"})
    assert (triple.prompt, triple.chosen, triple.rejected) == ("天", " 好", "\n坏")


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
    ("not valid JSON or Unicode", coig() | {"chosen": "\ud800"}),
    ("prompt: wrong type", PLAIN | {"prompt": 3}),
    ("prompt: empty", coig(conversations=turns("u"))),
    ("prompt: does not end with a user turn", coig(conversations=[{"from": "gpt", "value": "天"}])),
    ("prompt: chosen and rejected begin with another one", pair("u地", prompt="天")),
    ("response: not one assistant turn", coig() | {"chosen": {"from": "human", "value": "好"}}),
    ("response: empty", coig(rejected=" \n")),
    ("chosen equals rejected", coig(rejected="好")),
    ("no prompt; columns: chosen, conversations, domain, rejected", coig(conversations=[])),
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


def prepared(tokenizer, *triples, max_length=512):
    """The set, and by row number the token ids of prompt, chosen and rejected."""
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), triple, strict=True)) for triple in triples])
    data = prepare(rows, tokenizer, max_length, max_eval_samples=0)
    pairs = zip(data.train.rows, data.train.read(range(len(data.train))), strict=True)
    return data, {row: [pair[name].tolist() for name in IDS] for row, pair in pairs}


def encode(tokenizer, *triple, max_length=512):
    return prepared(tokenizer, triple, max_length=max_length)[1][0]


def changed(tokenizer, old, new):
    """The tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = new and tokenizer.chat_template.replace(old, new)
    return other


def test_targets_are_the_response_and_one_end_of_turn(tokenizer):
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    prompt, chosen, rejected = encode(tokenizer, USER, "好!快", "坏")
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n天<|im_end|>\n"
    assert tokenizer.decode(prompt) == before + "<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == ["好!快<|im_end|>", "坏<|im_end|>"]
    assert rejected.count(end) == 1 and end != eos
    ends_in_the_data = encode(tokenizer, USER, "好!快<|im_end|>\n", "坏<|endoftext|>")
    assert ends_in_the_data == [prompt, chosen, rejected]
    prompt, chosen, _ = encode(tokenizer, "天地", "!!", "人")  # plain text ends with the eos; "!" has id 0
    assert tokenizer.decode(prompt) == "天地" and chosen == [0, 0, eos]
    without_eos = copy.deepcopy(tokenizer)
    without_eos.eos_token = None
    assert encode(without_eos, "天地", "!!", "人")[1] == [0, 0, end]


def test_plain_text_begins_with_the_bos_where_the_tokenizer_writes_one(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>"})
    assert other.decode(encode(other, "天", "好", "坏")[0]) == "天"
    other, bos = copy.deepcopy(other), other.bos_token_id
    other.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos)])
    prompt, chosen, _ = encode(other, "天", "好", "坏")
    assert other.decode(prompt) == "<s>天" and other.decode(chosen) == "好<|endoftext|>"
    assert bos not in encode(other, USER, "好", "坏")[0]  # there the template has the word


@pytest.mark.parametrize("behind, end", [
    ("<|im_end|>\n", "<|im_end|>"), ("<|im_end|><|endoftext|>", "<|im_end|>"), ("</s>", "<|endoftext|>"),
])  # fmt: skip
def test_the_token_that_ends_a_turn(tokenizer, behind, end):
    """The first special token that the template writes behind an answer; the eos where it writes none."""
    data, pairs = prepared(changed(tokenizer, "}}<|im_end|>\n", "}}" + behind), (USER, "好", "坏"))
    assert tokenizer.convert_ids_to_tokens(data.end_ids) == [end] and pairs[0][1][-1] == data.end_ids[0]


def test_any_text_stands_in_its_tokens(tokenizer):
    """Random texts at four lengths: nothing is lost, added or exchanged, but by the rule of cutting.

    A response that begins with a line break does not merge with the prompt's last one.
    """
    rng = random.Random(0)

    def text():
        words = ["天", *rng.choices([*WORDS[:9], "\n", "\n\n", " ", "!", "a"], k=rng.randint(1, 39))]
        return "".join(rng.sample(words, len(words)))

    for make_prompt, end in ((lambda: turns(f"u{rng.choice(WORDS)}"), "<|im_end|>"), (text, "<|endoftext|>")):
        triples = [(make_prompt(), text(), text()) for _ in range(100)]
        _, whole = prepared(tokenizer, *triples, max_length=10_000)
        for row, (prompt, *sides) in enumerate(triples):
            if isinstance(prompt, list):
                prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            assert [tokenizer.decode(ids) for ids in whole[row]] == [prompt, *(side + end for side in sides)]
        for most in (16, 33, 64):
            cut = {}
            for row, (prompt, *sides) in whole.items():
                n_prompt = min(len(prompt), max(most // 2, most - max(map(len, sides))))
                cut[row] = [prompt[-n_prompt:], *(ids[: most - n_prompt] for ids in sides)]
            data, pairs = prepared(tokenizer, *triples, max_length=most)
            assert pairs == {row: ids for row, ids in cut.items() if ids[1] != ids[2]}
            assert data.account["pairs cut to max_length"] == sum(pairs[row] != whole[row] for row in pairs) > 0


BYTES = pre_tokenizers.ByteLevel(False, use_regex=False)


@pytest.mark.parametrize("part, kind, back", [
    ("normalizer", normalizers.Prepend(" "), "' .n a good answer'"),  # Llama 2's
    ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "' .n a good answer'"),
    ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES]), "'agoodanswer'"),
])  # fmt: skip
def test_tokenizers_that_do_not_give_texts_back_are_refused(tokenizer, part, kind, back):
    other, triple = copy.deepcopy(tokenizer), ("question", "a good answer", "a bad answer")
    assert encode(other, *triple)
    other = copy.deepcopy(tokenizer)
    setattr(other.backend_tokenizer, part, kind)
    with pytest.raises(UserError, match=rf"the tokenizer \(\w+\) .* texts back: 'a good answer' becomes {back}"):
        encode(other, *triple)


CONTENT = "{{ m['content'] }}"


@pytest.mark.parametrize("old, new, cause", [
    ("<|im_start|>assistant", "<|im_start|>model", "the chat template changes the prompt once it is answered"),
    (CONTENT, "{{ m['content'].split('</think>')[-1] }}", "the chat template removes part of the response"),
    (CONTENT, "{{ m['content'] if m['role'] != 'system' }}", "the chat template removes part of the prompt"),
    (CONTENT, "{{ m['content'] | trim }}", "chosen equals rejected after tokenizing"),
    ("{% for", "{{ raise_exception('not this time') if messages | length > 2 }}{% for",
     "the chat template says: not this time"),
    ("", None, "the tokenizer has no chat template, which messages need"),
])  # fmt: skip
def test_what_a_template_writes_is_compared_with_what_was_given(tokenizer, old, new, cause):
    triple = turns("s你 u天"), *(("<think>一</think>好", "坏") if "of the response" in cause else ("好", " 好"))
    assert encode(tokenizer, *triple)
    with pytest.raises(UserError, match=f"1 of 1 rows can't be used: 1 rows dropped: {re.escape(cause)} "):
        encode(changed(tokenizer, old, new), *triple)


def test_a_template_without_texts_is_refused(tokenizer):
    other = changed(tokenizer, tokenizer.chat_template, "{% for m in messages %}{{ m['content'][0].text }}{% endfor %}")
    with pytest.raises(UserError, match="the chat template writes no answer that is a text"):
        encode(other, USER, "好", "坏")


def test_long_and_strange_texts(tokenizer):
    texts = ["\x00", "好\u202e\ufeff", "\U0001f469\u200d\U0001f467", "\r\n\t", "a" * 120]
    texts += ["好" * 100_000, "a" * 100_000, "<|im_start|>" * 50]
    data, found = prepared(tokenizer, *((USER, text + "好", text + "坏的") for text in texts), max_length=256)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert dropped(data) == {"chosen equals rejected after truncation": (2, 5), SPECIAL: (1, 7)}


# --- whole sets


def dropped(data):
    """Cause -> (rows, the number of the first)."""
    found = ((re.fullmatch(r"rows dropped: (.*) \(first: row (\d+)\)", what), n) for what, n in data.account.items())
    return {match[1]: (n, int(match[2])) for match, n in found if match}


def left_out(data):
    """Cause -> rows."""
    return {what.removeprefix("rows left out: "): n for what, n in data.account.items() if n and "left out" in what}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    return str(path)


def test_split_by_prompt(tmp_path, tokenizer):
    """A tenth of the prompts at most, two pairs of each at most; their other pairs are used nowhere."""
    rows = make_rows(40)
    table = load_rows(write(tmp_path / "a.jsonl", rows))
    prompt_of = [row["conversations"][0]["value"] for row in rows]
    data = prepare(table, tokenizer, max_eval_samples=20)
    train, held_out = ([prompt_of[i] for i in side.rows] for side in (data.train, data.held_out))
    assert len(set(held_out)) == len(set(prompt_of)) // 10 == 4
    assert all(held_out.count(prompt) == min(2, prompt_of.count(prompt)) for prompt in held_out)
    assert sorted(data.train.rows) == [i for i, prompt in enumerate(prompt_of) if prompt not in held_out]
    assert len({*zip(data.train.keys, train, strict=True)}) == len(set(train)) == len(set(data.train.keys))
    subset = prepare(table, tokenizer, max_train_samples=11, max_eval_samples=20)
    assert subset.held_out.rows.tolist() == data.held_out.rows.tolist()  # the same for every subset
    for most in (0, 1, 3):
        some = prepare(table, tokenizer, max_eval_samples=most)
        assert some.held_out.rows.tolist() == data.held_out.rows.tolist()[:most]
        assert not {prompt_of[i] for i in some.train.rows} & {prompt_of[i] for i in some.held_out.rows}
    of_one_prompt = prepare(Dataset.from_list([coig(f"好{i}") for i in range(20)]), tokenizer)
    assert (len(of_one_prompt.train), len(of_one_prompt.held_out)) == (20, 0)


def test_tokens_are_those_of_their_rows(tokenizer):
    """On both sides, and though every third row is dropped when it is tokenized."""
    rows = [coig(f"好{i}" + "<|im_start|>" * (i % 3 == 0), conversations=turns(f"u{i}")) for i in range(60)]
    data = prepare(Dataset.from_list(rows), tokenizer)
    for side in (data.train, data.held_out):
        texts = [tokenizer.decode(pair["chosen_ids"]) for pair in side.read(range(len(side)))]
        assert len(texts) > 3 and texts == [f"好{row}<|im_end|>" for row in side.rows]


def test_every_row_is_accounted_for(tmp_path, tokenizer):
    rows = [*make_rows(40), coig(rejected="好")]
    table = load_rows(write(tmp_path / "a.jsonl", rows))
    n_chat = sum(row["domain"] == "chat" for row in rows) - 1
    for most in (None, 20):
        data = prepare(table, tokenizer, 512, most, 4, ["math"])
        assert {*data.train.domains, *data.held_out.domains} == {"math"}
        assert dropped(data) == {"chosen equals rejected": (1, len(rows) - 1)}
        assert left_out(data)["not in --domains"] == n_chat and left_out(data)["their prompt is held out"] > 0
        assert len(data.train) == most or "more than --max_train_samples" not in left_out(data)
        n_used = len(data.train) + len(data.held_out)
        assert len(rows) == data.n_rows == n_used + sum(left_out(data).values()) + 1
        for text in (f"{n_chat} rows left out: not in --domains", "1 rows dropped: chosen equals", "read: a.jsonl"):
            assert f"; {text}" in data.summary()
    only_evaluated = prepare(table, tokenizer, max_train_samples=0)
    assert len(only_evaluated.train) == 0 < len(only_evaluated.held_out) and only_evaluated.train.read([]) == []
    with pytest.raises(UserError, match="--domains: no row has cooking; there is chat, math"):
        prepare(table, tokenizer, domains=["math", "cooking"])


def test_held_out_rows_of_their_own(tmp_path, tokenizer):
    rows = make_rows(40)
    table, given = load_rows(write(tmp_path / "a.jsonl", rows)), load_rows(write(tmp_path / "b.parquet", rows[:9]))
    data, some = (prepare(table, tokenizer, max_eval_samples=most, held_out_rows=given) for most in (512, 5))
    prompts = [row["conversations"] for row in rows[:9]]
    assert data.n_rows == len(rows) + 9 and sorted(data.held_out.rows) == [len(rows) + i for i in range(9)]
    assert sorted(data.train.rows) == [i for i, row in enumerate(rows) if row["conversations"] not in prompts]
    assert len(some.held_out) == 5 and left_out(some)["more than --max_eval_samples"] == 4
    assert some.train.fingerprint == data.train.fingerprint
    for one, other, message in (
        (table, [{"question": "a"}] * 3, r"3 of 3 rows can't be used: .* chosen: missing \(first: row 0\)"),
        (given, [coig() | {"domain": 7}], "its columns differ from the data's"),
    ):
        with pytest.raises(UserError, match=f"^--eval_dataset_name: {message}"):
            prepare(one, tokenizer, held_out_rows=Dataset.from_list(other))
    with pytest.raises(UserError, match=f"no row is left: {len(rows)} rows left out: their prompt is held"):
        prepare(table, tokenizer, held_out_rows=table)
    with pytest.raises(UserError, match="^--eval_dataset_name: no row is left: .* rows left out: not in --domains"):
        prepare(table, tokenizer, domains=["math"], held_out_rows=Dataset.from_list([coig() | {"domain": "chat"}] * 8))
    alike = Dataset.from_list([row | {"chosen": "天 " * 99 + "a", "rejected": "天 " * 99 + "b"} for row in rows[:3]])
    with pytest.raises(UserError, match=r"^--eval_dataset_name: 3 of 3 .* equals .* truncation \(first: row 0\)"):
        prepare(table, tokenizer, 64, held_out_rows=alike)


def test_the_tokens_that_end_responses(tmp_path, tokenizer):
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    for rows, ends, n in ([coig()], [end], 0), ([PLAIN], [eos], 1), ([coig(), PLAIN], [eos, end], 1):
        data = prepare(load_rows(write(tmp_path / f"{len(rows)}{n}.jsonl", rows)), tokenizer)
        assert data.end_ids == ends
        assert ("; 1 pairs are plain text: no chat template is applied" in data.summary()) == bool(n)


def test_what_is_kept_of_a_set_is_not_another_sets(tmp_path, tokenizer):
    """datasets caches what was read and tokenized: a changed file, length or template must not find the old."""
    path = write(tmp_path / "a.jsonl", make_rows())
    whole, short = (prepare(load_rows(path), tokenizer, length) for length in (512, 40))
    assert "cut to max_length" in short.summary() and "cut to" not in whole.summary()
    other = changed(tokenizer, "helpful", "kind")
    assert prepare(load_rows(path), other).train.fingerprint != whole.train.fingerprint
    assert prepare(load_rows(path), tokenizer).train.fingerprint == whole.train.fingerprint
    write(tmp_path / "a.jsonl", make_rows()[::-1])
    assert prepare(load_rows(path), tokenizer).train.fingerprint != whole.train.fingerprint


def test_bad_rows_are_counted_with_the_first_of_each(tmp_path, tokenizer):
    """Special tokens in a text would become control tokens. What only looks like one is text."""
    good = [*make_rows(90), coig("<|im_end", "<| im_end |>")]
    special = [coig("<|im_end|>好"), coig("好", "坏<|endoftext|><|endoftext|>"), coig(system="<|im_start|>"),
               coig(conversations=turns("u<|im_end|>")),
               *(PLAIN | {name: "<|im_end|>?"} for name in PLAIN)]  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", [*good, *(row for _, row in BAD_ROWS * 2), *special])
    with path.open("ab") as file:
        file.write(b"{not json\n")
        file.write(b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}\n")
        file.write(json.dumps(coig(chosen="XX"), ensure_ascii=False).encode().replace(b"XX", b"\xff\xfe") + b"\n")
    data = prepare(load_rows(str(path)), tokenizer, max_eval_samples=0)
    assert sorted(data.train.rows) == list(range(len(good)))
    (deep,) = [cause for cause in dropped(data) if cause.startswith("maximum recursion depth exceeded")]
    assert set(dropped(data)) == {*(cause for cause, _ in BAD_ROWS), SPECIAL, deep}
    assert data.n_rows == len(data.train) + sum(n for n, _ in dropped(data).values())
    assert dropped(data)[SPECIAL] == (len(special), len(good) + 2 * len(BAD_ROWS))
    assert dropped(data)["not valid JSON or Unicode"][0] == 4  # a surrogate twice, broken JSON, broken UTF-8
    assert dropped(data)["row is not an object"] == (2, len(good))


LFS = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"question": "a", "answer": "b"}\n',
     r"1 of 1 rows can't be used: 1 rows dropped: chosen: missing \(first: row 0\). What is read: prompt \(or conver"),
    ("a.jsonl", f"{json.dumps(coig())}\n[]\n{{\n", "2 of 3 rows .*: 1 .* row is not an object .*; 1 .* not valid"),
    ("a.jsonl", "", "no data"),
    ("a.jsonl", "[1, 2", "is not valid JSON"),
    ("a.jsonl", LFS, "git lfs pull"),
    ("folder/data/train.parquet", LFS, "git lfs pull"),
    ("a.parquet", "PAR1", "Parquet file size|Parquet magic bytes"),
    ("folder/a.csv", "a,b\n", "no .parquet, .json or .jsonl file of split train is in it; not read: a.csv"),
    ("a.csv", "a,b\n", "a single file must end in"),
    ("missing.jsonl", None, "there is no such file"),
])  # fmt: skip
def test_unusable_sets_are_refused(tmp_path, monkeypatch, tokenizer, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^--dataset_name.*{message}") as error:
        prepare(load_rows("folder" if "folder" in name else name), tokenizer)
    assert "\n" not in str(error.value)


def test_every_file_of_a_folder_is_read_or_named(tmp_path, tokenizer):
    folder = tmp_path / "a [1]"
    rows = [make_rows(8, seed) for seed in range(4)]
    write(folder / "train.jsonl", rows[0]), write(folder / "extra_2025.json", rows[1])
    write(folder / "b.parquet", [row | {"score": 1.5} for row in rows[2]]), write(folder / "test/a.jsonl", rows[3])
    write(folder / ".cache/c.jsonl", [coig()]), write(folder / "dataset_info.json", [{"features": {}}])
    for name in ("old.jsonl.bak", "a.csv", "x.arrow", "README.md"):
        (folder / name).write_text("x")
    data = prepare(load_rows(str(folder)), tokenizer)
    in_order = [*rows[1], *rows[0], *rows[2]]  # .json and .jsonl by name, then .parquet
    expected = prepare(load_rows(write(tmp_path / "one.jsonl", in_order)), tokenizer)
    assert data.n_rows == len(in_order) and not dropped(data)
    for ours, theirs in ((data.train, expected.train), (data.held_out, expected.held_out)):
        assert ours.rows.tolist() == theirs.rows.tolist() and ours.fingerprint == theirs.fingerprint  # of all token ids
    read, not_read = data.summary().split("; read: ")[1].split("; not read: ")
    assert (read, len(not_read.split(", "))) == ("b.parquet, extra_2025.json, train.jsonl", 5) and "a.csv" in not_read
    assert len(load_rows(str(folder), "test")) == len(rows[3])
    with pytest.raises(UserError, match="^--eval_dataset_name .*no .*file of split dev is in it; not read: a.csv, b.p"):
        load_rows(str(folder), "dev", "--eval_dataset_name")
    with pytest.raises(UserError, match="a single file .* has no split but train"):
        load_rows(str(folder / "train.jsonl"), "test")
