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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

FILES = (".parquet", ".json", ".jsonl")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test", "eval": "test"}  # fmt: skip
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # they describe data sets
JSON = "(json)"  # the column of unparsed rows

FORMS = "prompt (or conversations, or the first turns of both sides) + chosen + rejected"
COLUMNS = ("prompt", "conversations", "system", "chosen", "rejected", "domain")
NOT_SUPPORTED = ("tools", "tool_calls", "images", "image", "videos", "audios", "history", "chat_template_kwargs",
                 "reasoning_content", "thinking")  # fmt: skip
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system"}  # fmt: skip
TURNS_AS_TEXT = re.compile(
    r"""\s*\[?\s*\{\s*(['"])(role|from|content|value)\1\s*:.*(['"])(role|from|content|value)\3\s*:""", re.DOTALL
)
Message = dict[str, str]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


class Unusable(Exception):
    """A row that can't train. The message is the cause under which it is counted."""


def first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_rows(name: str, split: str = "train") -> Dataset:
    """The raw rows of a hub data set, a local folder (as `git clone` leaves it) or a .parquet, .json or .jsonl file.

    Of a folder, every file of the three kinds is read whose name does not say another split. What was read, and which
    files were left out, stands in `info.description` of the result.

    Rows of json and jsonl come as one binary column, unparsed: Arrow would refuse a whole file for one row whose types
    differ, and a single bad row must never cost a run.
    """
    path = Path(name).expanduser()
    is_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in FILES or name.count("/") > 1
    try:
        if not is_local:
            rows, description = datasets.load_dataset(name, split=split), f"{name}, split {split}"
        else:
            files, description = choose_files(path, split)
            rows = datasets.concatenate_datasets(read_files(files))
    except UserError:
        raise
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
    """The files to read at a local path, and words that say which they are and which were left out.

    Raises UserError if there are none.
    """
    if not path.exists():
        raise UserError(f"--dataset_name {path}: there is no such file or folder")
    if path.is_file():
        if path.suffix not in FILES:
            raise UserError(f"--dataset_name {path}: a file must end in .parquet, .json or .jsonl")
        if split not in ("train", split_of(path.name)):
            raise UserError(f"--dataset_split {split}: {path} is a single file, which has no splits")
        refuse_lfs_pointer(path)
        return [path], path.name
    chosen, left_out = [], []
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if file.suffix in FILES and file.name not in NO_ROWS and split_of(str(inside)) == SPLITS.get(split, split):
            refuse_lfs_pointer(file)
            chosen.append(file)
        elif file.suffix not in ("", ".md", ".py"):  # LICENSE, README.md, a loading script
            left_out.append(str(inside))
    without = f"; not read: {_listed(left_out)}" if left_out else ""
    if not chosen:
        raise UserError(f"--dataset_name {path}: no .parquet, .json or .jsonl file of split {split} is in it{without}")
    return chosen, _listed([str(file.relative_to(path)) for file in chosen]) + without


def split_of(name: str) -> str:
    """The split that a file's name says, or else its folder's; train if neither says one.

    >>> [split_of(name) for name in ("extra_2025.jsonl", "val/a.json", "data/test_prefs-00000-of-00002.parquet")]
    ['train', 'validation', 'test_prefs']
    """
    for part in reversed(Path(name).parts):
        for word in re.findall("[a-z]+", part.lower()):
            if word in SPLITS:
                shard = re.match(r"(.+)-\d{5}-of-\d{5}", part)
                return SPLITS.get(shard[1], shard[1]) if shard else SPLITS[word]
    return "train"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_lfs_pointer(file: Path) -> None:
    """A clone made without git-lfs has three lines of text in place of each large file."""
    with file.open("rb") as opened:
        if opened.read(19) == b"version https://git":
            raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in its clone")


def read_files(files: list[Path]) -> list[Dataset]:
    """Tables, to be put one after the other: the rows of json and jsonl, then those of each parquet file."""
    tables = []
    json_files = [file for file in files if file.suffix != ".parquet"]
    if json_files:
        # Size and time of change are part of the arguments because the arguments are the key of datasets' cache.
        versions = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in json_files)
        features = datasets.Features({JSON: datasets.Value("large_binary")})
        tables.append(Dataset.from_generator(_iterate_json, features=features, gen_kwargs={"versions": versions}))
    for file in files:
        if file.suffix == ".parquet":
            tables.append(datasets.load_dataset("parquet", data_files=[glob.escape(str(file))], split="train"))
    return tables


def _iterate_json(versions: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, bytes]]:
    is_empty = True
    for path, _, _ in versions:
        for row in _rows_of_file(path):
            is_empty = False
            yield {JSON: row}
    if is_empty:
        raise UserError(f"no rows in {_listed([path for path, _, _ in versions])}")


def _rows_of_file(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        if is_array:
            try:  # surrogateescape: a row with broken bytes is dropped by itself, not the file
                rows = json.loads(file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
            yield from (json.dumps(row).encode() for row in rows)
        else:
            yield from (line.removeprefix(b"\xef\xbb\xbf") for line in file if line.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Rows to triples


@dataclass
class Triple:
    """`prompt` is a list of messages, for the chat template, or plain text, taken as it is."""

    prompt: list[Message] | str
    chosen: str
    rejected: str
    domain: str = ""

    @property
    def is_plain_text(self) -> bool:
        return isinstance(self.prompt, str)

    def texts(self) -> list[str]:
        """All that somebody wrote: the prompt's turns, then the two responses."""
        prompt = [self.prompt] if self.is_plain_text else [turn["content"] for turn in self.prompt]
        return [*prompt, self.chosen, self.rejected]


def read_triple(row: Any) -> Triple:
    """Map a row by its columns to prompt, chosen and rejected. All turns are kept, a system turn too.

    The prompt is `prompt` or `conversations`, as text or as messages, and the turns with which both `chosen` and
    `rejected` begin. Nothing is guessed: raises Unusable, with the cause, for a row that says anything else.
    """
    if not isinstance(row, dict):
        raise Unusable("row is not an object")
    _refuse_unsupported(row)
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise Unusable(f"{name}: missing")
    for name in ("chosen", "rejected", "prompt", "conversations"):
        if isinstance(row.get(name), str) and TURNS_AS_TEXT.match(row[name]):
            raise Unusable(f"{name}: messages written as one string")
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    given = [name for name in ("prompt", "conversations") if _has_content(row.get(name))]
    if len(given) == 2:
        raise Unusable("prompt and conversations: which is the prompt?")
    prompt = row[given[0]] if given else None
    if given == ["conversations"] and isinstance(prompt, str):
        raise Unusable("conversations: wrong type")
    domain = "" if row.get("domain") is None else _text(str(row["domain"]), "domain")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        return Triple(*_read_texts(row, prompt, chosen, rejected), domain)
    prompt = _messages(prompt, given[0], "user") if given else []
    return Triple(*_read_messages(row, prompt, chosen, rejected), domain)


def _read_texts(row: dict, prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and responses of a row of plain text."""
    if prompt is None:
        raise _no_prompt(row)
    if _has_content(row.get("system")):
        raise Unusable("system beside a prompt of plain text: make messages of them")
    prompt, chosen, rejected = _text(prompt, "prompt"), _text(chosen, "chosen"), _text(rejected, "rejected")
    if not prompt.strip():
        raise Unusable("prompt: empty")
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        # "Hello" and "Hello! I am ..." is a greeting; a prompt that is repeated is set apart from the response.
        if not prompt[-1].isspace() and prompt[-1] not in ":：" and not (chosen[:1] + rejected[:1]).isspace():
            raise Unusable("chosen and rejected begin with the prompt: repeated, or part of the responses?")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("response: empty")
    return prompt, chosen, rejected


def _read_messages(row: dict, prompt: list[Message], chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """Prompt and responses of a row of messages; a prompt or a response that is text is a turn of its own."""
    chosen, rejected = _messages(chosen, "chosen", "assistant"), _messages(rejected, "rejected", "assistant")
    # Where one side only continues the other, nothing is shared: neither is a response.
    n_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    prompt = _join(row, prompt, chosen[:n_shared])
    chosen, rejected = chosen[n_shared:], rejected[n_shared:]
    if not prompt:
        raise _no_prompt(row)
    if any(not turn["content"].strip() for turn in prompt if turn["role"] != "system"):
        raise Unusable("prompt: empty")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt: does not end with a user turn")
    if [turn["role"] for turn in chosen] != ["assistant"] or [turn["role"] for turn in rejected] != ["assistant"]:
        raise Unusable("response: not one assistant turn")
    chosen, rejected = chosen[0]["content"], rejected[0]["content"]
    if not chosen.strip() or not rejected.strip():
        raise Unusable("response: empty")
    return prompt, chosen, rejected


def _join(row: dict, prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The system turn, the prompt, and the turns with which both sides begin, none of them twice."""
    systems = [_text(row["system"], "system")] if _has_content(row.get("system")) else []
    for turns in (prompt, shared):
        if turns and turns[0]["role"] == "system":
            systems.append(turns.pop(0)["content"])
    if len(set(systems)) > 1:
        raise Unusable("system: two that differ")
    # The longest end of the prompt with which the sides begin: mostly all of it, or nothing.
    n_repeated = next(n for n in range(len(prompt), -1, -1) if prompt[len(prompt) - n :] == shared[:n])
    if n_repeated == 0 and prompt and shared and prompt[-1]["role"] == shared[0]["role"]:
        raise Unusable("prompt: chosen and rejected begin with another one")
    system = [{"role": "system", "content": text} for text in systems[:1]]
    return system + prompt + shared[n_repeated:]


def _no_prompt(row: dict) -> Unusable:
    return Unusable(f"no prompt; columns: {', '.join(sorted(name for name in row if _has_content(row[name])))}"[:200])


def _refuse_unsupported(fields: dict) -> None:
    for name in NOT_SUPPORTED:
        if _has_content(fields.get(name)):
            raise Unusable(f"{name}: not supported")


def _has_content(value: Any) -> bool:
    """Parquet gives each row all columns, and each object all fields: most are empty."""
    if isinstance(value, dict | list):
        return any(map(_has_content, value.values() if isinstance(value, dict) else value))
    return value not in (None, "", "[]", "{}")


def _messages(value: Any, name: str, role_of_text: str) -> list[Message]:
    """Turns of any of the usual spellings; a text alone is a turn of `role_of_text`."""
    if isinstance(value, str):
        value = {"role": role_of_text, "content": value}
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"{name}: wrong type")
    messages = []
    for turn in turns:
        _refuse_unsupported(turn)
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if role is None or content is None:
            raise Unusable(f"{name}: a turn without role or text")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Unusable(f"{name}: unknown role {_text(str(role), name)[:40]}")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise Unusable(f"{name}: parts that are not text")
            content = "".join(_text(part.get("text"), name) for part in content)
        messages.append({"role": ROLES[role.lower()], "content": _text(content, name)})
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name}: wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, or bytes that were no UTF-8
        raise Unusable(f"{name}: not valid Unicode") from None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Triples to tokens


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
        self.end_texts = [tokenizer.decode([token]) for token in {self.end_of_turn_id, self.plain_end_id}]
        added = tokenizer.added_tokens_decoder.values()
        self.specials = re.compile("|".join(re.escape(token.content) for token in added if token.special) or "(?!)")
        begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.bos_ids = [tokenizer.bos_token_id] if begins_with_bos else []
        # Tokenizers of Llama 2's kind write a space in front of every text, but none after a line break. For these, a
        # line break is put in front of each response, and its tokens are taken off again.
        writes_space = self._tokenize(["\n天"]) != [sum(self._tokenize(["\n", "天"]), [])]
        self.front = "\n" if writes_space else ""
        self.front_ids = self._tokenize([self.front])[0]

    def encode(self, triples: Sequence[Triple]) -> list[dict]:
        """Of each triple its tokens, whether they were cut, and as `cause` why there are none, if so.

        A pair of over `max_length` tokens is cut by one rule: the prompt keeps its last
        max(max_length / 2, max_length - longer response) tokens, each response its first tokens in the room that is
        left. A response that was cut has no end-of-turn.
        """
        rendered = [attempt(self._render, triple) for triple in triples]
        texts = list({text for row, _ in rendered if row for text in row})
        ids = dict(zip(texts, self._tokenize(texts), strict=True))  # all in one call, which is fast
        encoded = []
        for triple, (row, cause) in zip(triples, rendered, strict=True):
            pair = None
            if row:
                pair, cause = attempt(self._cut, triple.is_plain_text, *(ids[text] for text in row))
            pair = pair or {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "truncated": False}
            encoded.append(pair | {"cause": cause})
        return encoded

    def encode_rows(self, batch: dict[str, list]) -> dict[str, list]:
        """Columns of rows that `read_triple` can read."""
        encoded = self.encode([read_triple(unpack(row)) for row in rows_of(batch)])
        columns = {name: [np.asarray(row[name], dtype=np.int32) for row in encoded] for name in IDS}
        columns |= {name: [row[name] for row in encoded] for name in ("truncated", "cause")}
        pairs = zip(*(columns[name] for name in IDS), strict=True)
        return columns | {"digest": [hash64(b"|".join(map(bytes, pair))) for pair in pairs]}

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _render(self, triple: Triple) -> tuple[str, str, str]:
        """The texts of the prompt and of the two responses, as the chat template writes them."""
        responses = [self._without_end(response) for response in (triple.chosen, triple.rejected)]
        *given, _, _ = triple.texts()
        if any(self.specials.search(text) for text in (*given, *responses)):
            raise Unusable("contains a special token (text to which a template was applied already?)")
        if not all(response.strip() for response in responses):
            raise Unusable("response: empty")
        if responses[0] == responses[1]:
            raise Unusable("chosen equals rejected")
        if triple.is_plain_text:
            prompt, rendered = triple.prompt, responses
        else:
            prompt, rendered = self._apply_template(triple.prompt, responses)
        return prompt, self.front + rendered[0], self.front + rendered[1]

    def _without_end(self, response: str) -> str:
        """The response without the text of the model's own end-of-turn or eos, which encoding adds."""
        for end in self.end_texts:
            if response.rstrip().endswith(end):
                return response.rstrip().removesuffix(end)
        return response

    def _apply_template(self, prompt: list[Message], responses: list[str]) -> tuple[str, list[str]]:
        if not self.tokenizer.chat_template:
            raise Unusable("the tokenizer has no chat template, which messages need")
        try:
            start = apply_template(self.tokenizer, prompt, add_generation_prompt=True)
            answers = [{"role": "assistant", "content": response} for response in responses]
            wholes = [apply_template(self.tokenizer, [*prompt, answer]) for answer in answers]
        except UserError as error:
            raise Unusable(str(error)) from None
        if not all(whole.startswith(start) for whole in wholes):
            raise Unusable("the chat template changes the prompt once it is answered")
        rendered = [whole[len(start) :] for whole in wholes]
        # White space around a text is the template's to trim. An earlier answer may lose its thoughts, as it does when
        # the model is used.
        if any(turn["content"].strip() not in start for turn in prompt if turn["role"] != "assistant"):
            raise Unusable("the chat template removes part of the prompt")
        if any(response.strip() not in text for response, text in zip(responses, rendered, strict=True)):
            raise Unusable("the chat template removes part of the response")
        if rendered[0] == rendered[1]:
            raise Unusable("the chat template makes chosen and rejected equal")
        return start, rendered

    def _cut(self, is_plain_text: bool, prompt_ids: list[int], *responses: list[int]) -> dict:
        if any(ids[: len(self.front_ids)] != self.front_ids for ids in responses):
            raise Unusable("the tokenizer merges the response with the line break before it")
        if is_plain_text:
            prompt_ids = self.bos_ids + prompt_ids
        end = self.plain_end_id if is_plain_text else self.end_of_turn_id
        ended = []
        for ids in responses:
            ids = ids[len(self.front_ids) :]
            if end in ids:  # what a template writes after its end-of-turn ("\n") belongs to the next turn
                ids = ids[: ids.index(end)]
            ended.append([*ids, end])
        longest = max(map(len, ended))
        n_prompt = min(len(prompt_ids), max(self.max_length // 2, self.max_length - longest))
        chosen_ids, rejected_ids = (ids[: self.max_length - n_prompt] for ids in ended)
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
        raise UserError(f"the chat template says: {first_line(error)}") from None


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an assistant's turn, `<|im_end|>` for Qwen2.5.

    It need not be the tokenizer's eos (Qwen2.5's base model: `<|endoftext|>`). Without a template, or with one that
    ends turns with plain text, it is the eos.

    Raises UserError if there is neither, or if the template can't write an answer.
    """
    if tokenizer.chat_template:
        answer = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        _, found, after = apply_template(tokenizer, turns).rpartition(answer)
        if not found:
            raise UserError("the chat template writes no answer that is a text: is it for images?")
        added = tokenizer.added_tokens_decoder
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in added and added[token].special:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template with an end-of-turn token nor an eos token")
    return tokenizer.eos_token_id


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, triples: Iterable[Triple]) -> None:
    """Raises UserError if texts don't come back from their tokens, as when transformers loads it as another kind.

    White space may change its kind, and a rare character may be missing: a quarter of the texts may differ.
    """
    texts = [text[:2000] for triple in triples for text in triple.texts()]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    returned = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]
    changed = [
        (text, back)
        for text, back in zip(texts, returned, strict=True)
        if unicodedata.normalize("NFKC", text).split() != unicodedata.normalize("NFKC", back).split()
    ]
    if len(changed) > len(texts) / 4:
        text, back = min(changed, key=lambda one: len(one[0]))
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) doesn't give texts back: {text[:60]!r} becomes {back[:60]!r}: "
            "is it the model's own and complete, and does this version of transformers load it as it should?"
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
        columns = self.tokens[[int(i) for i in indices]]
        return [
            {"index": int(i), **dict(zip(IDS, ids, strict=True))}
            for i, *ids in zip(indices, *(columns[name] for name in IDS), strict=True)
        ]


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
    columns_not_read: list[str]

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
        if self.columns_not_read:
            text += f"; columns not read: {_listed(self.columns_not_read)}"
        return text + (f"; read: {self.source}" if self.source else "")


# What becomes of a row: "" to train on it, one of these, or the cause why it can't train.
HELD_OUT = "held out"
LEFT_OUT = SAME_PROMPT, OTHER_DOMAIN, OVER_TRAIN, OVER_EVAL = (
    "their prompt is held out", "not in --domains", "more than --max_train_samples", "more than --max_eval_samples",
)  # fmt: skip


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
    are numbered after `rows`.

    Raises UserError for unknown domains, if most rows can't train, if no row is left to train on (unless
    `max_train_samples` is 0), or if the tokenizer doesn't give texts back.
    """
    source, first_given = rows.info.description, None
    if held_out_rows is not None:
        first_given = len(rows)
        source += f"; held out: {held_out_rows.info.description}"
        rows = datasets.concatenate_datasets([rows, held_out_rows])
    if not len(rows):
        raise UserError("the data set has no rows")

    # The first pass reads every row and keeps a hash of its prompt.
    scanned = map_rows(rows, scan_rows, "Reading rows")
    keys, row_domains, is_plain_text, fates = read_columns(scanned, "key", "domain", "is_plain_text", "cause")
    refuse_if_most_are_dropped(fates, np.arange(len(rows)))
    first_rows = [unpack(rows[int(number)]) for number in np.flatnonzero(fates == "")[:20]]
    check_tokenizer(tokenizer, map(read_triple, first_rows))
    if domains is not None:
        there = set(row_domains[fates == ""])
        if unknown := set(domains) - there:
            raise UserError(f"--domains: no row has {', '.join(sorted(unknown))}; there is {', '.join(sorted(there))}")
        fates[(fates == "") & ~np.isin(row_domains, list(domains))] = OTHER_DOMAIN

    train, held_out = split_by_prompt(keys, fates, first_given, max_train_samples, max_eval_samples)

    # The second pass tokenizes the rows that are used.
    used, encoder = np.concatenate([train, held_out]), Encoder(tokenizer, max_length)
    pairs, n_truncated = [], 0
    if len(used):
        tokens = map_rows(rows.select(used), encoder.encode_rows, "Tokenizing")
        truncated, causes, digests = read_columns(tokens, "truncated", "cause", "digest")
        n_truncated = int(truncated.sum())
        fates[used[causes != ""]] = causes[causes != ""]
        refuse_if_most_are_dropped(fates, used)
        kept = np.flatnonzero(causes == "")
        for places in (kept[kept < len(train)], kept[kept >= len(train)]):
            ids = tokens.select_columns(list(IDS)).select(places).with_format("numpy")
            fingerprint = _digest(digests[places].tobytes())
            numbers = used[places]
            pairs.append(Pairs(ids, keys[numbers], numbers, row_domains[numbers], fingerprint))
    if not pairs or (not len(pairs[0]) and max_train_samples != 0):
        why = "; ".join(f"{count:,} x {fate}" for fate, count in Counter(fates.tolist()).most_common())
        raise UserError(f"no row is left to train on: {why}")
    assert not np.intersect1d(pairs[0].keys, pairs[1].keys).size, "a prompt is on both sides of the split"

    ends = {encoder.plain_end_id if plain else encoder.end_of_turn_id for plain in is_plain_text[used].tolist()}
    return PreparedData(
        *pairs,
        source=source,
        n_rows=len(rows),
        left_out={reason: n for reason in LEFT_OUT if (n := int(np.count_nonzero(fates == reason)))},
        dropped=count_dropped(fates),
        n_truncated=n_truncated,
        n_plain_text=sum(int(is_plain_text[side.rows].sum()) for side in pairs),
        end_ids=sorted(ends),
        columns_not_read=sorted({name for row in first_rows for name in row if _has_content(row[name])} - {*COLUMNS}),
    )


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
        held_out = good[(prompt_of_row < len(prompts) // 10) & (number_in_prompt < 2)][:max_eval_samples]
        fates[good[np.isin(keys[good], keys[held_out])]] = SAME_PROMPT
    else:
        given = good[good >= first_given]
        held_out = given[:max_eval_samples]
        fates[good[np.isin(keys[good], keys[given])]] = SAME_PROMPT
        fates[given] = OVER_EVAL
    fates[held_out] = HELD_OUT
    train = good[fates[good] == ""]
    fates[train[len(train) if max_train_samples is None else max_train_samples :]] = OVER_TRAIN
    return train[:max_train_samples], held_out


def count_dropped(fates: np.ndarray) -> dict[str, tuple[int, int]]:
    """cause -> (rows, the first one's number), the most frequent first."""
    counts = Counter(fates.tolist())
    for fate in ("", HELD_OUT, *LEFT_OUT):
        counts.pop(fate, None)
    return {cause: (count, int(np.argmax(fates == cause))) for cause, count in counts.most_common()}


def refuse_if_most_are_dropped(fates: np.ndarray, rows: np.ndarray) -> None:
    """Raises UserError if more than half of `rows` can't train: then it is the whole set that is misunderstood."""
    n_good = np.count_nonzero((fates[rows] == "") | (fates[rows] == HELD_OUT))
    if 2 * n_good < len(rows):
        causes = (f"{count:,} x {cause} (first: row {first})" for cause, (count, first) in count_dropped(fates).items())
        raise UserError(
            f"{len(rows) - n_good:,} of {len(rows):,} rows can't be used: {'; '.join(causes)}. What is read: {FORMS}"
        )


def map_rows(table: Dataset, function: Callable, title: str) -> Dataset:
    """All rows through `function`, on all cores.

    datasets keeps the result. Its key is made of the rows, of the function with all that it holds, a tokenizer for
    instance, and of this file's text.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    code = Path(__file__).read_text(encoding="utf-8")
    return table.map(
        function,
        batched=True,
        remove_columns=table.column_names,
        new_fingerprint=Hasher.hash((table._fingerprint, code, function)),
        num_proc=min(n_cores, len(table) // 4000) or None,
        desc=title,
    )


def read_columns(table: Dataset, *names: str) -> list[np.ndarray]:
    """Whole columns at once: row by row, datasets takes minutes for a million."""
    columns = table.select_columns(list(names)).with_format("arrow")[:]
    return [columns[name].to_numpy().copy() for name in names]


def rows_of(batch: dict[str, list]) -> Iterator[dict]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def unpack(row: dict) -> Any:
    """A row as `read_triple` takes it: those of json files are not parsed yet."""
    if row.get(JSON) is None:
        return row
    try:
        return json.loads(row[JSON].decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise Unusable("not valid JSON") from None


def scan_rows(batch: dict[str, list]) -> dict[str, list]:
    """Of each row: a hash of its prompt, its domain, whether it is plain text, and why it can't be used, if so."""
    columns: dict[str, list] = {"key": [], "domain": [], "is_plain_text": [], "cause": []}
    for row in rows_of(batch):
        triple, cause = attempt(lambda row: read_triple(unpack(row)), row)
        columns["key"].append(hash64(json.dumps(triple.prompt).encode()) if triple else 0)
        columns["domain"].append(triple.domain if triple else "")
        columns["is_plain_text"].append(triple is not None and triple.is_plain_text)
        columns["cause"].append(cause)
    return columns


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Pairs to steps and micro-batches


def epoch_order(keys: np.ndarray, seed: int, epoch: int, group_by_prompt: bool = True) -> np.ndarray:
    """The order of the pairs in one epoch, [n] indices: prompts shuffled, a prompt's pairs together.

    Without `group_by_prompt` a prompt's pairs are spread over the epoch; then hardly anything is shared within a step.
    A function of its arguments alone, so that a resumed run and every process see the same order.
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


@dataclass
class Tree:
    """A prompt, the distinct responses to it that a micro-batch needs, and its pairs: (index, chosen, rejected)."""

    prompt: np.ndarray
    share: bool = True
    responses: dict[bytes, int] = field(default_factory=dict)  # token ids -> the response's number in this tree
    pairs: list[tuple[int, int, int]] = field(default_factory=list)
    n_tokens: int = 0

    def n_new(self, pair: dict) -> int:
        """By how many tokens the tree grows when this pair is added."""
        new = {ids for ids in pair["responses"] if ids not in self.responses}
        n_prompts = (not self.pairs) if self.share else 2
        return n_prompts * len(self.prompt) + sum(len(ids) // 8 for ids in new)

    def add(self, pair: dict) -> None:
        self.n_tokens += self.n_new(pair)
        numbers = (self.responses.setdefault(ids, len(self.responses)) for ids in pair["responses"])
        self.pairs.append((pair["index"], *numbers))

    def branches(self) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """The prompt and what follows it; where nothing is shared, the prompt once more for each response."""
        responses = [np.frombuffer(ids, dtype=np.int64) for ids in self.responses]
        yield from [(self.prompt, responses)] if self.share else [(self.prompt, [one]) for one in responses]


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

    T tokens, N response tokens, M distinct responses, P pairs:

    | tensor | shape | meaning |
    |---|---|---|
    | input_ids | [1, T] | a prompt and its responses, then the next tree; nothing is padded |
    | position_ids | [1, T] | restart after the prompt for each response |
    | predictor_index | [N] | position of the hidden state that predicts each response token |
    | target_ids | [N] | the response tokens |
    | response_index | [N] | which of the M responses each token belongs to |
    | response_lengths | [M] | tokens of each response |
    | chosen_index, rejected_index | [P] | each pair's two responses |
    | pair_index | [P] | the pairs' numbers in their `Pairs` |

    `segments` has, for each prompt and each response, its (start, end) in the row and those of its prompt, a prompt's
    own being (start, start).
    """

    micro_batch_tokens: int
    share: bool = True  # False encodes every response of every pair anew, prompt included, as other trainers do

    def __call__(self, pairs: Sequence[dict], n_processes: int = 1) -> list[MicroBatch]:
        """The micro-batches of these pairs, the longest first; their number is a multiple of `n_processes`.

        Raises UserError if one pair alone is longer than `micro_batch_tokens`.
        """
        groups = self._fill_groups(self._trees(pairs), n_processes)
        batches = [self._micro_batch(trees) for trees in groups if trees]
        return batches + [batches[-1].filler()] * (len(groups) - len(batches))

    def _trees(self, pairs: Sequence[dict]) -> list[Tree]:
        """One tree for each prompt; where it doesn't fit into a micro-batch several, each with the prompt once more."""
        by_prompt: dict[bytes | int, list[dict]] = {}
        for pair in pairs:
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            prompt, *responses = (np.asarray(pair[name], dtype=np.int64) for name in names)
            taken = {"index": pair["index"], "prompt": prompt, "responses": [ids.tobytes() for ids in responses]}
            by_prompt.setdefault(prompt.tobytes() if self.share else pair["index"], []).append(taken)
        trees = []
        for left in by_prompt.values():
            while left:
                tree = Tree(left[0]["prompt"], self.share)
                while left:
                    # The pair that adds the fewest tokens: where a tree must be cut, its parts have little in common.
                    best = min(left, key=tree.n_new)
                    if tree.n_tokens + tree.n_new(best) > self.micro_batch_tokens:
                        break
                    tree.add(best)
                    left.remove(best)
                if not tree.pairs:
                    raise UserError(
                        f"--micro_batch_tokens {self.micro_batch_tokens} is too small for a pair of "
                        f"{tree.n_new(best)} tokens"
                    )
                trees.append(tree)
        return trees

    def _fill_groups(self, trees: list[Tree], n_processes: int) -> list[list[Tree]]:
        """Trees into the fewest groups, one a micro-batch, that hold them, evenly filled: the longest tree first, each
        into the group with the fewest tokens so far."""
        n_tokens = sum(tree.n_tokens for tree in trees)
        n_groups = -(-n_tokens // (self.micro_batch_tokens * n_processes)) * n_processes
        while True:
            groups, totals = [[] for _ in range(n_groups)], [0] * n_groups
            for tree in sorted(trees, key=lambda tree: -tree.n_tokens):
                least = totals.index(min(totals))
                groups[least].append(tree)
                totals[least] += tree.n_tokens
            if max(totals) <= self.micro_batch_tokens:
                return [groups[i] for i in sorted(range(n_groups), key=lambda i: -totals[i])]
            n_groups += n_processes

    def _micro_batch(self, trees: list[Tree]) -> MicroBatch:
        tokens, positions, predictors, targets, pairs, segments = [], [], [], [], [], []
        at = 0  # tokens in the row so far
        for tree in trees:
            first = len(targets)  # number of the tree's first response in the micro-batch
            pairs += [(index, first + chosen, first + rejected) for index, chosen, rejected in tree.pairs]
            for prompt, responses in tree.branches():
                start, end = at, at + len(prompt)
                tokens.append(prompt)
                positions.append(np.arange(len(prompt)))
                segments.append((start, end, start, start))
                at = end
                for ids in responses:
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
            "input_ids": np.concatenate(tokens)[None],
            "position_ids": np.concatenate(positions)[None],
            "predictor_index": np.concatenate(predictors),
            "target_ids": np.concatenate(targets),
            "response_index": np.repeat(np.arange(len(lengths)), lengths),
            "response_lengths": lengths,
            "chosen_index": chosen_index,
            "rejected_index": rejected_index,
            "pair_index": pair_index,
        }
        return MicroBatch({name: torch.from_numpy(array) for name, array in arrays.items()}, segments)
