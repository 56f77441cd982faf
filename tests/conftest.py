"""A throwaway model and data for the tests: random weights, a byte-level BPE trained in-process, no network.

Libraries are imported where they are used: pytest's first process, which only hands out tests, does without them.
"""

import gc
import json
import os
import random
from pathlib import Path

import pytest

os.environ.pop("PYTHONUNBUFFERED", None)  # most users' machines don't set it
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the scripts that tests start would compile all libraries every time
os.environ["OMP_NUM_THREADS"] = "1"  # of torch: the fastest for models of this size, and the same on every machine

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "天地人你我他山水火木金土大小多少高低远近红绿白好坏快慢来去上下左右中外东西南北春夏秋冬风花雪月"


def make_tokenizer():
    """ChatML over byte-level BPE; as in Qwen2.5, "!" has id 0 and the eos is not the template's end-of-turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r"\s*[\r\n]+|\s+(?!\S)|\s+|[^\s]+", "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = ["!", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"!"})]
    text = ["\n\n".join(random.Random(i).choices(WORDS, k=30)) for i in range(50)] + ["user assistant system helpful"]
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def tiny_qwen2(vocab_size: int, seed: int = 0):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def write_model(folder: Path, tokenizer) -> Path:
    """A model's folder, weights stored in bf16 as Qwen2.5's are; it likes to sample and to avoid repetitions."""
    model = tiny_qwen2(len(tokenizer)).bfloat16()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


def make_rows(n_prompts: int = 24, seed: int = 0) -> list[dict]:
    """COIG-P's columns and shape: 4 responses to a prompt, each in several pairs."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for i in range(n_prompts):
        prompt, good, bad = text(3, 12), [text(2, 15) + "!" for _ in range(2)], [text(2, 15) for _ in range(2)]
        for chosen, rejected in [(g, b) for g in good for b in bad][: rng.randint(1, 4)]:
            rows.append(
                {
                    "conversations": [{"from": "human", "value": prompt}],
                    "chosen": {"from": "gpt", "value": chosen},
                    "rejected": {"from": "gpt", "value": rejected},
                    "domain": ("chat", "math")[i % 2],
                }
            )
    return rows


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(60))


@pytest.fixture(scope="session")
def small_data_file(tmp_path_factory) -> Path:
    """The pairs of trl_losses.json."""
    return write_jsonl(tmp_path_factory.mktemp("small") / "pairs.jsonl", make_rows())


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection():
    """Each run collects garbage: half a second, if all that the libraries have made by now is looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """The longest files first: two processes share the files."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_train.py"))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="how often test_train.py kills a run")
    parser.addoption("--slow", action="store_true", help="also the tests of half a minute and more")


@pytest.fixture
def slow(pytestconfig):
    if not pytestconfig.getoption("slow"):
        pytest.skip("slow: --slow runs it")
