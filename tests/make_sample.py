"""Make docs/sample: a small set of Chinese preference pairs, and a small Qwen2 that has no preference yet.

    uv run tests/make_sample.py

`python dpo_train.py --demo` learns from the two in one to two minutes on a CPU: before, the model answers well
about half the time; afterwards nearly always, also to prompts that it was not trained on. All of it is made for this
project.

1. Questions: written ones (texts.txt in docs/sample) and computed ones (problems.txt), each with right contents and a
   wrong one.
2. Responses: good ones answer, politely; bad ones evade, err, or are rude. Their phrases recur over all prompts, so a
   preference learnt on some prompts holds on others.
3. Pairs: (good, bad), in COIG-P's columns.
4. Tokenizer: a byte-level BPE with Qwen2's pre-tokenizer.
5. Model: a Qwen2 that imitates good and bad responses alike, and so is undecided, as a base model is before DPO.
"""

import argparse
import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import Qwen2Tokenizer

SAMPLE = Path(__file__).resolve().parent.parent / "docs" / "sample"

# ----------------------------------------------------------------------------------------------------------------------
# 1. Questions


@dataclass
class Question:
    """One prompt, and what good and bad answers to it would say."""

    domain: str
    turns: list[tuple[str, str]]  # (COIG-P's "from", text); the last is the user's
    right: list[str]  # two or three right contents
    wrong: str

    def __post_init__(self):
        """The noun in 【】 is the topic, which vague and rude answers repeat; the marks themselves go."""
        self.topic = re.search("【(.+?)】", "".join(text for _, text in self.turns))[1]
        self.conversations = [{"from": role, "value": re.sub("[【】]", "", text)} for role, text in self.turns]


def read_sections(name: str) -> dict[str, str]:
    """texts.txt or problems.txt by section; the file's head explains the marks with which lines begin."""
    body = (SAMPLE / name).read_text(encoding="utf-8").split("---\n", 1)[1]
    sections = (section.split("\n", 1) for section in body.strip().removeprefix("# ").split("\n# "))
    return {title: text.strip() for title, text in sections}


def fill_in(problems: str, rng: random.Random) -> str:
    """A section of problems.txt in the form of texts.txt: each block once for each row of its table."""
    filled = []
    for block in problems.split("\n\n"):
        lines = block.splitlines()
        table = [cells.split(", ") for line in lines if line[0] == "|" for cells in line[2:].split(" | ")]
        code = "\n".join(line[2:] for line in lines if line[0] == "&")
        template = "\n".join(line for line in lines if line[0] not in "|&")
        names, *rows = table or [[], []]
        for i, cells in enumerate(rows):
            scope = {"n": rng.randint, "rng": rng, "math": math, "digits": "零一二三四五六七八九", "row": i}
            scope |= {name: int(cell) if cell.isdecimal() else cell for name, cell in zip(names, cells, strict=True)}
            exec(code, scope)
            filled.append(eval(f'rf"""{template}"""', scope))
    return "\n".join(filled)


def read_questions(domain: str, text: str) -> Iterator[Question]:
    """The questions of a section in the form of texts.txt. A question ends with its wrong content."""
    roles = {"?": "human", "=": "gpt"}
    system, turns, right, given = [], [], [], None
    for line in filter(None, text.splitlines()):
        mark, content = line[0], line[2:]
        if mark == "s":
            system = [] if content == "-" else [("system", content)]
        elif mark in roles:
            turns.append((roles[mark], content))
        elif mark == "&":
            given = content
        elif mark == "+":
            right.append(content)
        elif mark == "-":
            if given:
                right, content = code_contents(given, right, content)
            yield Question(domain, system + turns, right, content)
            turns, right, given = [], [], None


def code_contents(given: str, right: list[str], wrong: str) -> tuple[list[str], str]:
    """Puts snippets into words, after running them: the right ones must agree, the wrong one must not."""
    *right, wrong = [text.replace(r"\n", "\n") for text in (*right, wrong)]
    is_function = wrong.startswith("def")  # then `given` is a call of it, else assignments

    def result(snippet):
        scope = {}
        exec(snippet if is_function else given, scope)
        try:
            return eval(given if is_function else snippet, scope)
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            return error

    value = result(right[0])
    assert result(right[1]) == value != result(wrong) and not isinstance(value, Exception), (given, right, wrong)
    if is_function:
        right = [f"写成函数：\n```python\n{snippet}\n```\n调用 {given} 得到 {value!r}" for snippet in right]
        return right, f"写成这样：\n```python\n{wrong}\n```\n"
    return [f"可以写 `{right[0]}`，当 {given} 时结果是 {value!r}", f"用 `{right[1]}`，得到 {value!r}"], f"写 `{wrong}`"


def all_questions(rng: random.Random) -> list[Question]:
    texts, problems = read_sections("texts.txt"), read_sections("problems.txt")
    questions = list(read_questions("chat", fill_in(problems["capitals"], rng)))
    for domain in ("chat", "novel", "role", "code"):
        questions += read_questions(domain, texts[domain])
    for domain in ("math", "logic"):
        questions += read_questions(domain, fill_in(problems[domain], rng))
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# 2. Responses


def responses(question: Question, texts: dict[str, str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Two or three good and three or two bad responses, of about the same lengths."""

    def phrases(name):
        """The domain's own, or those for the others."""
        own = [key for key in (name, f"{name} {question.domain}") if key in texts]
        return texts[own[0] if own else f"{name} other"].splitlines()

    contents = list(question.right)
    if len(contents) == 2:
        join = {"chat": "。另外，", "novel": "。也可以写：", "code": "。也可以这样："}.get(question.domain)
        fits = join and len("".join(contents)) < 50 and "\n" not in contents[0]
        contents.append(join.join(contents) if fits else contents[0])
    openings, closings = ([*phrases(name), "", ""] for name in ("openings", "closings"))
    good = set()
    while len(good) < 3:
        starts, ends = rng.sample(openings, 3), rng.sample(closings, 3)
        if contents[2] == contents[0]:
            ends[2] = ends[0]  # what follows what is then no harder to learn than in bad responses
        good = {a + sentence(b) + c for a, b, c in zip(starts, contents, ends, strict=True)}
    good = sorted(good)

    starts = [
        rng.choice(phrases("evade")).format(t=question.topic),
        rng.choice(phrases("rude")).format(t=question.topic),
        rng.choice(phrases("err")) + sentence(question.wrong),
    ]
    bad = []
    for start, name, like in zip(starts, ("evade more", "rude more", "err more"), rng.sample(good, 3), strict=True):
        # Of some ways to go on, the one that makes it as long as a good response: length must not tell them apart.
        tails = ["", *rng.sample(phrases("tails"), 4)]
        ways = [start + "".join(rng.sample(phrases(name), k)) + tail for k in range(4) for tail in tails]
        bad.append(min(ways, key=lambda way: abs(len(way) - len(like))))  # noqa: B023 - used at once
    n_good, n_bad = rng.choice([(3, 3), (3, 2), (2, 3)])
    return rng.sample(good, n_good), rng.sample(bad, n_bad)


def sentence(text: str) -> str:
    return text if text[-1] in "。！!？?\n" else text + "。"


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pairs


def make_pairs(questions: list[Question], texts: dict[str, str], rng: random.Random) -> list[dict]:
    """About six pairs to a prompt; each of its responses is in one at least, and in two or more on average."""
    rows = []
    for question in questions:
        good, bad = responses(question, texts, rng)
        pairs, picked = list(itertools.product(good, bad)), []
        while len({text for pair in picked for text in pair}) < len(good + bad):
            picked = rng.sample(pairs, min(len(pairs), rng.choice([6, 7, 8])))
        for chosen, rejected in picked:
            sides = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
            rows.append({"conversations": question.conversations, **sides, "domain": question.domain})
    rng.shuffle(rows)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tokenizer

# Qwen2.5's ChatML: each turn between <|im_start|> and <|im_end|>, and a system turn even when none is given.
CHAT_TEMPLATE = r"""
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


def make_tokenizer(rows: list[dict], vocab_size: int) -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a small vocabulary. As in Qwen2.5, "!" is id 0 and the special tokens come last."""
    corpus = sorted({turn["value"] for r in rows for turn in [*r["conversations"], r["chosen"], r["rejected"]]})
    corpus += ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 100  # what the template adds to each prompt
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=10,  # bytes: three characters at most, else each stock phrase would become one token
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


Tree = list[list[int]]  # the token ids of a prompt, then of each of its responses


def encode(tokenizer, conversations: list[dict], answers: list[str]) -> Tree:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversations]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [prompt, *(tokenizer(text + "<|im_end|>")["input_ids"] for text in answers)]


# ----------------------------------------------------------------------------------------------------------------------
# 5. Model


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # As Qwen2.5's base models have it: <|endoftext|>, not the template's <|im_end|>.
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def response_log_probs(model, trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each response token of a batch, [N], and the number of its response in its tree, [N].

    A row is a prompt and all its responses: each of these sees the prompt and itself, and stands right behind the
    prompt. That halves the work of a row a response.
    """
    rows = []
    for prompt, *others in trees:
        # Of each token: its id, its position, the index of the token that predicts it, its part (0 is the prompt).
        tokens = [(token, i, i - 1, 0) for i, token in enumerate(prompt)]
        for part, response in enumerate(others, 1):
            n, start = len(response), len(tokens)
            before = [len(prompt) - 1, *range(start, start + n - 1)]
            tokens += zip(response, range(len(prompt), len(prompt) + n), before, [part] * n, strict=True)
        rows.append(torch.tensor(tokens))
    # Padding looks like a prompt's tokens; it is behind all others, so that these don't see it.
    ids, positions, before, part = pad_sequence(rows, batch_first=True).unbind(2)  # each [trees, length]
    seen, by = part[:, None, :], part[:, :, None]
    sees = ((seen == 0) | (seen == by)).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    scored = part.nonzero(as_tuple=True)  # (row, column) of each response token
    logits = model.lm_head(hidden[scored[0], before[scored]])
    return -F.cross_entropy(logits, ids[scored], reduction="none"), part[scored]


def pretrain(model, lesson: Callable[[int], list[Tree]], rng: random.Random, epochs: int) -> None:
    """Plain next-token training on lesson(epoch), four trees a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * math.ceil(len(lesson(0)) / 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.time()
    for epoch in range(epochs):
        trees, losses = lesson(epoch), []
        order = rng.sample(trees, len(trees))
        for start in range(0, len(order), 4):
            loss = -response_log_probs(model, order[start : start + 4])[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch + 1:2}/{epochs}  loss {mean:.4f}  {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[dict]) -> float:
    """In what share of the pairs the chosen response is the likelier one."""
    n_right = 0
    for row in rows:
        tree = encode(tokenizer, row["conversations"], [row["chosen"]["value"], row["rejected"]["value"]])
        log_probs, response = response_log_probs(model, [tree])
        n_right += bool(log_probs[response == 1].sum() > log_probs[response == 2].sum())
    return n_right / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=SAMPLE, help="folder for pairs.jsonl and model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)  # or the order of additions, and so the weights, would depend on the number of cores
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    texts, questions = read_sections("texts.txt"), all_questions(rng)
    rows = make_pairs(questions, texts, rng)
    args.output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.output / "pairs.jsonl").write_text(lines, encoding="utf-8")

    answers = {}  # of each prompt, as JSON: its distinct responses, in a dict, which keeps their order
    for row in rows:
        known = answers.setdefault(json.dumps(row["conversations"]), {})
        known |= dict.fromkeys([row["chosen"]["value"], row["rejected"]["value"]])
    assert len(answers) == len(questions), "two questions are the same"
    tokenizer = make_tokenizer(rows, vocab_size=4096)
    model = make_model(tokenizer)
    trees = [encode(tokenizer, json.loads(prompt), list(answers[prompt])) for prompt in sorted(answers)]
    print(f"{len(rows)} pairs, {len(trees)} prompts; {model.num_parameters() / 1e6:.2f}M parameters")

    def lesson(epoch):
        """First ever new responses to the questions, to learn what can be said; then those of the pairs, by heart."""
        if epoch >= args.epochs // 2:
            return trees
        drawn = [(question, responses(question, texts, rng)) for question in questions]
        return [encode(tokenizer, question.conversations, good + bad) for question, (good, bad) in drawn]

    pretrain(model, lesson, rng, args.epochs)
    folder = args.output / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # what a user gets
    share = accuracy(model, AutoTokenizer.from_pretrained(folder), rows)
    print(f"log π(chosen) > log π(rejected) in {share:.1%} of the pairs")
    if not 0.4 <= share <= 0.6:
        raise SystemExit("the model already has a preference: try another --seed, or more --epochs")


if __name__ == "__main__":
    main()
