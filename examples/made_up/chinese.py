"""Bundled everyday conversations in Chinese, generated: deterministic for a seed, no network.

A row has one user turn, or two with the assistant's answer in between. What they are about (cities, people, dishes,
goods, worries, ...) is split: the words of `TEST` occur in no training row, and each test row has at least one of them.
Names of shops, streets and the like are invented anew in each row.
"""

import json
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass

from .values import records, words

Turns = tuple[list[str], str]  # what was said before, the user first and last, and the answer


@dataclass(frozen=True)
class Terms:
    """What a split's rows are about.

    Args:
        cities, people, dishes, goods, places, jobs, hobbies (`list[str]`): Names and nouns.
        reasons (`list[str]`): Why one is absent.
        worries (`list[list[str]]`): What went wrong, how one feels, what may help.
        recipes (`list[list[str]]`): Dish, main ingredient, second ingredient, last step.
    """

    cities: list[str]
    people: list[str]
    dishes: list[str]
    goods: list[str]
    places: list[str]
    jobs: list[str]
    hobbies: list[str]
    reasons: list[str]
    worries: list[list[str]]
    recipes: list[list[str]]


TRAIN = Terms(
    cities=words("北京 上海 广州 深圳 杭州 南京 苏州 成都 重庆 武汉 长沙 郑州 天津 青岛 大连 厦门 福州 昆明 贵阳 南宁"),
    people=words(
        "王芳 李娜 张伟 刘洋 陈静 杨帆 赵磊 黄丽 周杰 吴敏 徐强 孙燕 马超 朱琳 胡军 郭涛 何雪 高峰 林小雨 罗文 "
        "梁晨 宋佳 郑爽 谢明 韩冰 唐华 冯刚 于洁 董建 程亮"
    ),
    dishes=words("火锅 烤鸭 小笼包 米粉 热干面 煎饼 馄饨 酸菜鱼 麻辣烫 臭豆腐 肠粉 生煎 凉皮 豆花 烧烤"),
    goods=words("手机 耳机 雨伞 台灯 书包 水杯 键盘 球鞋 外套 电饭锅 吹风机 自行车 行李箱 沙发 手表 窗帘"),
    places=words("火车站 图书馆 人民公园 博物馆 体育馆 电影院 大学 医院 商场 机场 书店 咖啡馆 植物园 市政府"),
    jobs=words("老师 医生 工程师 会计 司机 厨师 律师 记者 护士 设计师 警察 翻译"),
    hobbies=words("跑步 画画 看书 游泳 摄影 下棋 唱歌 爬山 钓鱼 做饭 打篮球 弹钢琴"),
    reasons=words("感冒发烧 家里有事 要去看牙 孩子生病 参加婚礼 车坏了 要搬家 回老家 陪父母体检 参加考试"),
    worries=records(
        """
        考试没考好/难过/找出不会的题目，一点一点补上
        和同事吵架了/生气/等冷静下来，再心平气和地谈一谈
        晚上总是睡不着/疲惫/睡前少看屏幕，早一点关灯
        工作压力太大/焦虑/把事情列成清单，先做最要紧的
        一个人在外地/孤单/周末约朋友出去走走
        和男朋友分手了/伤心/给自己一点时间，多陪陪家人
        面试又失败了/失望/总结经验，为下一次做好准备
        孩子不愿意上学/担心/先听听孩子怎么说
        体重一直降不下来/沮丧/每天多走一些路，晚饭少吃一点
        丢了钱包/着急/先挂失银行卡，再去报案
        """
    ),
    recipes=records(
        """
        番茄炒蛋/番茄/鸡蛋/加一点糖
        红烧肉/五花肉/酱油/小火炖一个小时
        麻婆豆腐/豆腐/肉末/撒上花椒粉
        蒸鱼/鲈鱼/姜丝/淋上热油
        土豆丝/土豆/青椒/加一勺醋
        蛋炒饭/米饭/火腿/撒上葱花
        鸡汤/母鸡/红枣/慢慢煮两个小时
        凉拌黄瓜/黄瓜/大蒜/淋上香油
        """
    ),
)
TEST = Terms(
    cities=words("西安 哈尔滨 拉萨 三亚 桂林 洛阳"),
    people=words("欧阳倩 邓超然 曹颖 彭浩 曾莉 萧山青 田园 袁梦"),
    dishes=words("羊肉泡馍 锅包肉 螺蛳粉 胡辣汤 担担面"),
    goods=words("相机 毛衣 洗衣机 帐篷 拼图"),
    places=words("天文台 码头 动物园 古城墙 美术馆"),
    jobs=words("飞行员 邮递员 木匠 兽医"),
    hobbies=words("滑雪 书法 种花 骑马"),
    reasons=words("航班取消 脚扭伤了 要修水管 领取证件"),
    worries=records(
        """
        养的小狗走丢了/心慌/在小区里贴寻狗启事，再问问邻居
        论文被退回来了/灰心/按审稿意见逐条修改
        嗓子哑了说不出话/烦躁/多喝温开水，这几天少讲话
        合租室友总是不打扫/郁闷/一起定一张值日表
        """
    ),
    recipes=records(
        """
        糖醋排骨/排骨/冰糖/大火收汁
        紫菜汤/紫菜/虾皮/滴几滴麻油
        南瓜粥/南瓜/小米/焖一刻钟
        """
    ),
)
DAYS = words("星期一 星期二 星期三 星期四 星期五 星期六 星期天")
HOURS = words("早上八点 上午九点 上午十点 中午十二点 下午两点 下午三点 下午四点 傍晚六点 晚上七点 晚上八点")
WEATHER = records(
    """
    下雨/带一把伞
    晴天/戴一顶帽子
    下雪/穿防滑的鞋
    大风/系一条围巾
    阴天/多带一件衣服
    """
)
ROUTES = records(
    """
    地铁/又快又不堵车
    公交车/便宜，还能看看街景
    出租车/方便，但是要贵一些
    """
)


def flatten(terms: Terms) -> list[str]:
    """All words of a split."""
    parts = [part for value in astuple(terms) for part in value]
    return [text for part in parts for text in ([part] if isinstance(part, str) else part)]


HELD_OUT = flatten(TEST)
NAME_CHARACTERS = sorted(set("".join(HELD_OUT)) - set("".join(flatten(TRAIN))))


def make_name(rng: random.Random) -> str:
    """An invented name, which can only be copied.

    It is made of characters that only held-out words have: so a model knows each of them, but not the words.
    """
    return "".join(rng.choice(NAME_CHARACTERS) for _ in range(rng.randint(2, 3)))


def recommend_food(rng: random.Random, terms: Terms) -> Turns:
    city, dish, place = rng.choice(terms.cities), rng.choice(terms.dishes), rng.choice(terms.places)
    name = make_name(rng)
    question = rng.choice(
        ("我在{}的{}附近，想吃{}，听说{}餐馆不错，是吗？", "第一次来{}，住在{}旁边，想吃{}，去{}餐馆好吗？")
    )
    return (
        [question.format(city, place, dish, name)],
        f"想在{city}吃{dish}，可以到{place}附近的{name}餐馆。最好早点去，人多的时候要排队。",
    )


def accept_invitation(rng: random.Random, terms: Terms) -> Turns:
    person, day, hour = rng.choice(terms.people), rng.choice(DAYS), rng.choice(HOURS)
    place = f"{rng.choice(terms.places)}旁边的{make_name(rng)}茶馆"
    if rng.random() < 0.5:
        answer = f"{person}，你好！谢谢你的邀请，{day}{hour}我一定到{place}，到时候见。"
        return [f"{person}约我{day}{hour}在{place}见面，帮我回复说我去。"], answer
    answer = f"{person}，你好！谢谢你的邀请，可惜{day}{hour}我有别的安排，不能去{place}了，下次再约吧。"
    return [f"{person}约我{day}{hour}在{place}见面，帮我回复说我去不了。"], answer


def dress(rng: random.Random, terms: Terms) -> Turns:
    city, day, degrees = rng.choice(terms.cities), rng.choice(DAYS), rng.randint(1, 36)
    weather, advice = rng.choice(WEATHER)
    clothes = "厚外套" if degrees < 10 else "薄外套" if degrees < 22 else "短袖"
    return (
        [f"{day}我要去{city}，天气预报说{degrees}度，{weather}，穿什么好？"],
        f"{day}{city}{degrees}度，建议穿{clothes}。因为{weather}，出门记得{advice}。",
    )


def ask_for_leave(rng: random.Random, terms: Terms) -> Turns:
    person, reason = rng.choice(terms.people), rng.choice(terms.reasons)
    day, number = rng.choice(DAYS), rng.randint(2, 9)
    return (
        [f"我{reason}，帮我写一条消息，向{person}从{day}起请{number}天假。"],
        f"{person}，您好！我因为{reason}，想从{day}起请假{number}天，回来以后会把工作补上。请您批准，谢谢！",
    )


def comfort(rng: random.Random, terms: Terms) -> Turns:
    trouble, feeling, advice = rng.choice(terms.worries)
    question = rng.choice((f"最近{trouble}，心里很{feeling}。", f"我{trouble}，觉得很{feeling}，怎么办？"))
    return [question], f"听到你{trouble}，我能理解你现在很{feeling}。你可以试着{advice}。慢慢来，一切都会好起来的。"


def find_way(rng: random.Random, terms: Terms) -> Turns:
    city, start, end = rng.choice(terms.cities), rng.choice(terms.places), f"{make_name(rng)}路"
    route, reason = rng.choice(ROUTES)
    return (
        [f"在{city}，从{start}到{end}怎么走？", "你想坐地铁、公交车还是出租车？", f"坐{route}吧。"],
        f"好的，从{start}坐{route}到{end}就可以了。在{city}坐{route}{reason}。",
    )


def compare_prices(rng: random.Random, terms: Terms) -> Turns:
    city, thing = rng.choice(terms.cities), rng.choice(terms.goods)
    first, second = make_name(rng), make_name(rng)
    low, high = sorted(rng.sample(range(20, 999), 2))
    prices = rng.sample([(first, low), (second, high)], 2)
    said = "，".join(f"在{name}店卖{price}元" for name, price in prices)
    return (
        [f"我在{city}想买{thing}，{said}，在哪里买更便宜？"],
        f"在{first}店买更便宜，{thing}只要{low}元，而{second}店要{high}元。",
    )


def introduce(rng: random.Random, terms: Terms) -> Turns:
    person, city, job = rng.choice(terms.people), rng.choice(terms.cities), rng.choice(terms.jobs)
    hobby, age, name = rng.choice(terms.hobbies), rng.randint(20, 59), make_name(rng)
    return (
        [f"我叫{person}，网名是{name}，{age}岁，在{city}当{job}，喜欢{hobby}，帮我写一段自我介绍。"],
        f"大家好，我叫{person}，你们也可以叫我{name}。我今年{age}岁，在{city}做{job}，平时喜欢{hobby}。",
    )


def remember(rng: random.Random, terms: Terms) -> Turns:
    person, thing, place = rng.choice(terms.people), rng.choice(terms.goods), rng.choice(terms.places)
    name = make_name(rng)
    fact, question, answer = rng.choice(
        (
            (f"我把{thing}放在{place}了", f"我把{thing}放在哪里了？", f"你把{thing}放在{place}了。"),
            (f"我把{thing}借给{person}了", "我把东西借给谁了？", f"你把{thing}借给{person}了。"),
            (f"我在{place}的暗号是{name}", "我的暗号是什么？", f"你在{place}的暗号是{name}。"),
            (f"{person}的网名是{name}", f"{person}的网名是什么？", f"{person}的网名是{name}。"),
        )
    )
    return [f"请记住：{fact}。", "好的，我记住了。", question], answer


def cook(rng: random.Random, terms: Terms) -> Turns:
    dish, main, second, last = rng.choice(terms.recipes)
    person = rng.choice(terms.people)
    return (
        [f"{person}想吃{dish}，家里有{main}和{second}，应该怎么做？"],
        f"做{dish}不难。先把{main}洗净切好，再把{second}准备好，下锅炒一炒，最后{last}就可以了。{person}一定会喜欢。",
    )


def plan_weekend(rng: random.Random, terms: Terms) -> Turns:
    city, hobby, person = rng.choice(terms.cities), rng.choice(terms.hobbies), rng.choice(terms.people)
    half = rng.choice(("上午", "下午"))
    return (
        [
            f"周末我想和{person}在{city}{hobby}，帮我安排一下。",
            "上午去还是下午去？",
            f"{half}吧。",
        ],
        f"没问题。周末你们先在{city}找个地方吃饭，然后一起去{hobby}。记得提前告诉{person}见面的时间。",
    )


FAMILIES: tuple[Callable[[random.Random, Terms], Turns], ...] = (
    recommend_food,
    accept_invitation,
    dress,
    ask_for_leave,
    comfort,
    find_way,
    compare_prices,
    introduce,
    remember,
    cook,
    plan_weekend,
)
# What stands before the first sentence; the most frequent is nothing at all.
OPENINGS = ("",) * 5 + ("你好，", "请问一下，", "打扰了，", "麻烦你，", "有件事想问你，")


def generate_conversations(split: str, num_rows: int, seed: int = 0) -> list[dict]:
    """Distinct conversations in Chinese.

    Args:
        split (`str`): `"train"` (about the terms of `TRAIN`) or `"test"` (about those of `TEST`).
        num_rows (`int`): How many rows.
        seed (`int`): The same seed gives the same rows.

    Returns:
        `list[dict]`: Rows with `prompt` (user and assistant messages, the user's first and last) and `completion`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    terms = TRAIN if split == "train" else TEST
    rng = random.Random(f"chinese/{split}/{seed}")
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        (first, *others), answer = rng.choice(FAMILIES)(rng, terms)
        if split == "train" and any(text in first + answer for text in HELD_OUT):
            continue  # an invented name was a held-out word by chance
        turns = [rng.choice(OPENINGS) + first, *others]
        prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        rows.setdefault(json.dumps(prompt), row)
    return list(rows.values())
