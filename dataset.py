"""Preference data: from files and hub names to micro-batches of token trees.

In the order that data flows: `load_rows` reads a hub name, a folder or a file; `read_triple` maps one row, by its
columns, to prompt, chosen and rejected; `Encoder` tokenizes; `prepare` does that for a whole set, accounts for every
row and splits by prompt; `StepBatches` has the pairs of each step; `TreeCollator` cuts them into micro-batches, in
which each prompt stands once and each distinct response once.
"""

import glob
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


class Unusable(UserError):
    """A row that can't train. The message is the cause under which it is counted."""


def first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------------------------------
# Reading

FILES = (".parquet", ".json", ".jsonl")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # they describe data sets
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "testing", "eval")
JSON = "(json)"  # the column of unparsed rows


def load_rows(name: str, split: str = "train", flag: str = "--dataset_name") -> Dataset:
    """The raw rows of a hub data set, a local folder (as `git clone` leaves it) or a .parquet, .json or .jsonl file.

    What was read, and which files were left out, stands in `info.description` of the result.
    """
    path = Path(name).expanduser()
    is_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in FILES or name.count("/") > 1
    try:
        if is_local:
            files, description = choose_files(path, split)
            rows = read_files(files)
        else:
            rows, description = datasets.load_dataset(name, split=split), f"{name}, split {split}"
    except Exception as error:  # the library raises a dozen types here; each means that these rows can't be read
        while error.__cause__:  # "An error occurred while generating the dataset" says nothing
            error = error.__cause__
        if isinstance(error, UserError):
            raise error from None
        text = f"--dataset_name {name}, split {split}, can't be loaded ({type(error).__name__}: {first_line(error)})"
        if not is_local and not isinstance(error, PermissionError):
            text += ": HF_ENDPOINT sets a mirror of the hub; a file or folder can be given, too; `--demo` needs neither"
        raise UserError(text) from None
    rows.info.description = description
    return rows


def choose_files(path: Path, split: str) -> tuple[list[Path], str]:
    """The files to read, and words that say which they are and which were left out.

    Of a folder, all files of the three kinds are read whose names do not say another split.
    """
    if not path.exists():
        raise UserError(f"--dataset_name {path}: there is no such file or folder")
    if path.is_file():
        if path.suffix not in FILES or split != "train":
            raise UserError(f"{path}: a single file must end in .parquet, .json or .jsonl and has no split but train")
        return [path], path.name
    chosen, left_out = [], []
    for name in sorted(glob.glob("**/*.*", root_dir=path, recursive=True)):  # hidden files are not among them
        file = path / name
        if file.is_file() and file.suffix in FILES and file.name not in NO_ROWS and split_of(name) == split:
            chosen.append(name)
        elif file.is_file() and file.suffix != ".md":
            left_out.append(name)
    without = f"; not read: {shorten(', '.join(left_out), 200)}" if left_out else ""
    if not chosen:
        raise UserError(f"--dataset_name {path}: no .parquet, .json or .jsonl file of split {split} is in it{without}")
    return [path / name for name in chosen], shorten(", ".join(chosen), 200) + without


def split_of(name: str) -> str:
    """The split that a file's name says, or else its folder's; train if neither says one.

    >>> [split_of(name) for name in ("extra_2025.jsonl", "val/a.json", "data/test_prefs-00000-of-00002.parquet")]
    ['train', 'val', 'test_prefs']
    """
    for part in reversed(Path(name).parts):
        for word in re.findall("[a-z]+", part.lower()):
            if word in SPLITS:
                shard = re.match(r"(.+)-\d{5}-of-\d{5}", part)
                return shard[1] if shard else word
    return "train"


def read_files(files: list[Path]) -> Dataset:
    """The rows of json and jsonl, then those of parquet.

    Rows of json are one binary column, not parsed yet: Arrow would refuse a whole file for one row of other types.
    """
    for file in files:
        with file.open("rb") as opened:
            if opened.read(19) == b"version https://git":
                raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in its clone")
    json_files = [file for file in files if file.suffix != ".parquet"]
    parquet_files = [glob.escape(str(file)) for file in files if file.suffix == ".parquet"]
    tables = [datasets.load_dataset("parquet", data_files=[file], split="train") for file in parquet_files]
    if json_files:
        # Size and time of change, too, because datasets keeps the rows under the arguments.
        versions = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in json_files)
        features = datasets.Features({JSON: datasets.Value("large_binary")})
        tables.insert(0, Dataset.from_generator(json_rows, features=features, gen_kwargs={"versions": versions}))
    return datasets.concatenate_datasets(tables)


def json_rows(versions: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, bytes]]:
    for path, _, _ in versions:
        # Broken bytes become surrogates, which cost their row, not the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            is_array = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            try:
                lines = map(json.dumps, json.load(file)) if is_array else filter(str.strip, file)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
            for line in lines:
                yield {JSON: line.encode("utf-8", "surrogateescape")}


# ---------------------------------------------------------------------------------------------------------------------
# Rows to triples

NOT_SUPPORTED = ("tools", "tool_calls", "images", "image", "videos", "audios", "history", "chat_template_kwargs",
                 "reasoning_content", "thinking")  # fmt: skip
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system"}  # fmt: skip
KEY = r"""['"](?:role|from|content|value)['"]\s*:"""
MESSAGES_AS_TEXT = re.compile(rf"\s*\[?\s*{{\s*{KEY}.*{KEY}", re.DOTALL)
Message = dict[str, str]


@dataclass
class Triple:
    """`prompt` is a list of messages, for the chat template, or plain text, taken as it is."""

    prompt: list[Message] | str
    chosen: str
    rejected: str
    domain: str = ""


def read_triple(row: Any) -> Triple:
    """Map a row by its columns to prompt, chosen and rejected. All turns are kept, a system turn too.

    The prompt is `prompt` or `conversations`, as text or as messages, and the turns with which both `chosen` and
    `rejected` begin. Nothing is guessed: raises Unusable, with the cause, for a row that says anything else.
    """
    if isinstance(row, dict) and row.get(JSON) is not None:
        try:
            row = json.loads(row[JSON].decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            raise Unusable("not valid JSON") from None
    if not isinstance(row, dict):
        raise Unusable("row is not an object")
    refuse_unsupported(row)
    given = [name for name in ("prompt", "conversations") if has_content(row.get(name))]
    if len(given) == 2:
        raise Unusable("prompt and conversations: which is the prompt?")
    prompt = read_messages(row[given[0]], given[0]) if given else []
    chosen, rejected = (read_messages(row.get(name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    system = read_text(row.get("system") or "", "system")
    domain = "" if row.get("domain") is None else read_text(str(row["domain"]), "domain")

    # Where one side only continues the other, nothing is shared: neither is a response.
    n_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    prompt = join(system, prompt, chosen[:n_shared])
    if not prompt:
        columns = sorted(name for name in row if has_content(row[name]))
        raise Unusable(f"no prompt; columns: {', '.join(columns)}"[:200])
    if any(not turn["content"].strip() for turn in prompt if turn["role"] != "system"):
        raise Unusable("prompt: empty")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt: does not end with a user turn")
    if any([turn["role"] for turn in side[n_shared:]] != ["assistant"] for side in (chosen, rejected)):
        raise Unusable("response: not one assistant turn")
    chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]

    if given == ["prompt"] and all(isinstance(row[name], str) for name in ("prompt", "chosen", "rejected")):
        if system:
            raise Unusable("system beside a prompt of plain text: make messages of them")
        prompt = prompt[0]["content"]
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            # "Hello" and "Hello! I am ..." is a greeting; a prompt that is repeated is set apart from the response.
            if not prompt[-1].isspace() and prompt[-1] not in ":：" and not (chosen[:1] + rejected[:1]).isspace():
                raise Unusable("chosen and rejected begin with the prompt: repeated, or part of the responses?")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("response: empty")
    return Triple(prompt, chosen, rejected, domain)


def join(system: str, prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The system turn, the prompt, and the turns with which both sides begin, none of them twice."""
    systems = [{"role": "system", "content": system}] if system else []
    for turns in (prompt, shared):
        if turns and turns[0]["role"] == "system":
            systems.append(turns.pop(0))
    if any(one != systems[0] for one in systems):
        raise Unusable("system: two that differ")
    # The longest end of the prompt with which the sides begin: mostly all of it, or nothing.
    n_repeated = next(n for n in range(len(prompt), -1, -1) if prompt[len(prompt) - n :] == shared[:n])
    if n_repeated == 0 and prompt and shared and prompt[-1]["role"] == shared[0]["role"]:
        raise Unusable("prompt: chosen and rejected begin with another one")
    return systems[:1] + prompt + shared[n_repeated:]


def read_messages(value: Any, name: str) -> list[Message]:
    """Turns of any of the usual spellings; a text alone is one turn, the user's or the assistant's."""
    if value is None:
        raise Unusable(f"{name}: missing")
    if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
        raise Unusable(f"{name}: messages written as one string")
    if isinstance(value, str) and name != "conversations":
        value = {"role": "user" if name == "prompt" else "assistant", "content": value}
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"{name}: wrong type")
    messages = []
    for turn in turns:
        refuse_unsupported(turn)
        role = turn.get("from") or turn.get("role")
        content = turn.get("content") if turn.get("value") is None else turn["value"]
        if str(role).lower() not in ROLES:
            raise Unusable(f"{name}: unknown role {read_text(str(role), name)[:40]}")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise Unusable(f"{name}: parts that are not text")
            content = "".join(read_text(part.get("text"), name) for part in content)
        messages.append({"role": ROLES[role.lower()], "content": read_text(content, name)})
    return messages


def read_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name}: wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, or bytes that were no UTF-8
        raise Unusable(f"{name}: not valid Unicode") from None
    return value


def refuse_unsupported(fields: dict) -> None:
    for name in NOT_SUPPORTED:
        if has_content(fields.get(name)):
            raise Unusable(f"{name}: not supported")


def has_content(value: Any) -> bool:
    """Parquet gives each row all columns, and each object all fields: most are empty."""
    if isinstance(value, dict | list):
        return any(map(has_content, value.values() if isinstance(value, dict) else value))
    return value not in (None, "", "[]", "{}")


# ---------------------------------------------------------------------------------------------------------------------
# Triples to tokens

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class Encoder:
    """Tokenizes triples: `prompt_ids`, `chosen_ids` and `rejected_ids`, each response with exactly one end-of-turn.

    Conversations go through the tokenizer's chat template; plain text is taken as it is, begins with a BOS where the
    tokenizer writes one, and ends with the tokenizer's eos. A response is what the template writes after the prompt,
    tokenized apart from it, as it is when the model answers: the prompt is there first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end_of_turn_id = end_of_turn_id(tokenizer)
        self.plain_end_id = self.end_of_turn_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        ends = [re.escape(tokenizer.decode([token])) for token in (self.end_of_turn_id, self.plain_end_id)]
        self.end_of_text = re.compile(rf"({'|'.join(ends)})\s*\Z")
        self.specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.bos_ids = [tokenizer.bos_token_id] if begins_with_bos else []
        # Tokenizers of Llama 2's kind write a space in front of every text, but none after a line break. For these, a
        # line break is put in front of each response, and its tokens are taken off again.
        joined, line_break_ids, text_ids = tokenizer(["\n天", "\n", "天"], add_special_tokens=False)["input_ids"]
        writes_space = joined != line_break_ids + text_ids
        self.front, self.front_ids = ("\n", line_break_ids) if writes_space else ("", [])

    def encode(self, triples: Sequence[Triple]) -> list[dict]:
        """Of each triple its tokens, whether they were cut, and as `cause` why there are none, if so.

        A pair of over `max_length` tokens is cut by one rule: the prompt keeps its last
        max(max_length / 2, max_length - longer response) tokens, each response its first tokens in the room that is
        left. A response that was cut has no end-of-turn.
        """
        rendered = [attempt(self._render, triple) for triple in triples]
        texts = list({text for row, _ in rendered if row for text in row})
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # in one call: it is fast
        ids = dict(zip(texts, found, strict=True))
        encoded = []
        for triple, (row, cause) in zip(triples, rendered, strict=True):
            pair = None
            if row:
                pair, cause = attempt(self._cut, isinstance(triple.prompt, str), *(ids[text] for text in row))
            pair = pair or {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "truncated": False}
            encoded.append(pair | {"cause": cause})
        return encoded

    def encode_rows(self, table: pa.Table) -> pa.Table:
        """Columns of rows that `read_triple` can read."""
        encoded = self.encode([read_triple(row) for row in table.to_pylist()])
        for row in encoded:
            row |= {name: np.asarray(row[name], dtype=np.int32) for name in IDS}
            row["digest"] = hash64(b"|".join(row[name].tobytes() for name in IDS))
        return pa.Table.from_pylist(encoded)

    def _render(self, triple: Triple) -> list[str]:
        """The prompt and the two responses as they are tokenized, by the chat template unless they are plain text."""
        # Encoding adds the model's own end-of-turn or eos; where a response brings one along, it is taken off.
        responses = [self.end_of_text.sub("", text) for text in (triple.chosen, triple.rejected)]
        is_plain_text = isinstance(triple.prompt, str)
        given = [triple.prompt] if is_plain_text else [turn["content"] for turn in triple.prompt]
        if any(special in text for text in (*given, *responses) for special in self.specials):
            raise Unusable("contains a special token (text to which a template was applied already?)")
        if not all(response.strip() for response in responses):
            raise Unusable("response: empty")
        if responses[0] == responses[1]:
            raise Unusable("chosen equals rejected")
        if is_plain_text:
            return [triple.prompt, *(self.front + response for response in responses)]

        if not self.tokenizer.chat_template:
            raise Unusable("the tokenizer has no chat template, which messages need")
        start = apply_template(self.tokenizer, triple.prompt, add_generation_prompt=True)
        # White space around a text is the template's to trim. An earlier answer may lose its thoughts, as it does when
        # the model is used.
        if any(turn["content"].strip() not in start for turn in triple.prompt if turn["role"] != "assistant"):
            raise Unusable("the chat template removes part of the prompt")
        rendered = [start]
        for response in responses:
            whole = apply_template(self.tokenizer, [*triple.prompt, {"role": "assistant", "content": response}])
            if not whole.startswith(start):
                raise Unusable("the chat template changes the prompt once it is answered")
            if response.strip() not in whole[len(start) :]:
                raise Unusable("the chat template removes part of the response")
            rendered.append(self.front + whole[len(start) :])
        if rendered[1] == rendered[2]:
            raise Unusable("the chat template makes chosen and rejected equal")
        return rendered

    def _cut(self, is_plain_text: bool, prompt_ids: list[int], *responses: list[int]) -> dict:
        n_front = len(self.front_ids)
        if any(ids[:n_front] != self.front_ids for ids in responses):
            raise Unusable("the tokenizer merges the response with the line break before it")
        prompt_ids = self.bos_ids + prompt_ids if is_plain_text else prompt_ids
        end = self.plain_end_id if is_plain_text else self.end_of_turn_id
        # What a template writes after its end-of-turn ("\n") belongs to the next turn.
        responses = [[*takewhile(lambda token: token != end, ids[n_front:]), end] for ids in responses]
        longest = max(map(len, responses))
        n_prompt = min(len(prompt_ids), max(self.max_length // 2, self.max_length - longest))
        chosen_ids, rejected_ids = (ids[: self.max_length - n_prompt] for ids in responses)
        if chosen_ids == rejected_ids:
            raise Unusable("chosen equals rejected after truncation")
        return {
            "prompt_ids": prompt_ids[len(prompt_ids) - n_prompt :],
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "truncated": n_prompt < len(prompt_ids) or longest > self.max_length - n_prompt,
        }


def attempt(function: Callable, *args) -> tuple[Any, str]:
    """What the function returns and "", or None and the cause for which it found a row unusable."""
    try:
        return function(*args), ""
    except Unusable as cause:
        return None, str(cause)


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[Message], add_generation_prompt=False) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own
        raise Unusable(f"the chat template says: {first_line(error)}") from None


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an assistant's turn, `<|im_end|>` for Qwen2.5.

    It need not be the tokenizer's eos (Qwen2.5's base model: `<|endoftext|>`). Without a template, or with one that
    ends turns with plain text, it is the eos. Raises UserError if there is neither.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, found, after = apply_template(tokenizer, turns).rpartition("answer")
        if not found:
            raise UserError("the chat template writes no answer that is a text: is it for images?")
        added = tokenizer.added_tokens_decoder
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in added and added[token].special:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template with an end-of-turn token nor an eos token")
    return tokenizer.eos_token_id


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Raises UserError if texts don't come back from their tokens, as when transformers loads it as another kind.

    White space may change its kind, and a rare character may be missing: a quarter of the texts may differ.
    """
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    changed = []
    for text, back in zip(texts, tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False), strict=True):
        if unicodedata.normalize("NFKC", text).split() != unicodedata.normalize("NFKC", back).split():
            changed.append(f"{text[:60]!r} becomes {back[:60]!r}")
    if len(changed) > len(texts) / 4:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) doesn't give texts back: {changed[0]}: is it the model's own "
            "and complete, and does this version of transformers load it as it should?"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set

HELD_OUT = "held out"
LEFT_OUT = SAME_PROMPT, OTHER_DOMAIN, OVER_TRAIN, OVER_EVAL = (
    "their prompt is held out", "not in --domains", "more than --max_train_samples", "more than --max_eval_samples",
)  # fmt: skip


@dataclass
class Pairs:
    """Tokenized pairs. `rows` are their row numbers in the source; pairs of the same prompt have the same key."""

    tokens: Dataset  # columns prompt_ids, chosen_ids, rejected_ids
    keys: np.ndarray  # [n] int64
    rows: np.ndarray  # [n] int64
    domains: np.ndarray  # [n] str
    fingerprint: str  # of the token ids, not of a path or a date: a resumed run may find its data in another place

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, indices: Sequence[int]) -> list[dict]:
        """The pairs at these indices, as `TreeCollator` takes them."""
        columns = self.tokens[[int(i) for i in indices]]
        rows = zip(indices, *(columns[name] for name in IDS), strict=True)
        return [dict(zip(("index", *IDS), (int(i), *ids), strict=True)) for i, *ids in rows]


@dataclass
class PreparedData:
    """Pairs to train on, pairs held out, and an account of all other rows."""

    train: Pairs
    held_out: Pairs
    source: str  # what was read
    n_rows: int  # in the source
    left_out: dict[str, int]  # good rows that are used nowhere, by why
    dropped: dict[str, tuple[int, int]]  # rows that can't train: cause -> (rows, the first one's number)
    n_truncated: int
    n_plain_text: int  # pairs to which no chat template is applied
    end_ids: list[int]  # the tokens that end the responses: one, or two where only some pairs are plain text

    def counts(self) -> dict:
        """Of rows: those to train on, held out, left out and dropped add up to `rows`."""
        dropped = {cause: count for cause, (count, _) in self.dropped.items()}
        used = {"rows": self.n_rows, "train": len(self.train), "held_out": len(self.held_out)}
        return used | {"left_out": self.left_out, "dropped": dropped}

    def summary(self) -> str:
        """What was read, and what became of each row."""
        n_prompts, n_held_out = (len(np.unique(pairs.keys)) for pairs in (self.train, self.held_out))
        text = f"{self.n_rows:,} rows: {len(self.train):,} pairs of {n_prompts:,} prompts to train on, "
        text += f"{len(self.held_out):,} held out ({n_held_out:,} other prompts)"
        if self.n_plain_text:
            text += f"; {self.n_plain_text:,} pairs are plain text: no chat template is applied"
        if self.n_truncated:
            text += f"; {self.n_truncated:,} pairs cut to max_length"
        for reason, count in self.left_out.items():
            text += f"; left out {count:,} rows: {reason}"
        for cause, (count, first) in self.dropped.items():
            text += f"; dropped {count:,} rows: {cause} (first: row {first})"
        return text + (f"; read: {self.source}" if self.source else "")


def prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    max_train_samples: int | None = None,
    max_eval_samples: int = 512,
    domains: Sequence[str] | None = None,
    held_out_rows: Dataset | None = None,
) -> PreparedData:
    """Tokenize a data set and split it by prompt.

    Prompts are taken in the order of their hashes: the first ones are held out, the next ones are trained on, up to
    `max_eval_samples` and `max_train_samples` pairs. So a subset is a fair sample of all domains, the held-out pairs
    are the same for any subset and seed, and no prompt is on both sides. At most a tenth of the prompts is held out,
    with two pairs of each, so that a few hundred pairs are many prompts; their other pairs are used nowhere.

    If `held_out_rows` are given, they are held out instead, and rows with a prompt of theirs are not trained on. They
    are numbered after `rows`. Raises UserError for what the user should know before a run.
    """
    source, first_given = rows.info.description, None
    if held_out_rows is not None:
        first_given = len(rows)
        source += f"; held out: {held_out_rows.info.description}"
        try:
            rows = datasets.concatenate_datasets([rows, held_out_rows])
        except Exception as error:  # columns of the same name and of other types
            raise UserError(f"--eval_dataset_name: its columns differ from the data's ({first_line(error)})") from None
    if not len(rows):
        raise UserError("the data set has no rows")

    # The first pass reads every row and keeps a hash of its prompt. The fate of a row is "" while it is to be trained
    # on, then HELD_OUT, one of LEFT_OUT, or the cause why it can't train.
    scanned = map_rows(rows, scan_rows, "Reading rows")
    keys, row_domains, is_plain_text, fates = (column.to_numpy().copy() for column in scanned[:].columns)
    count_dropped(fates, np.arange(len(rows)))
    check_tokenizer(tokenizer, [read_triple(rows[int(i)]).chosen for i in np.flatnonzero(fates == "")[:20]])
    if domains is not None:
        there = set(row_domains[fates == ""])
        if unknown := set(domains) - there:
            raise UserError(f"--domains: no row has {', '.join(sorted(unknown))}; there is {', '.join(sorted(there))}")
        fates[(fates == "") & ~np.isin(row_domains, list(domains))] = OTHER_DOMAIN

    train, held_out = split_by_prompt(keys, fates, first_given, max_train_samples, max_eval_samples)
    used = np.concatenate([train, held_out])
    if not len(used) or (not len(train) and max_train_samples != 0):
        why = "; ".join(f"{count:,} x {fate}" for fate, count in Counter(fates.tolist()).most_common())
        raise UserError(f"no row is left to train on: {why}")

    # The second pass tokenizes the rows that are used.
    encoder = Encoder(tokenizer, max_length)
    tokens = map_rows(rows.select(used), encoder.encode_rows, "Tokenizing")
    truncated, causes, digests = (tokens[:][name].to_numpy() for name in ("truncated", "cause", "digest"))
    fates[used] = np.where(causes == "", fates[used], causes)
    dropped = count_dropped(fates, train if len(train) else held_out)

    def pairs_of(fate: str) -> Pairs:
        places = np.flatnonzero(fates[used] == fate)
        ids = tokens.select_columns(list(IDS)).select(places).with_format("numpy")
        fingerprint = hashlib.blake2b(digests[places].tobytes(), digest_size=16).hexdigest()
        return Pairs(ids, keys[used[places]], used[places], row_domains[used[places]], fingerprint)

    is_plain_text = is_plain_text[used[causes == ""]]
    return PreparedData(
        train=pairs_of(""),
        held_out=pairs_of(HELD_OUT),
        source=source,
        n_rows=len(rows),
        left_out={reason: n for reason in LEFT_OUT if (n := int(np.count_nonzero(fates == reason)))},
        dropped=dropped,
        n_truncated=int(truncated.sum()),
        n_plain_text=int(is_plain_text.sum()),
        end_ids=sorted({encoder.plain_end_id if plain else encoder.end_of_turn_id for plain in is_plain_text}),
    )


def scan_rows(table: pa.Table) -> pa.Table:
    """Of each row: a hash of its prompt, its domain, whether it is plain text, and why it can't be used, if so."""
    scanned = []
    for row in table.to_pylist():
        triple, cause = attempt(read_triple, row)
        triple = triple or Triple([], "", "")
        key = hash64(json.dumps(triple.prompt).encode())
        scanned.append(
            {"key": key, "domain": triple.domain, "is_plain_text": isinstance(triple.prompt, str), "cause": cause}
        )
    return pa.Table.from_pylist(scanned)


def split_by_prompt(
    keys: np.ndarray, fates: np.ndarray, first_given: int | None, max_train_samples: int | None, max_eval_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows to train on and to hold out; `fates` is filled in for all that are not trained on.

    Rows from number `first_given` on were given to be held out.
    """
    good = np.flatnonzero(fates == "")
    good = good[np.argsort(keys[good], kind="stable")]  # by prompt, in the order of their hashes; then as in the source
    if first_given is None:
        prompts, first, prompt_of_row = np.unique(keys[good], return_index=True, return_inverse=True)
        number_in_prompt = np.arange(len(good)) - first[prompt_of_row]
        given = good[(prompt_of_row < len(prompts) // 10) & (number_in_prompt < 2)][:max_eval_samples]
    else:
        given = good[good >= first_given]
    fates[good[np.isin(keys[good], keys[given])]] = SAME_PROMPT
    fates[given] = OVER_EVAL
    held_out = given[:max_eval_samples]
    fates[held_out] = HELD_OUT
    train = good[fates[good] == ""]
    if max_train_samples is not None:
        fates[train[max_train_samples:]] = OVER_TRAIN
    return train[:max_train_samples], held_out


def count_dropped(fates: np.ndarray, rows: np.ndarray) -> dict[str, tuple[int, int]]:
    """cause -> (rows, the first one's number), the most frequent first.

    Raises UserError if more than half of `rows` can't train: then it is the whole set that is misunderstood.
    """
    not_dropped = ("", HELD_OUT, *LEFT_OUT)
    counts = [(fate, n) for fate, n in Counter(fates.tolist()).most_common() if fate not in not_dropped]
    dropped = {cause: (n, int(np.argmax(fates == cause))) for cause, n in counts}
    n_dropped = np.count_nonzero(~np.isin(fates[rows], not_dropped))
    if 2 * n_dropped > len(rows):
        causes = "; ".join(f"{n:,} x {cause} (first: row {first})" for cause, (n, first) in dropped.items())
        what_is_read = "prompt (or conversations, or the first turns of both sides) + chosen + rejected"
        raise UserError(f"{n_dropped:,} of {len(rows):,} rows can't be used: {causes}. What is read: {what_is_read}")
    return dropped


def map_rows(table: Dataset, function: Callable, title: str) -> Dataset:
    """All rows through `function`, on all cores. datasets keeps the result, under a key made of the rows, of this
    file's text, and of the function with all that it holds, a tokenizer for instance."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    code = Path(__file__).read_text(encoding="utf-8")
    return table.with_format("arrow").map(
        function,
        batched=True,
        remove_columns=table.column_names,
        new_fingerprint=Hasher.hash((table._fingerprint, code, function)),
        num_proc=min(n_cores, len(table) // 4000) or None,
        desc=title,
    )


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs to steps and micro-batches


def epoch_order(keys: np.ndarray, seed: int, epoch: int, group_by_prompt: bool = True) -> np.ndarray:
    """The order of the pairs in one epoch, [n] indices: prompts shuffled, a prompt's pairs together.

    Without `group_by_prompt` a prompt's pairs are spread over the epoch; then hardly anything is shared within a step.
    """
    random = np.random.default_rng([seed, epoch])
    if not group_by_prompt:
        return random.permutation(len(keys))
    _, group = np.unique(keys, return_inverse=True)
    place = random.permutation(int(group.max()) + 1)
    return np.argsort(place[group], kind="stable")


class StepBatches:
    """Item s: this process's micro-batches of optimizer step s.

    A function of (seed, s), so that a resumed run and every process see the same order: to resume is to start at s.
    """

    def __init__(
        self, pairs: Pairs, collate: "TreeCollator", batch_size: int, seed: int, group_by_prompt: bool = True,
        process: int = 0, n_processes: int = 1,
    ):  # fmt: skip
        self.pairs, self.collate, self.batch_size = pairs, collate, batch_size
        self.seed, self.group_by_prompt = seed, group_by_prompt
        self.process, self.n_processes = process, n_processes
        self.steps_per_epoch = -(-len(pairs) // batch_size)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step, over all processes; the last step of an epoch has what is left."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(self.pairs.keys, self.seed, epoch, self.group_by_prompt)
        return self.order[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list["MicroBatch"]:
        return self.collate(self.pairs.read(self.indices(step)), self.n_processes)[self.process :: self.n_processes]


@dataclass
class MicroBatch:
    """One row of token trees: what one forward pass computes. `TreeCollator` says what is in it."""

    tensors: dict[str, torch.Tensor]  # for the device
    segments: list[tuple[int, int, int, int]]  # for the host alone, to plan attention from

    def filler(self) -> "MicroBatch":
        """The same without pairs, so that its loss is an empty sum: keeps processes in step that have no pairs left."""
        names = ("chosen_index", "rejected_index", "pair_index")
        return MicroBatch(self.tensors | {name: self.tensors[name][:0] for name in names}, self.segments)


Tree = list[dict]  # pairs of one prompt: `index`, `prompt` and `responses`, their tokens as bytes (int64)


@dataclass
class TreeCollator:
    """Cuts a step's pairs into micro-batches in which each prompt and each distinct response is encoded once.

    Example: one prompt, two pairs that share their chosen response.

    >>> collate = TreeCollator(micro_batch_tokens=16)
    >>> pairs = [{"index": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
    ...          {"index": 1, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [4, 4, 9]}]
    >>> (batch,) = collate(pairs)
    >>> for name, tensor in batch.tensors.items():
    ...     print(f"{name:16}", tensor.tolist())
    input_ids        [[5, 6, 7, 9, 8, 9, 4, 4, 9]]
    position_ids     [[0, 1, 2, 3, 2, 3, 2, 3, 4]]
    predictor_index  [1, 2, 1, 4, 1, 6, 7]
    target_ids       [7, 9, 8, 9, 4, 4, 9]
    response_index   [0, 0, 1, 1, 2, 2, 2]
    response_lengths [2, 2, 3]
    chosen_index     [0, 0]
    rejected_index   [1, 2]
    pair_index       [0, 1]
    >>> batch.segments
    [(0, 2, 0, 0), (2, 4, 0, 2), (4, 6, 0, 2), (6, 9, 0, 2)]

    `segments` has, for each prompt and each response, its (start, end) in the row and those of its prompt, a prompt's
    own being (start, start). The tensors are explained at the end, where they are made, by their shapes: T tokens,
    N response tokens, M distinct responses, P pairs.
    """

    micro_batch_tokens: int
    share: bool = True  # False encodes every response of every pair anew, prompt included, as other trainers do

    def __call__(self, pairs: Sequence[dict], n_processes: int = 1) -> list[MicroBatch]:
        """The micro-batches of these pairs, the longest first; their number is a multiple of `n_processes`.

        Raises UserError if one pair alone is longer than `micro_batch_tokens`.
        """
        # Trees into the fewest groups that hold them, evenly filled: the longest first, each into the emptiest group.
        trees = sorted(self._trees(pairs), key=self._n_tokens, reverse=True)
        n_tokens = sum(map(self._n_tokens, trees))
        n_groups = (n_tokens - 1) // (self.micro_batch_tokens * n_processes) * n_processes
        while True:
            n_groups += n_processes
            groups, totals = [[] for _ in range(n_groups)], [0] * n_groups
            for tree in trees:
                emptiest = totals.index(min(totals))
                groups[emptiest].append(tree)
                totals[emptiest] += self._n_tokens(tree)
            if max(totals) <= self.micro_batch_tokens:
                break
        groups = [groups[i] for i in np.argsort(-np.array(totals), kind="stable")]
        batches = [self._micro_batch(trees) for trees in groups if trees]
        return batches + [batches[-1].filler()] * (n_groups - len(batches))

    def _n_tokens(self, tree: Tree) -> int:
        """Of the prompt and the distinct responses; where nothing is shared, the prompt counts for each response."""
        responses = {ids for pair in tree for ids in pair["responses"]}
        n_prompts = 1 if self.share else len(responses)
        return (n_prompts * len(tree[0]["prompt"]) + sum(map(len, responses))) // 8

    def _trees(self, pairs: Sequence[dict]) -> list[Tree]:
        """One tree for each prompt; where it doesn't fit into a micro-batch several, each with the prompt once more."""
        by_prompt: dict[bytes | int, Tree] = {}
        for pair in pairs:
            prompt, *responses = (np.asarray(pair[name], dtype=np.int64).tobytes() for name in IDS)
            taken = {"index": pair["index"], "prompt": prompt, "responses": responses}
            if (n_tokens := self._n_tokens([taken])) > self.micro_batch_tokens:
                text = f"--micro_batch_tokens {self.micro_batch_tokens} is too small for a pair of {n_tokens} tokens"
                raise UserError(text)
            by_prompt.setdefault(prompt if self.share else pair["index"], []).append(taken)
        trees = []
        for left in by_prompt.values():
            tree, there = [], set()
            while left:
                # The pair that adds the fewest tokens: where a tree must be cut, its parts have little in common.
                best = min(left, key=lambda pair: sum(len(ids) for ids in pair["responses"] if ids not in there))
                if tree and self._n_tokens([*tree, best]) > self.micro_batch_tokens:
                    trees.append(tree)
                    tree, there = [], set()
                else:
                    tree.append(best)
                    there.update(best["responses"])
                    left.remove(best)
            trees.append(tree)
        return trees

    def _micro_batch(self, trees: list[Tree]) -> MicroBatch:
        tokens, positions, predictors, targets, pairs, segments = [], [], [], [], [], []
        at = 0  # tokens in the row so far
        for tree in trees:
            responses = list(dict.fromkeys(ids for pair in tree for ids in pair["responses"]))
            number = {ids: len(targets) + i for i, ids in enumerate(responses)}  # in the micro-batch
            pairs += [(pair["index"], *(number[ids] for ids in pair["responses"])) for pair in tree]
            prompt, *responses = (np.frombuffer(ids, dtype=np.int64) for ids in (tree[0]["prompt"], *responses))
            for branches in [responses] if self.share else [[ids] for ids in responses]:
                start, end = at, at + len(prompt)
                tokens.append(prompt)
                positions.append(np.arange(len(prompt)))
                segments.append((start, end, start, start))
                at = end
                for ids in branches:
                    tokens.append(ids)
                    positions.append(np.arange(len(ids)) + len(prompt))
                    segments.append((at, at + len(ids), start, end))
                    # The prompt's last token predicts a response's first one.
                    predictors.append(np.r_[end - 1, at : at + len(ids) - 1])
                    targets.append(ids)
                    at += len(ids)
        pair_index, chosen_index, rejected_index = np.array(sorted(pairs)).T.copy()
        lengths = np.array([len(ids) for ids in targets])
        arrays = {
            "input_ids": np.concatenate(tokens)[None],  # [1, T]: a prompt, its responses, the next tree; no padding
            "position_ids": np.concatenate(positions)[None],  # [1, T]: restart after the prompt for each response
            "predictor_index": np.concatenate(predictors),  # [N]: where the state is that predicts a response token
            "target_ids": np.concatenate(targets),  # [N]: the response tokens
            "response_index": np.repeat(np.arange(len(lengths)), lengths),  # [N]: the response that each belongs to
            "response_lengths": lengths,  # [M]: in tokens
            "chosen_index": chosen_index,  # [P]: the responses of each pair
            "rejected_index": rejected_index,  # [P]
            "pair_index": pair_index,  # [P]: the numbers of the pairs in their `Pairs`
        }
        return MicroBatch({name: torch.from_numpy(array) for name, array in arrays.items()}, segments)
