"""Preference data: from files and hub names to micro-batches of token trees.

In the order that data flows: `load_rows` reads a hub name, a folder or a file; `read_triple` maps one row, by its
columns, to prompt, chosen and rejected; `encode_rows` tokenizes; `prepare` does that for a whole set, counts what it
drops and splits by prompt; `epoch_order` shuffles prompts; `TreeCollator` builds the micro-batches, in which each
prompt stands once and each distinct response once.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
FORMS = (
    "conversations + chosen + rejected (COIG-P), prompt + chosen + rejected (TRL, text or messages), "
    "chosen + rejected with a common beginning (TRL, implicit prompt)"
)
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
    if path.is_file():
        refuse_lfs_pointers([path])
        if path.suffix in (".json", ".jsonl"):
            return _json_rows([path])
        if path.suffix == ".parquet":
            return _load("parquet", name, data_files=str(path), split="train")
        raise UserError(f"--dataset_name {name}: a file must end in .parquet, .json or .jsonl")
    if path.is_dir():
        refuse_lfs_pointers(file for kind in FILES for file in path.rglob(f"*{kind}"))
        try:
            builder = datasets.load_dataset_builder(str(path))
            files = builder.config.data_files or {}
        except Exception as error:
            raise UserError(
                f"--dataset_name {name}: no data set in this folder ({first_line(error)}); expected .parquet, .json or "
                ".jsonl files"
            ) from None
        if files and split not in files:
            raise UserError(f"--dataset_split {split}: {name} has the splits {', '.join(map(str, files))}")
        if builder.dataset_name == "json" or files and all(Path(f).suffix in (".json", ".jsonl") for f in files[split]):
            return _json_rows([Path(file) for file in files[split]])
        return _load(str(path), name, split=split)
    if name.startswith((".", "/", "~")) or path.suffix in FILES or name.count("/") > 1:
        raise UserError(f"--dataset_name {name}: there is no such file or folder")
    return _load(name, name, split=split)


def _load(loader: str, name: str, **kwargs) -> Dataset:
    try:
        return datasets.load_dataset(loader, **kwargs)
    except Exception as error:  # the library raises a dozen types here; each means that this name can't be read
        raise UserError(
            f"--dataset_name {name} can't be loaded ({first_line(error)}). Give a local "
            "folder or a .parquet, .json or .jsonl file, or set HF_ENDPOINT to a mirror of the hub, or try `--demo`"
        ) from None


def first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def refuse_lfs_pointers(files: Iterable[Path]) -> None:
    """A clone made without git-lfs has three lines of text in place of each large file.

    Raises:
        UserError: for the first file that is such a pointer.
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

    Raises:
        Unusable: with the cause, if the row can't train.
    """
    if not isinstance(row, dict):
        raise Unusable("row is not an object")
    domain = row.get("domain") if isinstance(row.get("domain"), str) else ""
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise Unusable(f"{field}: missing")
    if row.get("conversations") is not None:  # COIG-P, ShareGPT
        prompt = _messages(row["conversations"], "conversations")
        if isinstance(row.get("system"), str) and row["system"] and prompt[:1] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": _text(row["system"], "system")}, *prompt]
        chosen, rejected = (_messages(_as_turn(row[field]), field) for field in ("chosen", "rejected"))
    elif isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
        if row.get("prompt") is None:  # TRL standard, implicit prompt: what both begin with
            common = _n_common(chosen, rejected)
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        elif isinstance(row["prompt"], str):  # TRL standard
            prompt = _text(row["prompt"], "prompt")
        else:
            raise Unusable("prompt: wrong type")
        return _checked(Triple(prompt, chosen, rejected, domain))
    else:
        chosen, rejected = _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")
        common = _n_common(chosen, rejected)
        if common or row.get("prompt") is None:  # TRL conversational, implicit prompt
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        elif isinstance(row["prompt"], str):
            prompt = [{"role": "user", "content": _text(row["prompt"], "prompt")}]
        else:  # TRL conversational
            prompt = _messages(row["prompt"], "prompt")
    if not prompt or any(not turn["content"].strip() for turn in prompt if turn["role"] != "system"):
        raise Unusable("prompt: empty")
    if prompt[-1]["role"] != "user":
        raise Unusable("prompt: does not end with a user turn")
    for turns in (chosen, rejected):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise Unusable("response: not one assistant turn")
    return _checked(Triple(prompt, chosen[0]["content"], rejected[0]["content"], domain))


def _n_common(a: Sequence, b: Sequence) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _checked(triple: Triple) -> Triple:
    if not triple.prompt:
        raise Unusable("prompt: empty")
    if triple.chosen == triple.rejected:
        raise Unusable("chosen equals rejected")
    if not triple.chosen.strip() or not triple.rejected.strip():
        raise Unusable("response: empty")
    return triple


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
    eos. Special tokens that are written out inside a text, such as "<|im_end|>", are text: they are tokenized as the
    characters that they are and end no turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # U+FDD0 opens our own marks (Unicode keeps it for such internal use): in a text it is hidden like the others.
        specials.add("\ufdd0")
        self.special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))
        self.end_of_turn_id = end_of_turn_id(tokenizer)

    def _hide_specials(self, text: str, hidden: list[str]) -> str:
        """Replace special tokens in a text by marks that survive the chat template; `tokenize` puts them back."""

        def mark(match: re.Match) -> str:
            hidden.append(match.group())
            return f"\ufdd0{len(hidden) - 1}\ufdd1"

        return self.special.sub(mark, text)

    def _render(self, triple: Triple) -> tuple[str, str, str, list[str]]:
        """Prompt, prompt + chosen, prompt + rejected as the chat template writes them; the hidden special tokens."""
        hidden: list[str] = []
        if isinstance(triple.prompt, str):
            prompt = self._hide_specials(triple.prompt, hidden)
            texts = [prompt + self._hide_specials(response, hidden) for response in (triple.chosen, triple.rejected)]
            return prompt, *texts, hidden
        messages = [{**turn, "content": self._hide_specials(turn["content"], hidden)} for turn in triple.prompt]
        try:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            texts = [
                self.tokenizer.apply_chat_template(
                    [*messages, {"role": "assistant", "content": self._hide_specials(response, hidden)}], tokenize=False
                )
                for response in (triple.chosen, triple.rejected)
            ]
        except TemplateError:
            raise Unusable("refused by the chat template") from None
        if not all(text.startswith(prompt) for text in texts):
            raise Unusable("the chat template changes the prompt once it is answered")
        return prompt, *texts, hidden

    def _tokenize(self, texts: Sequence[tuple[str, tuple[str, ...]]]) -> dict[tuple[str, tuple[str, ...]], list[int]]:
        """Token ids of each distinct (text, hidden special tokens); all the plain ones in one call, which is fast."""
        distinct = list(dict.fromkeys(texts))
        plain = [text for text, hidden in distinct if not hidden]
        ids = self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else []
        tokens = {(text, ()): list(row) for text, row in zip(plain, ids, strict=True)}
        for text, hidden in distinct:
            if hidden:
                pieces = re.split("\ufdd0([0-9]+)\ufdd1", text)  # text, number of a hidden token, text, number ...
                tokens[text, hidden] = [
                    token
                    for i, piece in enumerate(pieces)
                    if piece
                    for token in self.tokenizer(
                        hidden[int(piece)] if i % 2 else piece,
                        add_special_tokens=False,
                        split_special_tokens=bool(i % 2),
                    )["input_ids"]
                ]
        return tokens

    def encode(self, triples: Sequence[Triple | Unusable]) -> list[dict | Unusable]:
        """Tokens of each triple, or why there are none; an `Unusable` passes through.

        `prompt_ids` is an exact prefix of the tokenized conversation. Where the tokenizer would merge the prompt's last
        characters with the response's first ones ("\\n" + "\\n"), they are tokenized apart, as they are when the model
        answers: the prompt is there first.

        A pair of over `max_length` tokens is cut by one rule: the prompt keeps its last
        max(max_length / 2, max_length - longer response) tokens, each response its first tokens in the room that is
        left. A response that was cut has no end-of-turn.
        """
        rendered: list[tuple[str, str, str, tuple[str, ...]] | Unusable] = []
        for triple in triples:
            try:
                if isinstance(triple, Unusable):
                    raise triple
                *texts, hidden = self._render(triple)
                rendered.append((*texts, tuple(hidden)))
            except Unusable as cause:
                rendered.append(cause)
        usable = [row for row in rendered if not isinstance(row, Unusable)]
        tokens = self._tokenize([(text, row[3]) for row in usable for text in row[:3]])
        apart = [
            (text[len(row[0]) :], row[3])
            for row in usable
            for text in row[1:3]
            if not _starts_with(tokens[text, row[3]], tokens[row[0], row[3]])
        ]
        tokens |= self._tokenize(apart)
        return [
            row if isinstance(row, Unusable) else self._cut(row, triple, tokens)
            for row, triple in zip(rendered, triples, strict=True)
        ]

    def _cut(self, row: tuple[str, str, str, tuple[str, ...]], triple: Triple, tokens: dict) -> dict | Unusable:
        prompt, *texts, hidden = row
        prompt_ids = tokens[prompt, hidden]
        end = self.tokenizer.eos_token_id if isinstance(triple.prompt, str) else self.end_of_turn_id
        responses = []
        for text in texts:
            ids = tokens[text, hidden]
            if _starts_with(ids, prompt_ids):
                ids = ids[len(prompt_ids) :]
            else:
                ids = tokens[text[len(prompt) :], hidden]
            # What a template writes behind its end-of-turn ("\n") belongs to the next turn. A text holds no `end` by
            # itself, because special tokens in it were tokenized as text.
            responses.append((ids[: ids.index(end)] if end in ids else ids) + [end])
        longest = max(map(len, responses))
        n_prompt = min(len(prompt_ids), max(self.max_length // 2, self.max_length - longest))
        prompt_ids = prompt_ids[len(prompt_ids) - n_prompt :]
        chosen_ids, rejected_ids = (ids[: self.max_length - n_prompt] for ids in responses)
        if chosen_ids == rejected_ids:
            return Unusable("chosen equals rejected after truncation")
        return {
            "prompt_ids": prompt_ids,
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "truncated": n_prompt < len(tokens[prompt, hidden]) or longest > self.max_length - n_prompt,
        }


def _starts_with(ids: list[int], prefix: list[int]) -> bool:
    return ids[: len(prefix)] == prefix


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an assistant's turn, `<|im_end|>` for Qwen2.5.

    It need not be the tokenizer's eos (Qwen2.5's base model: `<|endoftext|>`). Without a template, or with one that
    ends turns with plain text, it is the eos.

    Raises:
        UserError: if there is neither.
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
    """Tokenized pairs. `rows` are their row numbers in the source, `keys` tell their prompts apart."""

    tokens: Dataset  # columns prompt_ids, chosen_ids, rejected_ids
    keys: np.ndarray  # [n] int64, equal for pairs of the same prompt
    rows: np.ndarray  # [n] int64
    domains: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, indices: Sequence[int]) -> list[dict]:
        """The pairs at these indices, as `TreeCollator` takes them."""
        columns = self.tokens[[int(i) for i in indices]]
        return [
            {"index": int(i), "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for i, prompt, chosen, rejected in zip(
                indices, columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"], strict=True
            )
        ]


@dataclass
class PreparedData:
    train: Pairs
    held_out: Pairs
    n_rows: int  # in the source
    dropped: dict[str, tuple[int, int]]  # cause -> (rows, the first one's number)
    n_truncated: int
    fingerprint: str  # of the token ids and the split

    def summary(self) -> list[str]:
        """What was read, kept and dropped, as lines for the terminal."""
        n_prompts = len(np.unique(self.train.keys))
        lines = [
            f"{self.n_rows:,} rows: {len(self.train):,} pairs of {n_prompts:,} prompts to train on, "
            f"{len(self.held_out):,} held out ({len(np.unique(self.held_out.keys)):,} other prompts)"
        ]
        if self.n_truncated:
            lines.append(f"{self.n_truncated:,} pairs cut to max_length")
        for cause, (count, first) in sorted(self.dropped.items(), key=lambda item: -item[1][0]):
            lines.append(f"dropped {count:,} rows: {cause} (first: row {first})")
        return lines


def prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    max_train_samples: int | None = None,
    max_eval_samples: int = 512,
    domains: Sequence[str] | None = None,
) -> PreparedData:
    """Tokenize a data set and split it by prompt.

    Prompts are taken in the order of their hashes: the first ones are held out (`max_eval_samples` pairs at most, and
    no more than a tenth of the rows), the next ones are trained on (`max_train_samples` pairs at most). So a subset is
    a fair sample of all domains, the held-out pairs are the same for any subset and seed, and no prompt is on both
    sides.

    Raises:
        UserError: for unknown columns or domains, or if no row is left.
    """
    columns = _columns(rows)
    if not {"chosen", "rejected"} <= columns:
        raise UserError(f"the data has the columns {', '.join(sorted(columns)) or 'none'}; accepted: {FORMS}")
    encoder = Encoder(tokenizer, max_length)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    workers = min(n_cores, len(rows) // 4000) or None
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()

    def cached_map(table: Dataset, function, name: str, **key) -> Dataset:
        return table.map(
            function,
            batched=True,
            remove_columns=table.column_names,
            # By content: a tokenizer's pickle, which is the default key, changes with use.
            new_fingerprint=_digest((table._fingerprint, version, name, key)),
            num_proc=workers,
            desc=name,
        )

    scanned = cached_map(rows, _scan_rows, "Reading rows")
    keys = np.asarray(scanned.with_format("numpy")["key"], dtype=np.int64)
    causes = {int(i): cause for i, cause in enumerate(scanned["cause"]) if cause}
    good = np.setdiff1d(np.arange(len(rows)), np.fromiter(causes, dtype=np.int64))
    if domains is not None:
        there = np.asarray(list(scanned["domain"]), dtype=object)
        if unknown := set(domains) - set(there):
            listed = ", ".join(sorted(set(there)))
            raise UserError(f"--domains: no row has {', '.join(sorted(unknown))}; there is {listed}")
        good = good[np.isin(there[good], list(domains))]
    good = good[np.argsort(keys[good], kind="stable")]  # by prompt, in the order of their hashes; then as in the source

    n_held_out = min(max_eval_samples, len(good) // 10)
    boundary = n_held_out
    while n_held_out and boundary < len(good) and keys[good[boundary]] == keys[good[boundary - 1]]:
        boundary += 1  # the last held-out prompt's other pairs can't be trained on; they are left out
    if boundary == len(good):  # a single prompt: nothing can be held out
        n_held_out = boundary = 0
    n_train = len(good) - boundary if max_train_samples is None else min(max_train_samples, len(good) - boundary)
    if not n_train:
        raise _no_row_left(causes.values())
    selected = np.concatenate([good[:n_held_out], good[boundary : boundary + n_train]])

    tokens = cached_map(
        rows.select(selected),
        partial(_encode_rows, encoder),
        "Tokenizing",
        tokenizer=_digest(_tokenizer_state(tokenizer)),
        selected=_digest(selected.tolist()),
        max_length=max_length,
    )
    cut_causes = list(tokens["cause"])
    causes |= {int(selected[i]): cause for i, cause in enumerate(cut_causes) if cause}
    dropped: dict[str, tuple[int, int]] = {}
    for row in sorted(causes):
        count, first = dropped.get(causes[row], (0, row))
        dropped[causes[row]] = (count + 1, first)

    kept = np.array([i for i, cause in enumerate(cut_causes) if not cause], dtype=np.int64)
    domain_of = list(tokens["domain"])

    def subset(indices: np.ndarray) -> Pairs:
        ids = tokens.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).select(indices)
        numbers = selected[indices]
        return Pairs(ids.with_format("numpy"), keys[numbers], numbers, [domain_of[int(i)] for i in indices])

    train, held_out = subset(kept[kept >= n_held_out]), subset(kept[kept < n_held_out])
    if not len(train):
        raise _no_row_left(causes.values())
    assert not np.intersect1d(train.keys, held_out.keys).size, "a prompt is on both sides of the split"
    # Of the contents, not of a path or a date: a resumed run may find its data in another place.
    digests = np.asarray(list(tokens["digest"]), dtype=np.int64)
    fingerprint = _digest([digests[kept[side]].tolist() for side in (kept >= n_held_out, kept < n_held_out)])
    return PreparedData(train, held_out, len(rows), dropped, int(sum(tokens["truncated"])), fingerprint)


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _no_row_left(causes: Iterable[str]) -> UserError:
    why = "; ".join(f"{count} x {cause}" for cause, count in Counter(causes).most_common())
    return UserError(f"no row is left to train on: {why or 'the set is empty'}")


def _columns(rows: Dataset) -> set[str]:
    if rows.column_names != ["json"]:
        return set(rows.column_names)
    columns: set[str] = set()
    for line in rows[:1000]["json"]:
        try:
            row = read_json_row(line)
            columns |= set(row) if isinstance(row, dict) else set()
        except Unusable:
            pass
    return columns


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return repr((backend, tokenizer.chat_template, tokenizer.eos_token))


def _triples(batch: dict[str, list]) -> list[Triple | Unusable]:
    names = list(batch)
    triples: list[Triple | Unusable] = []
    for values in zip(*batch.values(), strict=True):
        try:
            row = read_json_row(values[0]) if names == ["json"] else dict(zip(names, values, strict=True))
            triples.append(read_triple(row))
        except Unusable as cause:
            triples.append(cause)
    return triples


def _scan_rows(batch: dict[str, list]) -> dict[str, list]:
    """Of each row: a hash of its prompt, its domain, and why it can't be used, if so."""
    keys, causes = [], []
    triples = _triples(batch)
    for triple in triples:
        usable = not isinstance(triple, Unusable)
        text = json.dumps(triple.prompt) if usable else ""
        keys.append(_hash64(text.encode()))
        causes.append("" if usable else str(triple))
    return {"key": keys, "cause": causes, "domain": _domains(triples)}


def _domains(triples: list[Triple | Unusable]) -> list[str]:
    return ["" if isinstance(triple, Unusable) else triple.domain for triple in triples]


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _encode_rows(encoder: Encoder, batch: dict[str, list]) -> dict[str, list]:
    triples = _triples(batch)
    encoded = encoder.encode(triples)
    nothing = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "truncated": False}
    columns = {name: [(nothing if isinstance(row, Unusable) else row)[name] for row in encoded] for name in nothing}
    columns |= {name: [np.asarray(ids, dtype=np.int32) for ids in columns[name]] for name in nothing if "ids" in name}
    columns["digest"] = [
        _hash64(b"|".join(ids.tobytes() for ids in row))
        for row in zip(columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"], strict=True)
    ]
    columns["cause"] = [str(row) if isinstance(row, Unusable) else "" for row in encoded]
    columns["domain"] = _domains(triples)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Pairs to micro-batches


def epoch_order(keys: np.ndarray, seed: int, epoch: int, shuffle: str = "prompts") -> np.ndarray:
    """The order of the pairs in one epoch, [n] indices: prompts shuffled, a prompt's pairs together.

    With `shuffle="pairs"` a prompt's pairs are spread over the epoch; then hardly anything is shared within a step.
    A function of its arguments alone, so that a resumed run and every process see the same order.
    """
    if shuffle == "pairs":
        return np.random.default_rng([seed, epoch]).permutation(len(keys))
    _, group = np.unique(keys, return_inverse=True)
    place = np.random.default_rng([seed, epoch]).permutation(int(group.max()) + 1)
    return np.argsort(place[group], kind="stable")


@dataclass
class Tree:
    """A prompt and the distinct responses to it that a micro-batch needs."""

    prompt: np.ndarray
    responses: list[np.ndarray]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class Unit:
    """Trees and pairs that go into one micro-batch: a pair is (index, chosen, rejected), a response (tree, number)."""

    trees: list[Tree]
    pairs: list[tuple[int, tuple[int, int], tuple[int, int]]]

    @property
    def n_tokens(self) -> int:
        return sum(tree.n_tokens for tree in self.trees)


@dataclass
class TreeCollator:
    """Cuts a step's pairs into micro-batches in which each prompt and each distinct response is encoded once.

    Example: one prompt, two pairs that share their chosen response.

    >>> collate = TreeCollator(micro_batch_tokens=16)
    >>> pairs = [{"index": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
    ...          {"index": 1, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [4, 4, 9]}]
    >>> (batch,) = collate(pairs)
    >>> for name, tensor in batch.items():
    ...     print(f"{name:16}", tensor.tolist())
    input_ids        [[5, 6, 7, 9, 8, 9, 4, 4, 9]]
    position_ids     [[0, 1, 2, 3, 2, 3, 2, 3, 4]]
    branch_ids       [[0, 0, 1, 1, 2, 2, 3, 3, 3]]
    tree_ids         [[0, 0, 0, 0, 0, 0, 0, 0, 0]]
    predictor_index  [1, 2, 1, 4, 1, 6, 7]
    target_ids       [7, 9, 8, 9, 4, 4, 9]
    response_index   [0, 0, 1, 1, 2, 2, 2]
    response_lengths [2, 2, 3]
    chosen_index     [0, 0]
    rejected_index   [1, 2]
    pair_index       [0, 1]
    pair_weight      [1.0, 1.0]

    R rows of T tokens, N response tokens, M distinct responses, P pairs:

    | tensor | shape | meaning |
    |---|---|---|
    | input_ids | [R, T] | a prompt and its responses, then the next tree, padded on the right |
    | position_ids | [R, T] | restart after the prompt for each response |
    | branch_ids | [R, T] | 0 for a prompt, k for the row's k-th response, -1 for padding |
    | tree_ids | [R, T] | which of the row's trees, -1 for padding |
    | predictor_index | [N] | flat position in [R*T] of the hidden state that predicts each response token |
    | target_ids | [N] | the response tokens |
    | response_index | [N] | which of the M responses each token belongs to |
    | response_lengths | [M] | tokens of each response |
    | chosen_index, rejected_index | [P] | each pair's two responses |
    | pair_index | [P] | the pairs' numbers in their `Pairs` |
    | pair_weight | [P] | 1; 0 in a filler, which keeps processes in step when they outnumber the micro-batches |

    With `one_row`, also `segments`: for each prompt and each response of the row its (start, end) and those of its
    prompt, a prompt's own being (start, start). Numbers, not a tensor: they are for the host.
    """

    micro_batch_tokens: int
    pad_token_id: int = 0  # never attended to and never a target: any id will do
    share: bool = True  # False encodes every response of every pair anew, prompt included, as other trainers do
    one_row: bool = False  # True for attention without a mask: nothing is padded, and the batch names its `segments`

    def __call__(self, pairs: Sequence[dict], n_processes: int = 1) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of these pairs, the longest first; their number is a multiple of `n_processes`.

        Raises:
            UserError: if one pair alone is longer than `micro_batch_tokens`.
        """
        bins = self._cut(self._units(pairs), n_processes)
        batches = [self._tensors(units, weight=1.0) for units in bins if units]
        if len(batches) < len(bins):  # a filler: the shortest micro-batch once more, at weight 0
            filler = self._tensors(min(filter(None, bins), key=_total), weight=0.0)
            batches += [filler] * (len(bins) - len(batches))
        return batches

    def _units(self, pairs: Sequence[dict]) -> list[Unit]:
        groups: dict[bytes, list[tuple[int, np.ndarray, bytes, bytes]]] = {}
        for pair in pairs:
            prompt, *sides = (
                np.asarray(pair[f"{name}_ids"], dtype=np.int64) for name in ("prompt", "chosen", "rejected")
            )
            groups.setdefault(prompt.tobytes(), []).append((pair["index"], prompt, *(ids.tobytes() for ids in sides)))
        units = []
        for group in groups.values():
            if self.share:
                units += self._shared_units(group)
            else:
                for index, prompt, *sides in group:
                    trees = [Tree(prompt, [np.frombuffer(ids, dtype=np.int64)]) for ids in sides]
                    units.append(Unit(trees, [(index, (0, 0), (1, 0))]))
        for unit in units:
            if unit.n_tokens > self.micro_batch_tokens:
                raise UserError(
                    f"--micro_batch_tokens {self.micro_batch_tokens} is too small for a pair of {unit.n_tokens} tokens"
                )
        return units

    def _shared_units(self, group: list[tuple[int, np.ndarray, bytes, bytes]]) -> list[Unit]:
        """One unit for all pairs of a prompt; several where they don't fit, each with the prompt once more."""
        units: list[Unit] = []
        numbers: dict[bytes, int] = {}  # of the responses in the last unit's tree
        left = sorted(group, key=lambda pair: pair[0])
        whole = len(group[0][1]) + sum(len(ids) // 8 for ids in {ids for pair in group for ids in pair[2:]})
        while left:
            next_one, n_new = 0, 0
            if whole > self.micro_batch_tokens:
                # The pair that adds the fewest tokens: where a tree must be cut, its parts have little in common.
                costs = [sum(len(ids) // 8 for ids in set(pair[2:]) if ids not in numbers) for pair in left]
                n_new = min(costs)
                next_one = costs.index(n_new)
            if not units or units[-1].pairs and units[-1].n_tokens + n_new > self.micro_batch_tokens:
                units.append(Unit([Tree(group[0][1], [])], []))
                numbers = {}
                continue
            index, _, *sides = left.pop(next_one)
            responses = units[-1].trees[0].responses
            for ids in sides:
                if ids not in numbers:
                    numbers[ids] = len(responses)
                    responses.append(np.frombuffer(ids, dtype=np.int64))
            chosen, rejected = ((0, numbers[ids]) for ids in sides)
            units[-1].pairs.append((index, chosen, rejected))
        return units

    def _cut(self, units: list[Unit], n_processes: int) -> list[list[Unit]]:
        """Units into the fewest micro-batches that hold them, evenly filled."""
        units = sorted(units, key=lambda unit: -unit.n_tokens)
        n_bins = -(-_total(units) // (self.micro_batch_tokens * n_processes)) * n_processes
        while True:
            bins = _spread(units, n_bins)
            if max(map(_total, bins)) <= self.micro_batch_tokens:
                return sorted(bins, key=_total, reverse=True)
            n_bins += n_processes

    def _rows(self, trees: list[Tree]) -> list[list[Tree]]:
        """Trees into rows: longer ones waste attention, more of them waste padding, a twentieth at most is allowed."""
        trees = sorted(trees, key=lambda tree: -tree.n_tokens)
        best, best_cost = [trees], float("inf")
        for n_rows in range(1, 2 if self.one_row else len(trees) + 1):
            rows = _spread(trees, n_rows)
            length = max(map(_total, rows))
            size = n_rows * length
            # At about 8,000 tokens a row, Qwen2.5-0.5B's attention costs as much as all its other layers.
            cost = size * (1 + length / 8000)
            if size <= min(self.micro_batch_tokens, 1.05 * _total(trees)) and cost < best_cost:
                best, best_cost = rows, cost
        return best

    def _tensors(self, units: list[Unit], weight: float) -> dict[str, torch.Tensor]:
        rows = self._rows([tree for unit in units for tree in unit.trees])
        shape = len(rows), max(map(_total, rows))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        branch_ids, tree_ids = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        predictors, targets, responses, segments = [], [], [], []
        first_response: dict[int, int] = {}  # of each tree, in the micro-batch's numbering
        n_responses = 0
        for r, row in enumerate(rows):
            at, branch = 0, 0
            for t, tree in enumerate(row):
                first_response[id(tree)] = n_responses
                n_prompt, start = len(tree.prompt), at
                for k, ids in enumerate([tree.prompt, *tree.responses]):
                    here = slice(at, at + len(ids))
                    input_ids[r, here] = ids
                    position_ids[r, here] = np.arange(len(ids)) + (n_prompt if k else 0)
                    branch_ids[r, here] = branch + k if k else 0
                    tree_ids[r, here] = t
                    segments.append((at, at + len(ids), start, start + n_prompt if k else start))
                    if k:  # the prompt's last token predicts a response's first one
                        before = r * shape[1] + np.arange(at - 1, at + len(ids) - 1)
                        before[0] = r * shape[1] + start + n_prompt - 1
                        predictors.append(before)
                        targets.append(ids)
                        responses.append(np.full(len(ids), n_responses))
                        n_responses += 1
                    at += len(ids)
                branch += len(tree.responses)
        pairs = [
            (index, *(first_response[id(unit.trees[tree])] + number for tree, number in (chosen, rejected)))
            for unit in units
            for index, chosen, rejected in unit.pairs
        ]
        index, chosen, rejected = (torch.tensor(column) for column in zip(*sorted(pairs), strict=True))
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "branch_ids": torch.from_numpy(branch_ids),
            "tree_ids": torch.from_numpy(tree_ids),
            "predictor_index": torch.from_numpy(np.concatenate(predictors)),
            "target_ids": torch.from_numpy(np.concatenate(targets)),
            "response_index": torch.from_numpy(np.concatenate(responses)),
            "response_lengths": torch.tensor([len(ids) for ids in targets]),
            "chosen_index": chosen,
            "rejected_index": rejected,
            "pair_index": index,
            "pair_weight": torch.full((len(pairs),), weight),
        }
        return batch | {"segments": segments} if self.one_row else batch


def _total(items: Sequence[Tree | Unit]) -> int:
    return sum(item.n_tokens for item in items)


def _spread(items: list, n_bins: int) -> list[list]:
    """Items, the longest first, each into the bin that is least full so far."""
    bins, totals = [[] for _ in range(n_bins)], [0] * n_bins
    for item in items:
        least = totals.index(min(totals))
        bins[least].append(item)
        totals[least] += item.n_tokens
    return bins


def sees(query_branch, query_tree, key_branch, key_tree) -> torch.Tensor:
    """Whether queries see keys that are not later: those of their own tree's prompt and of their own response."""
    return (query_tree == key_tree) & ((key_branch == 0) | (key_branch == query_branch))


def tree_mask(branch_ids: torch.Tensor, tree_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive attention mask of token trees, [R, 1, T, T]: 0 where a query sees a key, else the dtype's minimum.

    Padding sees padding, so that no row of the softmax is empty. Additive, because a bool mask is silently wrong under
    `eager`.
    """
    n = branch_ids.shape[1]
    aligned = -(-n // 8) * 8  # CUDA's kernels copy a mask whose rows are not aligned, once in each layer
    not_later = torch.ones(n, n, dtype=torch.bool, device=branch_ids.device).tril()
    visible = not_later & sees(branch_ids[:, :, None], tree_ids[:, :, None], branch_ids[:, None], tree_ids[:, None])
    mask = torch.zeros(len(branch_ids), n, aligned, dtype=dtype, device=branch_ids.device)[:, :, :n]
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
