"""Preference data: from files and hub names to micro-batches of token trees.

In the order that data flows: `load_rows` reads a hub name, a folder or a file; `read_triple` maps one row, by its
columns, to prompt, chosen and rejected; `Encoder` tokenizes; `prepare` does that for a whole set, counts what it drops
and splits by prompt; `StepBatches` has the pairs of each step; `TreeCollator` cuts them into micro-batches, in which
each prompt stands once and each distinct response once.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMS = "conversations + chosen + rejected (COIG-P), prompt + chosen + rejected or chosen + rejected alone (TRL)"
FILES = (".parquet", ".json", ".jsonl")
Message = dict[str, str]


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


class Unusable(Exception):
    """A row that can't train. The message is the cause under which it is counted."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_rows(name: str, split: str = "train") -> Dataset:
    """The raw rows of a hub data set, a local folder (as `git clone` leaves it) or a .parquet, .json or .jsonl file.

    Rows of json and jsonl come as one binary column `json`, unparsed: Arrow would refuse a whole file for one row whose
    types differ, and a single bad row must never cost a run.
    """
    path = Path(name).expanduser()
    local = path.exists()
    if not local and (name.startswith((".", "/", "~")) or path.suffix in FILES or name.count("/") > 1):
        raise UserError(f"--dataset_name {name}: there is no such file or folder")
    if path.is_file() and path.suffix not in FILES:
        raise UserError(f"--dataset_name {name}: a file must end in .parquet, .json or .jsonl")
    refuse_lfs_pointers([path] if path.is_file() else [file for kind in FILES for file in path.rglob(f"*{kind}")])
    try:
        if path.is_file():
            files = {"train": [str(path)]}
            split = "train"
        elif path.is_dir():
            files = datasets.load_dataset_builder(str(path)).config.data_files
        else:
            return datasets.load_dataset(name, split=split)
        if split in files and all(Path(file).suffix in (".json", ".jsonl") for file in files[split]):
            return _json_rows([Path(file) for file in files[split]])
        return datasets.load_dataset("parquet", data_files=files, split=split)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types here; each means that this name can't be read
        raise UserError(
            f"--dataset_name {name}, split {split}, can't be loaded ({first_line(error)}): give a file or a folder of "
            ".parquet, .json or .jsonl files, or a hub name (HF_ENDPOINT sets a mirror of the hub), or try `--demo`"
        ) from None


def first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def refuse_lfs_pointers(files: Iterable[Path]) -> None:
    """A clone made without git-lfs has three lines of text in place of each large file.

    Raises UserError for the first file that is such a pointer.
    """
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            if opened.read(19) == b"version https://git":
                raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in its clone")


def _json_rows(paths: list[Path]) -> Dataset:
    # Size and time of change are part of the arguments because the arguments are the key of datasets' cache.
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    features = datasets.Features({"json": datasets.Value("large_binary")})
    try:
        return Dataset.from_generator(_iterate_json, features=features, gen_kwargs={"stamps": [stamps]})
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    except (ValueError, StopIteration):  # from_generator's answer to a generator that yields nothing
        raise UserError(f"{', '.join(map(str, paths))}: no rows") from None


def _iterate_json(stamps: list[list[tuple[str, int, int]]]) -> Iterator[dict[str, bytes]]:
    for path, _, _ in stamps[0]:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if start.startswith(b"["):
                try:  # surrogateescape: a row with broken bytes is dropped by itself, not the file
                    rows = json.loads(file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
                for row in rows:
                    yield {"json": json.dumps(row).encode()}
            else:
                for line in file:
                    if line.strip():
                        yield {"json": line.removeprefix(b"\xef\xbb\xbf")}


def read_json_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        raise Unusable("not valid JSON") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rows to triples


@dataclass
class Triple:
    """`prompt` is a list of messages, for the chat template, or plain text, taken as it is."""

    prompt: list[Message] | str
    chosen: str
    rejected: str
    domain: str


def read_triple(row: Any) -> Triple:
    """Map a row by its columns to prompt, chosen and rejected. All turns are kept, a system turn too.

    Raises Unusable, with the cause, if the row can't train.
    """
    if not isinstance(row, dict):
        raise Unusable("row is not an object")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise Unusable(f"{name}: missing")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if row.get("conversations") is not None:  # COIG-P, ShareGPT
        prompt = _messages(row["conversations"], "conversations")
        if isinstance(row.get("system"), str) and row["system"] and prompt[:1] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": _text(row["system"], "system")}, *prompt]
        chosen, rejected = (_as_turn(side) for side in (chosen, rejected))
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    read = _text if isinstance(chosen, str) and isinstance(rejected, str) else _messages
    chosen, rejected = read(chosen, "chosen"), read(rejected, "rejected")
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    is_implicit = prompt is None or read is _messages and common and row.get("conversations") is None
    if is_implicit:  # TRL's form: the prompt is what both begin with, whatever stands beside it
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    elif read is _text:
        prompt = _text(prompt, "prompt")
    else:
        prompt = _messages({"role": "user", "content": prompt} if isinstance(prompt, str) else prompt, "prompt")
    if read is _messages:
        if any(not turn["content"].strip() for turn in prompt if turn["role"] != "system"):
            raise Unusable("prompt: empty")
        if prompt and prompt[-1]["role"] != "user":
            raise Unusable("prompt: does not end with a user turn")
        if [turn["role"] for turn in (*chosen, *rejected)] != ["assistant", "assistant"] or len(chosen) != 1:
            raise Unusable("response: not one assistant turn")
        chosen, rejected = chosen[0]["content"], rejected[0]["content"]
    if not prompt:
        raise Unusable("prompt: empty")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("response: empty")
    domain = _text(row["domain"], "domain") if isinstance(row.get("domain"), str) else ""
    return Triple(prompt, chosen, rejected, domain)


def _as_turn(value: Any) -> Any:
    return {"from": "gpt", "value": value} if isinstance(value, str) else value


def _messages(value: Any, field: str) -> list[Message]:
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"{field}: wrong type")
    messages = []
    for turn in turns:
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if role is None or content is None:
            raise Unusable(f"{field}: a turn without role or text")
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable(f"{field}: unknown role")
        messages.append({"role": ROLES[role], "content": _text(content, field)})
    return messages


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{field}: wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, or bytes that were no UTF-8
        raise Unusable(f"{field}: not valid Unicode") from None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Triples to tokens


class Encoder:
    """Tokenizes triples: `prompt_ids`, `chosen_ids` and `rejected_ids`, each response with exactly one end-of-turn.

    Conversations go through the tokenizer's chat template; plain text is taken as it is and ends with the tokenizer's
    eos. A response is what the template writes behind the prompt, tokenized apart from it, as it is when the model
    answers: the prompt is there first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end_of_turn_id = end_of_turn_id(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.specials = re.compile("|".join(re.escape(token.content) for token in added if token.special) or "(?!)")
        # Tokenizers of Llama 2's kind write a space in front of every text. Behind a line break there is none.
        self.front = "" if self._ids(["\n天"])[0] == sum(self._ids(["\n", "天"]), []) else "\n"
        self.front_ids = self._ids([self.front])[0]

    def encode(self, triples: Sequence[Triple | Unusable]) -> list[dict | Unusable]:
        """Tokens of each triple, or why there are none; an `Unusable` passes through.

        A pair of over `max_length` tokens is cut by one rule: the prompt keeps its last
        max(max_length / 2, max_length - longer response) tokens, each response its first tokens in the room that is
        left. A response that was cut has no end-of-turn.
        """
        rendered = [self._render(triple) for triple in triples]
        texts = {text for row in rendered if not isinstance(row, Unusable) for text in row}
        ids = dict(zip(texts, self._ids(list(texts)), strict=True))  # all in one call, which is fast
        return [
            row if isinstance(row, Unusable) else self._cut(triple, *(ids[text] for text in row))
            for row, triple in zip(rendered, triples, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _render(self, triple: Triple | Unusable) -> tuple[str, str, str] | Unusable:
        """The texts of the prompt and of the two responses, as the chat template writes them."""
        if isinstance(triple, Unusable):
            return triple
        plain = isinstance(triple.prompt, str)
        given = [triple.prompt] if plain else [turn["content"] for turn in triple.prompt]
        if any(self.specials.search(text) for text in (*given, triple.chosen, triple.rejected)):
            return Unusable("contains a special token")
        if plain:
            return triple.prompt, self.front + triple.chosen, self.front + triple.rejected
        if not self.tokenizer.chat_template:
            return Unusable("the tokenizer has no chat template, which messages need")
        try:
            prompt = self.tokenizer.apply_chat_template(triple.prompt, tokenize=False, add_generation_prompt=True)
            answered = [
                self.tokenizer.apply_chat_template(
                    [*triple.prompt, {"role": "assistant", "content": response}], tokenize=False
                )
                for response in (triple.chosen, triple.rejected)
            ]
        except TemplateError:
            return Unusable("refused by the chat template")
        if not all(text.startswith(prompt) for text in answered):
            return Unusable("the chat template changes the prompt once it is answered")
        return prompt, *(self.front + text[len(prompt) :] for text in answered)

    def _cut(self, triple: Triple, prompt_ids: list[int], *responses: list[int]) -> dict | Unusable:
        end, eos, n_front = self.end_of_turn_id, self.tokenizer.eos_token_id, len(self.front_ids)
        if isinstance(triple.prompt, str) and eos is not None:
            end = eos
        if any(ids[:n_front] != self.front_ids for ids in responses):
            return Unusable("the tokenizer merges the response with the line break before it")
        # What a template writes behind its end-of-turn ("\n") belongs to the next turn.
        responses = [ids[n_front : ids.index(end) if end in ids else None] + [end] for ids in responses]
        longest = max(map(len, responses))
        n_prompt = min(len(prompt_ids), max(self.max_length // 2, self.max_length - longest))
        chosen_ids, rejected_ids = (ids[: self.max_length - n_prompt] for ids in responses)
        if chosen_ids == rejected_ids:
            return Unusable("chosen equals rejected after truncation")
        return {
            "prompt_ids": prompt_ids[len(prompt_ids) - n_prompt :],
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "truncated": n_prompt < len(prompt_ids) or longest > self.max_length - n_prompt,
        }


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an assistant's turn, `<|im_end|>` for Qwen2.5.

    It need not be the tokenizer's eos (Qwen2.5's base model: `<|endoftext|>`). Without a template, or with one that
    ends turns with plain text, it is the eos.

    Raises UserError if there is neither.
    """
    if tokenizer.chat_template:
        answer = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(rendered[rendered.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        special = [token for token in after if token in added and added[token].special]
        if special:
            return special[0]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template with an end-of-turn token nor an eos token")
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set


@dataclass
class Pairs:
    """Tokenized pairs. `rows` are their row numbers in the source; pairs of the same prompt have the same key."""

    tokens: Dataset  # columns prompt_ids, chosen_ids, rejected_ids
    keys: np.ndarray  # [n] int64
    rows: np.ndarray  # [n] int64
    domains: np.ndarray  # [n] str
    fingerprint: str  # of the token ids

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, indices: Sequence[int]) -> list[dict]:
        """The pairs at these indices, as `TreeCollator` takes them."""
        columns = self.tokens[[int(i) for i in indices]]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [
            {"index": int(i), **dict(zip(names, ids, strict=True))}
            for i, *ids in zip(indices, *(columns[name] for name in names), strict=True)
        ]


@dataclass
class PreparedData:
    train: Pairs
    held_out: Pairs
    n_rows: int  # in the source
    dropped: dict[str, tuple[int, int]]  # cause -> (rows, the first one's number)
    n_truncated: int

    def summary(self) -> str:
        """What was read, kept and dropped."""
        n_prompts, n_held_out = (len(np.unique(pairs.keys)) for pairs in (self.train, self.held_out))
        text = f"{self.n_rows:,} rows: {len(self.train):,} pairs of {n_prompts:,} prompts to train on, "
        text += f"{len(self.held_out):,} held out ({n_held_out:,} other prompts)"
        if self.n_truncated:
            text += f"; {self.n_truncated:,} pairs cut to max_length"
        for cause, (count, first) in self.dropped.items():
            text += f"; dropped {count:,} rows: {cause} (first: row {first})"
        return text


def prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    max_train_samples: int | None = None,
    max_eval_samples: int = 512,
    domains: Sequence[str] | None = None,
) -> PreparedData:
    """Tokenize a data set and split it by prompt.

    Prompts are taken in the order of their hashes: the first ones are held out, the next ones are trained on, up to
    `max_eval_samples` and `max_train_samples` pairs. So a subset is a fair sample of all domains, the held-out pairs
    are the same for any subset and seed, and no prompt is on both sides. At most a tenth of the prompts is held out,
    with two pairs of each, so that a few hundred pairs are many prompts; their other pairs are used nowhere.

    Raises UserError for unknown columns or domains, or if no row is left.
    """
    scanned = _cached_map(rows, _scan_rows, "Reading rows")
    keys, causes, row_domains = (_column(scanned, name) for name in ("key", "cause", "domain"))
    good = np.flatnonzero(causes == "")
    if domains is not None:
        if unknown := set(domains) - set(row_domains):
            listed = ", ".join(sorted(set(row_domains)))
            raise UserError(f"--domains: no row has {', '.join(sorted(unknown))}; there is {listed}")
        good = good[np.isin(row_domains[good].astype(str), list(domains))]
    good = good[np.argsort(keys[good], kind="stable")]  # by prompt, in the order of their hashes; then as in the source

    held_out, trained = _split(keys[good], max_eval_samples, max_train_samples)
    if not len(trained):
        raise _no_row_left(causes)
    selected = np.concatenate([good[trained], good[held_out]])
    key = _tokenizer_state(tokenizer), _digest(selected.tobytes()), max_length
    encode = partial(_encode_rows, Encoder(tokenizer, max_length))
    tokens = _cached_map(rows.select(selected), encode, "Tokenizing", key)
    causes[selected] = _column(tokens, "cause")

    sides, digests = [], _column(tokens, "digest")
    for positions in np.split(np.arange(len(selected)), [len(trained)]):
        positions = positions[causes[selected[positions]] == ""]
        ids = tokens.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).select(positions).with_format("numpy")
        numbers = selected[positions]
        # Of the contents, not of a path or a date: a resumed run may find its data in another place.
        fingerprint = _digest(digests[positions].tobytes())
        sides.append(Pairs(ids, keys[numbers], numbers, row_domains[numbers], fingerprint))
    if not len(sides[0]):
        raise _no_row_left(causes)
    assert not np.intersect1d(sides[0].keys, sides[1].keys).size, "a prompt is on both sides of the split"
    return PreparedData(*sides, len(rows), _count_causes(causes), int(_column(tokens, "truncated").sum()))


def _split(keys: np.ndarray, max_eval_samples: int, max_train_samples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions to hold out and to train on, of rows whose prompts' keys are sorted."""
    prompts, first, group, n_pairs = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    number_in_prompt = np.arange(len(keys)) - np.repeat(first, n_pairs)
    held_out = np.flatnonzero((number_in_prompt < 2) & (group < len(prompts) // 10))[:max_eval_samples]
    n_prompts = group[held_out[-1]] + 1 if len(held_out) else 0
    return held_out, np.flatnonzero(group >= n_prompts)[:max_train_samples]


def _count_causes(causes: np.ndarray) -> dict[str, tuple[int, int]]:
    """cause -> (rows, the first one's number), the most frequent first."""
    counts = Counter(causes[causes != ""]).most_common()
    return {cause: (count, int(np.argmax(causes == cause))) for cause, count in counts}


def _no_row_left(causes: np.ndarray) -> UserError:
    why = "; ".join(f"{count} x {cause}" for cause, (count, _) in _count_causes(causes).items())
    return UserError(f"no row is left to train on: {why or 'the set is empty'} (columns that are understood: {FORMS})")


def _cached_map(table: Dataset, function: Callable, name: str, key: tuple = ()) -> Dataset:
    """All rows through `function`, on all cores. datasets keeps the result, here by content and by this file's text:
    a tokenizer's pickle, which would be its key, changes with use."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    code = Path(__file__).read_text(encoding="utf-8")
    return table.map(
        function,
        batched=True,
        remove_columns=table.column_names,
        new_fingerprint=_digest(repr((table._fingerprint, code, name, key)).encode()),
        num_proc=min(n_cores, len(table) // 4000) or None,
        desc=name,
    )


def _column(table: Dataset, name: str) -> np.ndarray:
    """A whole column at once: row by row, datasets takes minutes for a million."""
    return table.with_format("arrow")[:][name].to_numpy().copy()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> tuple:
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return _digest(backend.encode()), tokenizer.chat_template, tokenizer.eos_token


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _triples(batch: dict[str, list]) -> Iterator[Triple | Unusable]:
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        try:
            row = read_json_row(values[0]) if names == ["json"] else dict(zip(names, values, strict=True))
            yield read_triple(row)
        except Unusable as cause:
            yield cause


def _scan_rows(batch: dict[str, list]) -> dict[str, list]:
    """Of each row: a hash of its prompt, its domain, and why it can't be used, if so."""
    columns: dict[str, list] = {"key": [], "cause": [], "domain": []}
    for triple in _triples(batch):
        usable = isinstance(triple, Triple)
        columns["key"].append(_hash64(json.dumps(triple.prompt).encode()) if usable else 0)
        columns["cause"].append("" if usable else str(triple))
        columns["domain"].append(triple.domain if usable else "")
    return columns


def _encode_rows(encoder: Encoder, batch: dict[str, list]) -> dict[str, list]:
    columns: dict[str, list] = {
        name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "truncated", "cause", "digest")
    }
    for row in encoder.encode(list(_triples(batch))):
        usable = isinstance(row, dict)
        ids = [np.asarray(row[name] if usable else [], dtype=np.int32) for name in list(columns)[:3]]
        values = *ids, usable and row["truncated"], "" if usable else str(row), _hash64(b"|".join(map(bytes, ids)))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


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
