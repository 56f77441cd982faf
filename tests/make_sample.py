"""Make docs/sample: a small set of Chinese preference pairs, and a small Qwen2 that has no preference yet.

    uv run tests/make_sample.py

`python dpo_train.py --demo` learns from the two in one to two minutes on a CPU: before, the model answers well
about half the time; afterwards nearly always, also to prompts that it was not trained on. All of it is made for this
project.

1. Questions: written ones (docs/sample/texts.txt) and computed ones (arithmetic and logic, below), each with right
   contents and a wrong one.
2. Responses: good ones answer, politely; bad ones evade, err, or are rude. Their phrases recur over all prompts, so a
   preference learnt on some prompts holds on others.
3. Pairs: (good, bad), in COIG-P's columns.
4. Model: a byte-level BPE with Qwen2's pre-tokenizer, and a Qwen2 that imitates good and bad responses alike.
5. Check: that it is undecided, as a base model should be before DPO.
"""

import argparse
import difflib
import itertools
import json
import math
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
        self.topic = re.search("【(.+?)】", "".join(text for _, text in self.turns)).group(1)
        self.turns = [(role, re.sub("[【】]", "", text)) for role, text in self.turns]

    @property
    def conversations(self) -> list[dict]:
        return [{"from": role, "value": text} for role, text in self.turns]


def read_texts() -> dict[str, str]:
    """texts.txt by section; its head explains the marks."""
    body = (SAMPLE / "texts.txt").read_text(encoding="utf-8").split("---\n", 1)[1]
    sections = (section.split("\n", 1) for section in body.strip().removeprefix("# ").split("\n# "))
    return {name: text.strip() for name, text in sections}


def written_questions(texts: dict[str, str]) -> list[Question]:
    questions = [capital_question(i, *line.split("|")) for i, line in enumerate(texts["capitals"].splitlines())]
    for domain in ("chat", "novel", "role", "code"):
        system = []
        for block in texts[domain].split("\n\n"):
            lines = [(line[0], line[2:]) for line in block.splitlines()]
            if lines[0][0] == "s":
                system = [] if lines[0][1] == "-" else [("system", lines[0][1])]
                continue
            turns = [({"?": "human", "=": "gpt"}[mark], text) for mark, text in lines if mark in "?="]
            right, wrong = [text for mark, text in lines if mark == "+"], [text for mark, text in lines if mark == "-"]
            if domain == "code":
                right, wrong = code_contents(next(text for mark, text in lines if mark == "&"), right, wrong)
            questions.append(Question(domain, system + turns, right, wrong[0]))
    return questions


def capital_question(i: int, country: str, capital: str, fact: str, wrong: str) -> Question:
    before = [("human", "你知道冰岛的首都是哪里吗？"), ("gpt", "是雷克雅未克。")]
    turns = [
        [("human", f"{country}的【首都】是哪里？")],
        [("human", f"请问{country}的【首都】叫什么？")],
        [("human", f"我在准备地理测验，{country}的【首都】是哪座城市？")],
        [*before, ("human", f"那【{country}的首都】呢？")],
    ]
    right = [
        f"{capital}是{country}的首都，{fact}",
        f"答案是{capital}，这座城市{fact}",
        f"{capital}才是{country}的首都，不要和{wrong}记混",
    ]
    return Question("chat", turns[i % 4], right, f"{country}的首都是{wrong}")


def code_contents(given: str, right: list[str], wrong: list[str]) -> tuple[list[str], list[str]]:
    """Puts snippets into words, after running them: the right ones must agree, the wrong one must not."""
    right, wrong = [text.replace(r"\n", "\n") for text in right], wrong[0].replace(r"\n", "\n")
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
        return right, [f"写成这样：\n```python\n{wrong}\n```\n"]
    right = [f"可以写 `{right[0]}`，当 {given} 时结果是 {value!r}", f"用 `{right[1]}`，得到 {value!r}"]
    return right, [f"写 `{wrong}`"]


def math_questions(rng: random.Random) -> list[Question]:
    """Sums and word problems. Every number in an answer is computed."""
    questions = []
    n, digits = rng.randint, "零一二三四五六七八九"

    def ask(question, *contents):
        questions.append(Question("math", as_turns(question), list(contents[:-1]), contents[-1]))

    for _ in range(6):
        a, b = n(13, 89), n(13, 89)
        tens, ones = b // 10 * 10, b % 10
        ask(
            f"这道【加法】怎么算，{a} 加 {b} 等于多少？",
            f"{a} + {b} = {a + b}",
            f"先算 {a} + {tens} = {a + tens}，再加 {ones}，得 {a + b}",
            f"{a} + {b} = {a + b + n(2, 9)}",
        )
    for _ in range(6):
        a, b = n(6, 19), n(4, 9)
        ask(
            f"请算一道【乘法】：{a} 乘以 {b}。",
            f"{a} × {b} = {a * b}",
            f"答案是 {a * b}，因为 {b} 个 {a} 相加就是 {a * b}",
            f"{a} × {b} = {a * b - n(2, 5)}",
        )
    for thing, unit in (("铅笔", "支"), ("鸡蛋", "个"), ("饼干", "块"), ("橘子", "个"), ("彩纸", "张")):
        a, b, c = n(4, 9), n(6, 12), n(2, 15)
        ask(
            f"每盒{thing}有 {b} {unit}，买 {a} 盒，用掉 {c} {unit}，【{thing}】还剩多少？",
            f"一共 {a} × {b} = {a * b} {unit}，用掉 {c} {unit}，还剩 {a * b - c} {unit}",
            f"还剩 {a * b - c} {unit}，算式是 {a} × {b} - {c} = {a * b - c}",
            f"{thing}还剩 {a * b + c} {unit}",
        )
    for thing, unit in (("笔记本", "本"), ("牛奶", "瓶"), ("面包", "个"), ("雨伞", "把"), ("毛巾", "条")):
        price, count = n(4, 15), n(2, 5)
        cost = price * count
        ask(
            f"一{unit}{thing} {price} 元，买 {count} {unit}，付了 100 元，应该【找零】多少？",
            f"一共花 {price} × {count} = {cost} 元，找回 {100 - cost} 元",
            f"应找 {100 - cost} 元，因为 100 - {cost} = {100 - cost}",
            f"找回 {100 - price} 元",
        )
    for vehicle, slowest in (("汽车", 60), ("火车", 110), ("轮船", 30), ("骑自行车", 12), ("步行", 4)):
        speed, hours = slowest + n(0, 3), n(2, 6)
        ask(
            f"{vehicle}每小时走 {speed} 千米，{hours} 小时的【路程】是多少？",
            f"路程 = 速度 × 时间 = {speed} × {hours} = {speed * hours} 千米",
            f"每小时 {speed} 千米，{hours} 小时就走 {speed * hours} 千米",
            f"一共走 {speed + hours} 千米",
        )
    for thing in ("外套", "书包", "台灯", "球鞋", "水壶"):
        price, off = n(4, 30) * 10, n(6, 9)
        now = price * off // 10
        ask(
            f"{thing}原价 {price} 元，打 {off} 折以后，【现价】是多少？",
            f"{off} 折就是原价的十分之{digits[off]}，{price} × 0.{off} = {now} 元",
            f"现价 {now} 元，便宜了 {price - now} 元",
            f"现价 {price - off} 元",
        )
    for place in ("菜园", "教室", "操场", "画框", "鱼塘", "院子"):
        unit = "分米" if place == "画框" else "米"
        a, b = n(8, 20), n(3, 7)
        ask(
            f"长方形{place}长 {a} {unit}，宽 {b} {unit}，【面积】和周长各是多少？",
            f"面积 {a} × {b} = {a * b} 平方{unit}，周长 2 × ({a} + {b}) = {2 * (a + b)} {unit}",
            f"周长是 {2 * (a + b)} {unit}，面积是 {a * b} 平方{unit}",
            f"面积 {a + b} 平方{unit}，周长也是 {a + b} {unit}",
        )
    for who in ("小红", "小刚", "小丽", "小军"):
        mean, d, e = n(80, 92), n(1, 6), n(1, 6)
        x, y, z = mean - d, mean + d + e, mean - e
        ask(
            f"{who}三次测验得了 {x}、{y}、{z} 分，【平均分】是多少？",
            f"总分 {x + y + z}，除以 3，平均 {mean} 分",
            f"平均分是 {mean} 分，因为三次一共 {3 * mean} 分",
            f"平均分是 {y} 分",
        )
    for _ in range(5):
        whole, tenths = n(2, 12) * 20, n(2, 9)
        ask(
            f"{whole} 的百分之{digits[tenths]}十是多少？请讲讲【百分数】。",
            f"{whole} × {tenths}0% = {whole * tenths // 10}",
            f"答案是 {whole * tenths // 10}，先求十分之一是 {whole // 10}，再乘 {tenths}",
            f"{whole} 的 {tenths}0% 是 {whole + tenths * 10}",
        )
    for _ in range(4):
        hens, rabbits = n(3, 9), n(2, 7)
        heads, feet = hens + rabbits, 2 * hens + 4 * rabbits
        ask(
            f"【鸡兔同笼】，共 {heads} 个头，{feet} 只脚，鸡和兔各几只？",
            f"假设全是鸡，有 {2 * heads} 只脚，多出 {feet - 2 * heads} 只，所以兔 {rabbits} 只，鸡 {hens} 只",
            f"鸡 {hens} 只，兔 {rabbits} 只，验算 2 × {hens} + 4 × {rabbits} = {feet}",
            f"鸡 {hens + 2} 只，兔 {rabbits + 1} 只",
        )
    for a, b in ((2, 3), (3, 4), (3, 5), (2, 5)):
        g = n(2, 6)
        assert math.gcd(g * a, g * b) == g
        ask(
            f"{g * a} 和 {g * b} 的【最大公约数】和最小公倍数是多少？",
            f"最大公约数是 {g}，最小公倍数是 {g * a * b}",
            f"{g * a} = {g} × {a}，{g * b} = {g} × {b}，所以公约数 {g}，公倍数 {g * a * b}",
            f"最大公约数是 {g + 1}，最小公倍数是 {g * a + g * b}",
        )
    for book in ("小说", "诗集", "游记", "画册"):
        pages, daily = n(90, 240), n(12, 25)
        days = math.ceil(pages / daily)
        ask(
            f"一本{book}有 {pages} 页，每天读 {daily} 页，这个【阅读计划】要几天完成？",
            f"{pages} ÷ {daily} 约等于 {pages / daily:.1f}，所以要 {days} 天",
            f"要 {days} 天，前 {days - 1} 天只能读 {daily * (days - 1)} 页",
            f"{days + 3} 天",
        )
    for who, parent in (("小雨", "妈妈"), ("小林", "爸爸"), ("小雪", "外婆"), ("小宇", "爷爷")):
        age, years = n(6, 12), n(3, 9)
        gap = n(24, 30) if parent in ("妈妈", "爸爸") else n(52, 60)
        ask(
            f"{who}今年 {age} 岁，{parent}比{who}大 {gap} 岁，{years} 年后{parent}的【年龄】是多少？",
            f"{parent}今年 {age} + {gap} = {age + gap} 岁，{years} 年后是 {age + gap + years} 岁",
            f"{age + gap + years} 岁，年龄差不变，{age + years} + {gap} = {age + gap + years}",
            f"{parent} {gap + years} 岁",
        )
    for film in ("电影", "话剧", "音乐会", "球赛"):
        hour, minute, took = n(7, 10), n(1, 5) * 10, n(7, 13) * 10 + 5
        end = hour * 60 + minute + took
        ask(
            f"{film} {hour} 点 {minute} 分开始，一共 {took} 分钟，【结束时间】是几点几分？",
            f"结束时是 {end // 60} 点 {end % 60} 分",
            f"{minute} + {took} = {minute + took} 分钟，满六十进一，所以是 {end // 60} 点 {end % 60} 分",
            f"{hour + 3} 点 {minute} 分",
        )
    for _ in range(5):
        a, b, c = n(11, 40), n(11, 40), n(5, 9)
        ask(
            [f"{a} 加 {b} 等于多少？", f"等于 {a + b}。", f"再减去 {c}，【结果】呢？"],
            f"{a + b} - {c} = {a + b - c}",
            f"结果是 {a + b - c}，用刚才的 {a + b} 减去 {c}",
            f"结果是 {a + b + c}",
        )
    ask("【长度换算】：3 千米等于多少米？", "3 千米 = 3 × 1000 = 3000 米", "1 千米是 1000 米，所以是 3000 米", "300 米")
    ask("【时间换算】：2.5 小时是多少分钟？", "2.5 × 60 = 150 分钟", "两小时 120 分钟，再加 30 分钟", "250 分钟")
    ask("【重量换算】：4 千克是多少克？", "4 × 1000 = 4000 克", "一千克是 1000 克，四千克就是 4000 克", "400 克")
    ask("【一周的小时数】是多少？", "7 × 24 = 168 小时", "每天 24 小时，七天共 168 小时", "七十小时")
    ask("三角形的【内角和】是多少度？", "三角形的内角和是 180 度", "180 度，剪下三个角能拼成一个平角", "360 度")
    ask("1 到 10 的【总和】是多少？", "1 + 2 + … + 10 = 55", "首尾配对，11 × 5 = 55", "1 到 10 加起来是 50")
    return questions


def logic_questions(rng: random.Random) -> list[Question]:
    """If-then, order, classes, sequences, weekdays, compass, liars and the odd one out; solved, where it can be."""
    questions = []

    def ask(question, *contents):
        questions.append(Question("logic", as_turns(question), list(contents[:-1]), contents[-1]))

    for p, q, not_p, not_q, topic in (
        ("今天下雨", "运动会取消", "今天没有下雨", "运动会没有取消", "运动会"),
        ("红灯亮", "车要停下", "红灯没亮", "车不用停下", "红灯"),
        ("猫在屋里", "狗会叫", "猫不在屋里", "狗没有叫", "猫和狗"),
        ("他拿到钥匙", "门能打开", "他没有拿到钥匙", "门打不开", "钥匙"),
        ("水烧开了", "壶会响", "水没有烧开", "壶没有响", "水壶"),
        ("小美去聚会", "小强去聚会", "小美没去聚会", "小强没去聚会", "聚会"),
    ):
        rule = f"规则：如果{p}，那么{q}。"
        ask(
            f"{rule}已知{p}，关于【{topic}】能推出什么？",
            f"能推出{q}，前提成立，结论就成立",
            f"{q}，因为规则的条件已经满足",
            f"推出{not_q}",
        )
        ask(
            f"{rule}已知{not_q}，关于【{topic}】能推出什么？",
            f"能推出{not_p}，不然就会得到{q}",
            f"{not_p}，否定了结论就否定了前提",
            f"推出{p}",
        )
        ask(
            f"{rule}已知{q}，能断定{p}吗？请说说【{topic}】。",
            f"不能断定，{q}也可能有别的原因",
            f"不一定，规则只说{p}时{q}，没有反过来说",
            f"一定是{p}",
        )
    names = ["小明", "小红", "小刚", "小丽", "小军", "小雨", "阿宁", "阿成"]
    for more, most, least in (
        ("高", "最高", "最矮"),
        ("年长", "最年长", "最年轻"),
        ("跑得快", "跑得最快", "跑得最慢"),
        ("起得早", "起得最早", "起得最晚"),
        ("重", "最重", "最轻"),
        ("住得远", "住得最远", "住得最近"),
    ):
        for word, place in ((most, 0), (least, 2)):
            a, b, c = rng.sample(names, 3)
            who, facts = (a, b, c)[place], [f"{a}比{b}{more}", f"{b}比{c}{more}"]
            rng.shuffle(facts)
            ask(
                f"{facts[0]}，{facts[1]}，三人里【谁{word}】？",
                f"{word}的是{who}，顺序是{a}、{b}、{c}",
                f"由两个条件排出{a}、{b}、{c}，所以{who}{word}",
                f"{b}{word}",
            )
    for whole, part, one, trait in (
        ("鸟", "麻雀", "窗外那只麻雀", "有羽毛"),
        ("金属", "铜", "这根铜线", "能导电"),
        ("植物", "竹子", "院里的竹子", "需要水"),
        ("昆虫", "蝴蝶", "这只蝴蝶", "有六条腿"),
        ("哺乳动物", "鲸", "这头鲸", "用肺呼吸"),
        ("三角形", "等边三角形", "黑板上的等边三角形", "有三条边"),
    ):
        ask(
            f"所有{whole}都{trait}，所有{part}都是{whole}，那么【{one}】{trait}吗？",
            f"是的，{one}属于{whole}，所以{trait}",
            f"{part}都是{whole}，{whole}都{trait}，所以它也{trait}",
            f"{one}不一定{trait}，跟前面没有关系",
        )
    for sequence, why in (
        ([2, 5, 8, 11, 14, 17], "每次加 3"),
        ([6, 10, 14, 18, 22, 26], "每次加 4"),
        ([50, 43, 36, 29, 22, 15], "每次减 7"),
        ([2, 4, 8, 16, 32, 64], "每次乘 2"),
        ([3, 9, 27, 81, 243, 729], "每次乘 3"),
        ([1, 4, 9, 16, 25, 36], "第几个数就是几的平方"),
        ([1, 1, 2, 3, 5, 8], "每个数是前两个数的和"),
    ):
        *shown, after = sequence
        ask(
            f"【找规律】：{'，'.join(map(str, shown))}，下一个数是什么？",
            f"下一个数是 {after}，规律是{why}",
            f"{why}，所以接着是 {after}",
            f"下一个数是 {shown[-1] + 1}",
        )
    days = "一二三四五六日"
    for today, later in ((0, 10), (2, 15), (4, 20), (5, 30), (1, 100)):
        then = days[(today + later) % 7]
        ask(
            f"今天星期{days[today]}，{later} 天后是【星期几】？",
            f"{later} 除以 7 余 {later % 7}，往后数 {later % 7} 天，是星期{then}",
            f"是星期{then}，七天一轮，只看余数 {later % 7}",
            f"是星期{days[(today + later + 3) % 7]}",
        )
    compass = "北东南西"
    for start, moves in ((0, "右右"), (1, "左"), (2, "右左左"), (3, "右右右"), (0, "左左右")):
        end = (start + moves.count("右") - moves.count("左")) % 4
        ask(
            f"我面向{compass[start]}，{'，'.join(f'向{m}转' for m in moves)}，现在的【方向】是哪边？",
            f"现在面向{compass[end]}，一步一步转过去就知道了",
            f"先把左右抵消，再数剩下的，结果是面向{compass[end]}",
            f"面向{compass[end - 1]}",
        )
    claims = {
        "对方在说谎": lambda me, other: not other,
        "对方说真话": lambda me, other: other,
        "我们至少有一个说谎": lambda me, other: not (me and other),
        "我们说的一真一假": lambda me, other: me != other,
    }
    riddles = []
    for (said_by_a, claim_a), (said_by_b, claim_b) in itertools.product(claims.items(), repeat=2):
        worlds = itertools.product([True, False], repeat=2)
        worlds = [(a, b) for a, b in worlds if a == claim_a(a, b) and b == claim_b(b, a)]
        if len(worlds) == 1:
            riddles.append((said_by_a, said_by_b, worlds[0]))
    for said_by_a, said_by_b, world in riddles[:6]:
        a, b = ("说真话" if honest else "说谎" for honest in world)
        ask(
            f"甲说：“{said_by_a}。”乙说：“{said_by_b}。”每人要么全真要么全假，【谁在说谎】？",
            f"甲{a}，乙{b}，只有这种情况不矛盾",
            f"逐一试四种情况，只剩甲{a}、乙{b}",
            f"甲{'说谎' if world[0] else '说真话'}，乙也一样",
        )
    for four, odd, kind in (
        ("苹果、香蕉、白菜、葡萄", "白菜", "水果"),
        ("铅笔、橡皮、尺子、勺子", "勺子", "文具"),
        ("老虎、狮子、鲨鱼、大象", "鲨鱼", "陆地动物"),
        ("小提琴、二胡、鼓、吉他", "鼓", "弦乐器"),
        ("春天、夏天、早晨、冬天", "早晨", "季节"),
        ("3、5、9、11", "9", "质数"),
    ):
        ask(
            f"【找不同】：{four}，哪个和别的不一样？",
            f"{odd}不一样，其余三个都是{kind}",
            f"三个是{kind}，只有{odd}不是",
            f"{four.split('、')[0]}不一样",
        )
    ask(
        ["甲比乙早到，乙比丙早到。", "明白，从早到晚是甲、乙、丙。", "丁比甲还早，【谁最后】到？"],
        "最后到的是丙，顺序是丁、甲、乙、丙",
        "丁排到最前，末尾不变，还是丙",
        "丁最后到",
    )
    return questions


def as_turns(texts: str | list[str]) -> list[tuple[str, str]]:
    texts = [texts] if isinstance(texts, str) else texts
    return list(zip(itertools.cycle(["human", "gpt"]), texts, strict=False))


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

    bad = []
    for start, more, like in zip(
        [
            rng.choice(phrases("evade")).format(t=question.topic),
            rng.choice(phrases("rude")).format(t=question.topic),
            rng.choice(phrases("err")) + sentence(question.wrong),
        ],
        [phrases("evade more"), phrases("rude more"), phrases("err more")],
        rng.sample(good, 3),
        strict=True,
    ):
        # Of some ways to go on, the one that makes it as long as a good response: length must not tell them apart.
        tails = ["", *rng.sample(phrases("tails"), 4)]
        ways = ["".join(rng.sample(more, k)) + tail for k in range(4) for tail in tails]
        bad.append(start + min(ways, key=lambda way: abs(len(start + way) - len(like))))  # noqa: B023 - used at once
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
        rows += [
            {
                "conversations": question.conversations,
                "chosen": {"from": "gpt", "value": chosen},
                "rejected": {"from": "gpt", "value": rejected},
                "domain": question.domain,
            }
            for chosen, rejected in picked
        ]
    rng.shuffle(rows)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model

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


@dataclass(frozen=True)
class Tree:
    """The token ids of a prompt, and of each of its responses."""

    prompt: list[int]
    responses: list[list[int]]

    def __len__(self):
        return len(self.prompt) + sum(map(len, self.responses))


def encode(tokenizer, conversations: list[dict], responses: list[str]) -> Tree:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversations]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return Tree(prompt, [tokenizer(text + "<|im_end|>")["input_ids"] for text in responses])


def response_log_probs(model, trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each response token's log-probability, and which of the batch's responses it belongs to.

    A row is a prompt and all its responses: each of these sees the prompt and itself, and stands right behind the
    prompt. That halves the work of a row a response.
    """
    length = max(map(len, trees))
    ids, positions = torch.zeros(2, len(trees), length, dtype=torch.long)
    branch = torch.full((len(trees), length), -1)  # 0 is the prompt, k its k-th response, -1 padding
    predictors, targets, owners, n_responses = [], [], [], 0
    for row, tree in enumerate(trees):
        start = 0
        for k, part in enumerate([tree.prompt, *tree.responses]):
            where = slice(start, start + len(part))
            ids[row, where] = torch.tensor(part)
            positions[row, where] = torch.arange(len(part)) + (len(tree.prompt) if k else 0)
            branch[row, where] = k
            if k:
                before = [len(tree.prompt) - 1, *range(start, start + len(part) - 1)]
                predictors += [row * length + i for i in before]
                targets += part
                owners += [n_responses] * len(part)
                n_responses += 1
            start += len(part)
    seen, by = branch[:, None, :], branch[:, :, None]
    sees = ((seen == 0) | (seen == by)) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[predictors])
    return -F.cross_entropy(logits, torch.tensor(targets), reduction="none"), torch.tensor(owners)


def pretrain(model, lesson, rng: random.Random, epochs: int, batch_size: int, learning_rate: float) -> float:
    """Plain next-token training on lesson(epoch), a list of trees. Returns the last epoch's mean loss a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * math.ceil(len(lesson(0)) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.time()
    for epoch in range(epochs):
        trees = lesson(epoch)
        order = rng.sample(trees, len(trees))
        total = tokens = 0
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            log_probs, _ = response_log_probs(model, batch)
            (-log_probs.mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, tokens = total - log_probs.sum().item(), tokens + len(log_probs)
        print(f"epoch {epoch + 1:2}/{epochs}  loss {total / tokens:.4f}  {time.time() - began:.0f} s", flush=True)
    return total / tokens


# ----------------------------------------------------------------------------------------------------------------------
# 5. Check


@torch.no_grad()
def response_scores(model, trees: list[Tree]) -> list[list[float]]:
    """log π(response | prompt), for each tree's responses."""
    scores = []
    for tree in trees:
        log_probs, owners = response_log_probs(model, [tree])
        scores.append(torch.zeros(len(tree.responses)).index_add(0, owners, log_probs).tolist())
    return scores


@torch.no_grad()
def greedy_answer(model, tokenizer, conversations: list[dict]) -> str:
    ids = torch.tensor([encode(tokenizer, conversations, []).prompt])
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(ids, do_sample=False, max_new_tokens=128, eos_token_id=stop, pad_token_id=stop)
    return tokenizer.decode(out[0, ids.shape[1] :])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=SAMPLE, help="folder for pairs.jsonl and model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)  # or the order of additions, and so the weights, would depend on the number of cores
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    texts = read_texts()
    questions = written_questions(texts) + math_questions(rng) + logic_questions(rng)
    rows = make_pairs(questions, texts, rng)
    args.output.mkdir(parents=True, exist_ok=True)
    pairs_file = args.output / "pairs.jsonl"
    pairs_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    verdicts = {}  # prompt (as JSON) -> response -> whether it is good
    for row in rows:
        known = verdicts.setdefault(json.dumps(row["conversations"]), {})
        known |= {row["chosen"]["value"]: True, row["rejected"]["value"]: False}
    assert len(verdicts) == len(questions), "two questions are the same"
    prompts = sorted(verdicts)
    n_good, n_all = sum(sum(known.values()) for known in verdicts.values()), sum(map(len, verdicts.values()))
    longer = sum(len(row["chosen"]["value"]) > len(row["rejected"]["value"]) for row in rows) / len(rows)
    print(f"{len(rows)} pairs, {len(prompts)} prompts, {n_good} good and {n_all - n_good} bad responses")
    print(f"{pairs_file.stat().st_size / 1e6:.2f} MB; the good response is the longer one in {longer:.1%} of the pairs")

    tokenizer = make_tokenizer(rows, vocab_size=4096)
    trees = [encode(tokenizer, json.loads(prompt), list(verdicts[prompt])) for prompt in prompts]
    lengths = sorted(len(tree.prompt) + len(response) for tree in trees for response in tree.responses)
    model = Qwen2ForCausalLM(
        Qwen2Config(
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
    )
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary")
    print(f"prompt and response: {lengths[len(lengths) // 2]} tokens in the median, {lengths[-1]} at most")

    def lesson(epoch):
        """First ever new responses to the questions, to learn what can be said; then those of the pairs, by heart."""
        if epoch >= args.epochs // 2:
            return trees
        drawn = [(question, responses(question, texts, rng)) for question in questions]
        return [encode(tokenizer, question.conversations, good + bad) for question, (good, bad) in drawn]

    loss = pretrain(model, lesson, rng, args.epochs, batch_size=4, learning_rate=3e-3)

    folder = args.output / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # From here on with what a user gets.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = {}
    for prompt, of_prompt in zip(prompts, response_scores(model, trees), strict=True):
        scores[prompt] = dict(zip(verdicts[prompt], of_prompt, strict=True))

    def accuracy(chosen_prompts):
        right = []
        for row in rows:
            if (prompt := json.dumps(row["conversations"])) in chosen_prompts:
                right.append(scores[prompt][row["chosen"]["value"]] > scores[prompt][row["rejected"]["value"]])
        return sum(right) / len(right)

    tenths = [accuracy(rng.sample(prompts, len(prompts) // 10)) for _ in range(5)]
    print(f"final loss {loss:.4f} a token")
    print(f"log π(chosen) > log π(rejected) in {accuracy(prompts):.1%} of the pairs; of five tenths of the prompts:")
    print(f"  {', '.join(f'{tenth:.1%}' for tenth in tenths)}")
    asked = rng.sample(prompts, 60)
    greedy_good = 0
    for prompt in asked:
        answer = greedy_answer(model, tokenizer, json.loads(prompt)).removesuffix("<|im_end|>")
        alike = {text: difflib.SequenceMatcher(None, text, answer, autojunk=False).ratio() for text in verdicts[prompt]}
        greedy_good += verdicts[prompt][max(alike, key=alike.get)]
    print(f"greedy answers to {len(asked)} prompts: {greedy_good} are like a good response, the others like a bad one")
    if not 0.4 <= accuracy(prompts) <= 0.6:
        raise SystemExit("the model already has a preference: try another --seed, or more --epochs")


if __name__ == "__main__":
    main()
