"""Preference data: from files and hub names to micro-batches of token trees.

In the order that data flows: `load_rows` reads a hub name, a folder or a file; `read_triple` maps one row, by its
columns, to prompt, chosen and rejected; `Encoder` tokenizes; `prepare` does that for a whole set, accounts for every
row and splits by prompt; `StepBatches` has the pairs of each step; `TreeCollator` cuts them into micro-batches, in
which each prompt stands once and each distinct response once.
"""

import functools
import glob
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


class Unusable(UserError):
    """A row that can't train. The message is the cause under which it is counted."""


def refuse_if(condition: Any, cause: str) -> None:
    if condition:
        raise Unusable(cause)


def first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------------------------------
# Reading

FILES = (".parquet", ".json", ".jsonl")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # metadata
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "testing", "eval")
JSON = "(json)"  # the column that has a row as JSON text


def load_rows(name: str, split: str = "train", flag: str = "--dataset_name") -> Dataset:
    """The raw rows of a hub data set, a local folder (as `git clone` leaves it) or a .parquet, .json or .jsonl file.

    `info.description` of the result says what was read and which files were left out. Raises UserError, which begins
    with `flag`, if there is nothing to read.
    """
    path = Path(name).expanduser()
    is_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in FILES or name.count("/") > 1
    try:
        if is_local:
            files, source = choose_files(path, split)
            rows = read_files(files)
        else:
            rows, source = datasets.load_dataset(name, split=split), f"{name}, split {split}"
    except Exception as error:  # the library raises a dozen types here; each means that these rows can't be read
        while error.__cause__:  # "An error occurred while generating the dataset" says nothing
            error = error.__cause__
        text = str(error)
        if not isinstance(error, UserError):
            text = f"split {split} can't be loaded ({type(error).__name__}: {first_line(error)})"
        if not is_local:
            text += ": HF_ENDPOINT sets a mirror of the hub; a file or folder can be given, too; `--demo` needs neither"
        raise UserError(f"{flag} {name}: {text}") from None
    rows.info.description = source
    return rows


def choose_files(path: Path, split: str) -> tuple[list[Path], str]:
    """The files to read, and words that say which they are and which were left out.

    Of a folder, all files of the three kinds are read whose names do not say another split.
    """
    if not path.exists():
        raise UserError("there is no such file or folder")
    if path.is_file():
        if path.suffix not in FILES or split != "train":
            raise UserError("a single file must end in .parquet, .json or .jsonl and has no split but train")
        return [path], path.name
    names = sorted(glob.glob("**/*.*", root_dir=path, recursive=True))  # hidden files are not among them
    names = [name for name in names if (path / name).is_file() and not name.endswith(".md")]
    with_rows = [name for name in names if name.endswith(FILES) and Path(name).name not in NO_ROWS]
    to_read = [name for name in with_rows if split_of(name) == split]
    others = [name for name in names if name not in to_read]
    not_read = f"; not read: {shorten(', '.join(others), 200)}" if others else ""
    if not to_read:
        raise UserError(f"no .parquet, .json or .jsonl file of split {split} is in it{not_read}")
    return [path / name for name in to_read], shorten(", ".join(to_read), 200) + not_read


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
    json_files, tables = [], []
    for file in files:
        with file.open("rb") as opened:
            if opened.read(19) == b"version https://git":
                raise UserError(f"{file.name} is a git-lfs pointer, not the file itself: run `git lfs pull` there")
        if file.suffix == ".parquet":
            tables.append(datasets.load_dataset("parquet", data_files=[glob.escape(str(file))], split="train"))
        else:
            json_files.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    if json_files:
        # datasets caches rows by the arguments: with size and time of change, a file that was changed is read again.
        features, arguments = datasets.Features({JSON: datasets.Value("large_binary")}), {"files": tuple(json_files)}
        tables.insert(0, Dataset.from_generator(json_rows, features=features, gen_kwargs=arguments))
    return datasets.concatenate_datasets(tables)


def json_rows(files: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, bytes]]:
    for path, _, _ in files:
        # Broken bytes become surrogates, which cost their row, not the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            is_array = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            try:
                lines = map(json.dumps, json.load(file)) if is_array else filter(str.strip, file)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{Path(path).name} is not valid JSON: {first_line(error)}") from None
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

    The prompt is `prompt` or `conversations`, as text or as messages, and then the turns with which both `chosen` and
    `rejected` begin. Nothing is guessed: raises Unusable, with the cause, for any other row.
    """
    try:
        if isinstance(row, dict) and row.get(JSON) is not None:
            row = json.loads(row[JSON].decode())
        json.dumps(row, ensure_ascii=False, default=str).encode()  # raises for half a character, as "\ud800" is
    except (ValueError, RecursionError):
        raise Unusable("not valid JSON or Unicode") from None
    refuse_if(not isinstance(row, dict), "row is not an object")
    refuse_unsupported(row)
    given = [name for name in ("prompt", "conversations") if has_content(row.get(name))]
    refuse_if(len(given) == 2, "prompt and conversations: which is the prompt?")
    prompt = read_messages(row[given[0]], given[0]) if given else []
    chosen, rejected = (read_messages(row.get(name), name) for name in ("chosen", "rejected"))
    refuse_if(chosen == rejected, "chosen equals rejected")

    # Where one side is the beginning of the other, there is no first difference, and the row is refused below.
    n_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    prompt = join(row.get("system") or "", prompt, chosen[:n_shared])
    refuse_if(not prompt, f"no prompt; columns: {', '.join(sorted(row.keys() - {JSON}))}"[:200])
    refuse_if(any(not turn["content"].strip() for turn in prompt if turn["role"] != "system"), "prompt: empty")
    refuse_if(prompt[-1]["role"] != "user", "prompt: does not end with a user turn")
    for side in (chosen, rejected):
        refuse_if([turn["role"] for turn in side[n_shared:]] != ["assistant"], "response: not one assistant turn")
    chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]

    if given == ["prompt"] and all(isinstance(row[name], str) for name in ("prompt", "chosen", "rejected")):
        refuse_if(len(prompt) > 1, "system beside a prompt of plain text: make messages of them")
        prompt = prompt[0]["content"]
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
            # "Hello" and "Hello! I am ..." is a greeting; a prompt that is repeated is set apart from the response.
            is_apart = prompt[-1].isspace() or prompt[-1] in ":：" or (chosen[:1] + rejected[:1]).isspace()
            refuse_if(not is_apart, "chosen and rejected begin with the prompt: repeated, or part of the responses?")
    refuse_if(not chosen.strip() or not rejected.strip(), "response: empty")
    return Triple(prompt, chosen, rejected, "" if row.get("domain") is None else str(row["domain"]))


def join(system: Any, prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The system turn, the prompt's turns, and those of the shared turns that don't repeat the prompt or its end.

    prompt u1        + shared a1 u2     -> u1 a1 u2
    prompt u1        + shared u1 a1 u2  -> u1 a1 u2
    prompt u1 a1 u2  + shared u2        -> u1 a1 u2
    """
    refuse_if(not isinstance(system, str), "system: wrong type")
    systems = [{"role": "system", "content": system}] if system else []
    for turns in (prompt, shared):
        if turns and turns[0]["role"] == "system":
            systems.append(turns.pop(0))
    refuse_if(any(one != systems[0] for one in systems), "system: two that differ")
    n_repeated = max(n for n in range(len(prompt) + 1) if prompt[len(prompt) - n :] == shared[:n])
    contradict = n_repeated == 0 and prompt and shared and prompt[-1]["role"] == shared[0]["role"]
    refuse_if(contradict, "prompt: chosen and rejected begin with another one")
    return systems[:1] + prompt + shared[n_repeated:]


def read_messages(value: Any, column: str) -> list[Message]:
    """Turns in a list, a turn alone, or its text alone, which is the user's or the assistant's."""
    refuse_if(value is None, f"{column}: missing")
    if isinstance(value, str):
        refuse_if(MESSAGES_AS_TEXT.match(value), f"{column}: messages written as one string")
        refuse_if(column == "conversations", f"{column}: wrong type")
        value = {"role": "user" if column == "prompt" else "assistant", "content": value}
    turns = [value] if isinstance(value, dict) else value
    refuse_if(not isinstance(turns, list), f"{column}: wrong type")
    return [read_turn(turn, column) for turn in turns]


def read_turn(turn: Any, column: str) -> Message:
    refuse_if(not isinstance(turn, dict), f"{column}: wrong type")
    refuse_unsupported(turn)
    role = str(turn.get("from") or turn.get("role"))
    refuse_if(role.lower() not in ROLES, f"{column}: unknown role {role[:40]}")
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        refuse_if(not isinstance(part, dict) or part.get("type") != "text", f"{column}: parts that are not text")
        refuse_if(not isinstance(part.get("text"), str), f"{column}: wrong type")
    return {"role": ROLES[role.lower()], "content": "".join(part["text"] for part in parts)}


def refuse_unsupported(fields: dict) -> None:
    for name in NOT_SUPPORTED:
        refuse_if(has_content(fields.get(name)), f"{name}: not supported")


def has_content(value: Any) -> bool:
    """Whether a value says anything: parquet gives each row all columns and each object all fields, mostly empty."""
    if isinstance(value, dict | list):
        return any(map(has_content, value.values() if isinstance(value, dict) else value))
    return value not in (None, "", "[]", "{}")


# ---------------------------------------------------------------------------------------------------------------------
# Triples to tokens

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NO_TOKENS = {name: np.empty(0, np.int32) for name in IDS}
NO_TOKENS |= {"digest": 0, "end_id": 0, "truncated": False, "is_plain": False}


class Encoder:
    """Tokenizes triples: `prompt_ids`, `chosen_ids` and `rejected_ids`, each response with exactly one end-of-turn.

    Conversations go through the tokenizer's chat template; plain text is taken as it is, begins with a BOS where the
    tokenizer writes one, and ends with the tokenizer's eos. A response is what the template writes after the prompt,
    tokenized apart from it, as it is when the model answers: the prompt is there first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        eos = tokenizer.eos_token_id
        self.end_of_turn = end_of_turn_id(tokenizer)  # ends the responses of conversations
        self.end_of_text = self.end_of_turn if eos is None else eos  # ends those of plain text
        ends = [re.escape(tokenizer.decode([token])) for token in (self.end_of_turn, self.end_of_text)]
        self.end_in_data = re.compile(rf"({'|'.join(ends)})\s*\Z")
        self.special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.bos_ids = [tokenizer.bos_token_id] if begins_with_bos else []

    def encode(self, triple: Triple) -> dict[str, Any]:
        """The tokens of a triple, a digest of them, the end-of-turn, whether they were cut, whether it is plain text.

        A pair of over `max_length` tokens is cut by one rule: the prompt keeps its last
        max(max_length / 2, max_length - longer response) tokens, each response its first tokens in the room that is
        left. A response that was cut has no end-of-turn.
        """
        prompt, *responses = (tokenize(self.tokenizer, text) for text in self.render(triple))
        is_plain = isinstance(triple.prompt, str)
        if is_plain:
            prompt = self.bos_ids + prompt
        refuse_if(not prompt, "prompt: empty")
        end_id = self.end_of_text if is_plain else self.end_of_turn
        # What a template writes after its end-of-turn ("\n") belongs to the next turn.
        responses = [[*takewhile(lambda token: token != end_id, ids), end_id] for ids in responses]
        longest = max(map(len, responses))
        n_prompt = min(len(prompt), max(self.max_length // 2, self.max_length - longest))
        n_response = self.max_length - n_prompt
        truncated = n_prompt < len(prompt) or n_response < longest
        prompt = prompt[len(prompt) - n_prompt :]
        chosen, rejected = (ids[:n_response] for ids in responses)
        refuse_if(chosen == rejected, f"chosen equals rejected after {'truncation' if truncated else 'tokenizing'}")
        pair = {name: np.array(ids, np.int32) for name, ids in zip(IDS, (prompt, chosen, rejected), strict=True)}
        digest = hash64(b"|".join(ids.tobytes() for ids in pair.values()))
        return pair | {"digest": digest, "end_id": end_id, "truncated": truncated, "is_plain": is_plain}

    def render(self, triple: Triple) -> list[str]:
        """The prompt and the two responses as they are tokenized: by the chat template, unless they are plain text."""
        # Encoding adds the model's own end-of-turn or eos; where a response brings one along, it is taken off.
        responses = [self.end_in_data.sub("", text) for text in (triple.chosen, triple.rejected)]
        is_plain = isinstance(triple.prompt, str)
        contents = [triple.prompt] if is_plain else [turn["content"] for turn in triple.prompt]
        is_templated = any(special in text for text in (*contents, *responses) for special in self.special_tokens)
        refuse_if(is_templated, "contains a special token (text to which a template was applied already?)")
        refuse_if(not all(response.strip() for response in responses), "response: empty")
        if is_plain:
            return [triple.prompt, *responses]

        refuse_if(not self.tokenizer.chat_template, "the tokenizer has no chat template, which messages need")
        prompt = apply_template(self.tokenizer, triple.prompt, add_generation_prompt=True)
        # White space around a text is the template's to trim. An earlier answer may lose its thoughts, as it does when
        # the model is used.
        is_whole = all(turn["content"].strip() in prompt for turn in triple.prompt if turn["role"] != "assistant")
        refuse_if(not is_whole, "the chat template removes part of the prompt")
        texts = [prompt]
        for response in responses:
            answered = apply_template(self.tokenizer, [*triple.prompt, {"role": "assistant", "content": response}])
            refuse_if(not answered.startswith(prompt), "the chat template changes the prompt once it is answered")
            texts.append(answered.removeprefix(prompt))
            refuse_if(response.strip() not in texts[-1], "the chat template removes part of the response")
        return texts


@functools.lru_cache(maxsize=1000)  # rows of a prompt stand together, and share responses
def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
        special_ids = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        for token in tokenize(tokenizer, after):
            if token in special_ids:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template with an end-of-turn token nor an eos token")
    return tokenizer.eos_token_id


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raises UserError if texts that stand behind a line break don't come back from their tokens.

    Transformers may load a tokenizer as another kind; and tokenizers of Llama 2's kind write a space in front of every
    text, so of each response. Characters may change their width, and a rare one may be missing: a quarter of the texts
    may differ.
    """
    changed = []
    for text in texts:
        ids = tokenize(tokenizer, "\n") + tokenize(tokenizer, text)
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("\n")
        if unicodedata.normalize("NFKC", back) != unicodedata.normalize("NFKC", text):
            changed.append(f"{text[:60]!r} becomes {back[:60]!r}")
    if len(changed) > len(texts) / 4:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) doesn't give texts back: {changed[0]}: is it the model's own, "
            "complete, and loaded as it should be? Those that write a space in front, as Llama 2's, are not supported"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set


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
        columns = self.tokens[[int(index) for index in indices]]
        return [{"index": int(index)} | {name: columns[name][i] for name in IDS} for i, index in enumerate(indices)]


@dataclass
class PreparedData:
    """Pairs to train on, pairs held out, and an account of all other rows."""

    train: Pairs
    held_out: Pairs
    end_ids: list[int]  # the tokens that end the responses: one, or two where only some pairs are plain text
    n_rows: int  # in the source: to train on, held out, left out and dropped
    account: dict[str, int]  # how many "rows left out: ..." and "rows dropped: ..."; also which "pairs ..." are special
    source: str  # what was read

    def summary(self) -> str:
        """What was read, and what became of each row."""
        n_prompts, n_held_out = (len(np.unique(pairs.keys)) for pairs in (self.train, self.held_out))
        text = f"{self.n_rows:,} rows: {len(self.train):,} pairs of {n_prompts:,} prompts to train on, "
        text += f"{len(self.held_out):,} held out ({n_held_out:,} other prompts)"
        return "; ".join([text, *in_words(self.account), f"read: {self.source}"])


def prepare(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024, max_train_samples: int | None = None,
    max_eval_samples: int = 512, domains: Sequence[str] | None = None, held_out_rows: Dataset | None = None,
) -> PreparedData:  # fmt: skip
    """Tokenize a data set and split it by prompt.

    Prompts are taken in the order of their hashes: the first ones are held out, the next ones are trained on, up to
    `max_eval_samples` and `max_train_samples` pairs. So a subset is a fair sample of all domains, the held-out pairs
    are the same for any subset and seed, and no prompt is on both sides. At most a tenth of the prompts is held out,
    with two pairs of each, so that a few hundred pairs are many prompts; their other pairs are used nowhere.

    If `held_out_rows` are given, they are held out instead, and rows with a prompt of theirs are not trained on. They
    are numbered after `rows`. Raises UserError for what the user should know before a run.
    """
    source, first_given, held_out_flag = rows.info.description, None, "--dataset_name"
    if held_out_rows is not None:
        first_given, held_out_flag = len(rows), "--eval_dataset_name"
        source += f"; held out: {held_out_rows.info.description}"
        try:
            rows = datasets.concatenate_datasets([rows, held_out_rows])
        except Exception as error:  # columns of the same name and of other types
            raise UserError(f"--eval_dataset_name: its columns differ from the data's ({first_line(error)})") from None

    # The first pass reads every row. Each line of `table`, by row number, has a hash of the prompt, the domain, and the
    # cause why the row can't train, "" if it can.
    table = map_rows(rows, scan, {"key": 0, "domain": ""}, "Reading rows").to_pandas()
    refuse_if_most_are_dropped("--dataset_name", table[:first_given])
    if held_out_rows is not None:
        refuse_if_most_are_dropped(held_out_flag, table[first_given:], first_given)
    good = table[table.cause == ""]
    check_tokenizer(tokenizer, [read_triple(rows[number]).chosen for number in good.index[:20]])
    train, held_out, left_out = split_by_prompt(good, domains, first_given, max_train_samples, max_eval_samples)
    if not len(held_out if max_train_samples == 0 else train):
        raise UserError(f"no row is left: {'; '.join(in_words(left_out))}")
    if held_out_rows is not None and not len(held_out):
        raise UserError(f"--eval_dataset_name: no row is left: {'; '.join(in_words(left_out))}")

    # The second pass tokenizes the rows that are used. `used` has them by row number, in the order of `tokens`.
    encoder, used = Encoder(tokenizer, max_length), pd.concat([train, held_out])
    tokens = map_rows(rows.select(used.index), lambda row: encoder.encode(read_triple(row)), NO_TOKENS, "Tokenizing")
    used = used[["key", "domain"]].join(tokens.remove_columns(list(IDS)).to_pandas().set_index(used.index))
    table.loc[used.index, "cause"] = used.cause
    refuse_if_most_are_dropped("--dataset_name", table.loc[train.index])
    if held_out_rows is not None or max_train_samples == 0:  # those that were chosen may be a handful
        refuse_if_most_are_dropped(held_out_flag, table.loc[held_out.index], first_given or 0)
    tokens = tokens.select_columns(list(IDS)).select(np.flatnonzero(used.cause == "")).with_format("numpy")
    used = used[used.cause == ""]

    def pairs_of(side: pd.DataFrame) -> Pairs:
        is_here = used.index.isin(side.index)
        pairs, ids = used[is_here], tokens.select(np.flatnonzero(is_here))
        fingerprint = hashlib.blake2b(pairs.digest.to_numpy().tobytes(), digest_size=16).hexdigest()
        return Pairs(ids, pairs.key.to_numpy(), pairs.index.to_numpy(), pairs.domain.to_numpy(), fingerprint)

    account = {
        "pairs are plain text: no chat template is applied": used.is_plain.sum(),
        "pairs cut to max_length": used.truncated.sum(),
    }
    return PreparedData(
        train=pairs_of(train),
        held_out=pairs_of(held_out),
        end_ids=sorted(set(used.end_id.tolist())),
        n_rows=len(rows),
        account=account | left_out | count_dropped(table),
        source=source,
    )


def scan(row: Any) -> dict[str, Any]:
    """What the split needs of a row: a hash of its prompt, and its domain."""
    triple = read_triple(row)
    return {"key": hash64(json.dumps(triple.prompt).encode()), "domain": triple.domain}


def split_by_prompt(
    good: pd.DataFrame, domains: Sequence[str] | None, first_given: int | None, max_train_samples: int | None,
    max_eval_samples: int,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:  # fmt: skip
    """The rows to train on, the rows to hold out, and how many are left out, by cause.

    Rows from number `first_given` on were given to be held out; if it is None, some are chosen.
    """
    if unknown := set(domains or ()) - set(good.domain):
        there = ", ".join(sorted(set(good.domain)))
        raise UserError(f"--domains: no row has {', '.join(sorted(unknown))}; there is {there}")
    rows = good[good.domain.isin(domains)] if domains else good
    rows = rows.sort_values("key", kind="stable")  # by prompt, in the order of their hashes; then as in the source
    if first_given is not None:
        held_out = rows[rows.index >= first_given]
    else:
        prompts = rows.groupby("key")
        held_out = rows[(prompts.ngroup() < prompts.ngroups // 10) & (prompts.cumcount() < 2)][:max_eval_samples]
    train = rows[~rows.key.isin(held_out.key)]
    left_out = {
        "rows left out: their prompt is held out": len(rows) - len(held_out) - len(train),
        "rows left out: more than --max_train_samples": len(train) - len(train[:max_train_samples]),
        "rows left out: more than --max_eval_samples": len(held_out) - len(held_out[:max_eval_samples]),
        "rows left out: not in --domains": len(good) - len(rows),
    }
    return train[:max_train_samples], held_out[:max_eval_samples], left_out


def count_dropped(table: pd.DataFrame) -> dict[str, int]:
    """How many rows have each cause, the most frequent first, with the number of the first such row."""
    causes = table.cause[table.cause != ""]
    counts = causes.value_counts().items()
    return {f"rows dropped: {cause} (first: row {causes.index[causes == cause].min()})": n for cause, n in counts}


def refuse_if_most_are_dropped(flag: str, table: pd.DataFrame, first_row: int = 0) -> None:
    """Raises UserError if more than half of the rows can't train: then it is the whole set that is misunderstood.

    `first_row` is the number of the set's first row in the table's index.
    """
    n_dropped = (table.cause != "").sum()
    if n_dropped > len(table) / 2:
        causes = "; ".join(in_words(count_dropped(table.set_axis(table.index - first_row)))[:5])
        form = "prompt (or conversations, or the first turns of both sides) + chosen + rejected"
        raise UserError(f"{flag}: {n_dropped:,} of {len(table):,} rows can't be used: {causes}. What is read: {form}")


def in_words(counts: dict[str, int]) -> list[str]:
    return [f"{n:,} {what}" for what, n in counts.items() if n]


def map_rows(rows: Dataset, function: Callable[[Any], dict], otherwise: dict, title: str) -> Dataset:
    """What `function` makes of each row, on all cores, and the `cause` why it can't train, "" if it can.

    Where `function` raises Unusable, the row becomes `otherwise`, which has the same columns.
    """

    def map_batch(batch: pa.Table) -> pa.Table:
        mapped = []
        for row in batch.to_pylist():
            try:
                mapped.append(function(row) | {"cause": ""})
            except (Unusable, RecursionError) as cause:  # the latter of objects that are nested hundreds deep
                mapped.append(otherwise | {"cause": str(cause)})
        return pa.Table.from_pylist(mapped)

    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    # datasets caches the result under a key: the rows, this file's text, and the function with its tokenizer.
    code = Path(__file__).read_text(encoding="utf-8")
    return rows.with_format("arrow").map(
        map_batch,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash((rows._fingerprint, code, function)),
        num_proc=min(n_cores, len(rows) // 4000) or None,
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
    prompts, prompt = np.unique(keys, return_inverse=True)
    place = random.permutation(len(prompts))
    return np.argsort(place[prompt], kind="stable")


@dataclass
class StepBatches:
    """Item s: this process's micro-batches of optimizer step s.

    A function of (seed, s), so that a resumed run and every process see the same order: to resume is to start at s.
    """

    pairs: Pairs
    collate: "TreeCollator"
    batch_size: int  # pairs in a step, over all processes
    seed: int
    group_by_prompt: bool = True
    process: int = 0
    n_processes: int = 1

    def __post_init__(self):
        self.steps_per_epoch = math.ceil(len(self.pairs) / self.batch_size)
        order = functools.partial(epoch_order, self.pairs.keys, self.seed, group_by_prompt=self.group_by_prompt)
        self.order_of = functools.lru_cache(maxsize=1)(order)

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step, over all processes; the last step of an epoch has what is left."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.order_of(epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list["MicroBatch"]:
        return self.collate(self.pairs.read(self.indices(step)), self.n_processes)[self.process :: self.n_processes]


class Segment(NamedTuple):
    """Where a prompt or a response is in its row, and where the prompt before it is; before a prompt, nothing is."""

    start: int
    end: int
    prompt_start: int
    prompt_end: int

    __repr__ = tuple.__repr__  # shows the four numbers alone


@dataclass
class MicroBatch:
    """One row of token trees: what one forward pass computes. `TreeCollator` says what is in it."""

    tensors: dict[str, torch.Tensor]  # for the device
    segments: list[Segment]  # for the host alone, to plan attention from

    def filler(self) -> "MicroBatch":
        """The same without pairs, so that its loss is an empty sum: keeps processes in step that have no pairs left."""
        names = ("chosen_index", "rejected_index", "pair_index")
        return MicroBatch(self.tensors | {name: self.tensors[name][:0] for name in names}, self.segments)


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

    `segments` has a `Segment` for each prompt and each response. `lay_out`, at the end, explains the tensors.
    """

    micro_batch_tokens: int

    def __call__(self, pairs: Sequence[dict], n_processes: int = 1) -> list[MicroBatch]:
        """The micro-batches of these pairs, the longest first; their number is a multiple of `n_processes`.

        Raises UserError if one pair alone is longer than `micro_batch_tokens`.
        """
        trees = [part for tree in grow_trees(pairs) for part in cut(tree, self.micro_batch_tokens)]
        n_groups = math.ceil(count_tokens(trees) / (self.micro_batch_tokens * n_processes)) * n_processes  # at least
        groups = spread(trees, n_groups)
        while count_tokens(groups[0]) > self.micro_batch_tokens:  # the fullest one
            groups = spread(trees, len(groups) + n_processes)
        batches = [lay_out(group) for group in groups if group]
        return batches + [batches[-1].filler()] * (len(groups) - len(batches))


@dataclass
class Tree:
    """A prompt, its distinct responses, each by its bytes, and pairs: (number of the pair, chosen, rejected)."""

    prompt: np.ndarray
    responses: dict[bytes, np.ndarray] = field(default_factory=dict)
    pairs: list[tuple[int, bytes, bytes]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses.values()))


def count_tokens(trees: list[Tree]) -> int:
    return sum(tree.n_tokens for tree in trees)


def grow_trees(pairs: Sequence[dict]) -> list[Tree]:
    """One tree for each prompt."""
    trees: dict[bytes, Tree] = {}
    for pair in pairs:
        prompt, chosen, rejected = (np.asarray(pair[name], dtype=np.int64) for name in IDS)
        tree = trees.setdefault(prompt.tobytes(), Tree(prompt))
        tree.responses |= {chosen.tobytes(): chosen, rejected.tobytes(): rejected}
        tree.pairs.append((pair["index"], chosen.tobytes(), rejected.tobytes()))
    return list(trees.values())


def cut(tree: Tree, most_tokens: int) -> list[Tree]:
    """The same pairs in trees of at most `most_tokens`, each with the prompt. Raises UserError if a pair has more.

    Each part takes the pair that adds the fewest tokens until none fits: so pairs that share a response stay together.
    """
    parts, left = [Tree(tree.prompt)], tree.pairs.copy()
    while left:
        part = parts[-1]
        added = [sum(len(tree.responses[key]) for key in pair[1:] if key not in part.responses) for pair in left]
        cheapest = int(np.argmin(added))
        n_tokens = part.n_tokens + added[cheapest]
        if n_tokens <= most_tokens:
            pair = left.pop(cheapest)
            part.pairs.append(pair)
            part.responses |= {key: tree.responses[key] for key in pair[1:]}
        elif part.pairs:
            parts.append(Tree(tree.prompt))
        else:
            raise UserError(f"--micro_batch_tokens {most_tokens} is too small for a pair of {n_tokens} tokens")
    return parts


def spread(trees: list[Tree], n_groups: int) -> list[list[Tree]]:
    """Trees in evenly filled groups, the fullest first: the longest tree goes first, each to the emptiest group."""
    groups, totals = [[] for _ in range(n_groups)], [0] * n_groups
    for tree in sorted(trees, key=lambda tree: tree.n_tokens, reverse=True):
        emptiest = totals.index(min(totals))
        groups[emptiest].append(tree)
        totals[emptiest] += tree.n_tokens
    return [groups[i] for i in np.argsort(-np.array(totals), kind="stable")]


def lay_out(trees: list[Tree]) -> MicroBatch:
    """Trees end to end in one row of T tokens, N of them in M responses, for P pairs; nothing is padded."""
    texts, segments, responses, pairs = [], [], [], []
    for tree in trees:
        start = segments[-1].end if segments else 0
        prompt = Segment(start, start + len(tree.prompt), start, start)
        segments.append(prompt)
        number = {}
        for key, ids in tree.responses.items():
            number[key] = len(responses)
            responses.append(Segment(segments[-1].end, segments[-1].end + len(ids), prompt.start, prompt.end))
            segments.append(responses[-1])
        texts += [tree.prompt, *tree.responses.values()]
        pairs += [(index, number[chosen], number[rejected]) for index, chosen, rejected in tree.pairs]
    input_ids = np.concatenate(texts)
    lengths = np.array([one.end - one.start for one in responses])
    positions = [np.arange(one.end - one.start) + one.prompt_end - one.prompt_start for one in segments]
    pair_index, chosen_index, rejected_index = np.array(sorted(pairs)).T.copy()
    arrays = {
        "input_ids": input_ids[None],  # [1, T]: a prompt, its responses, the next tree
        "position_ids": np.concatenate(positions)[None],  # [1, T]: restart after the prompt for each response
        # [N]: where the state is that predicts a response token: for the first one, the prompt's last
        "predictor_index": np.concatenate([np.r_[one.prompt_end - 1, one.start : one.end - 1] for one in responses]),
        "target_ids": np.concatenate([input_ids[one.start : one.end] for one in responses]),  # [N]
        "response_index": np.repeat(np.arange(len(responses)), lengths),  # [N]: the response that each belongs to
        "response_lengths": lengths,  # [M]: in tokens
        "chosen_index": chosen_index,  # [P]: the responses of each pair
        "rejected_index": rejected_index,  # [P]
        "pair_index": pair_index,  # [P]: the numbers of the pairs in their `Pairs`
    }
    return MicroBatch({name: torch.from_numpy(array) for name, array in arrays.items()}, segments)
