"""Bundled everyday conversations without tools or JSON: what the generic models are trained on.

Each function of `FAMILIES` draws one question and its answer. Deterministic for a seed, no network; a prompt of the
train split never occurs in the test split.
"""

import random
from collections.abc import Callable

from .values import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DISHES,
    ERRANDS,
    EVENTS,
    FIRST_NAMES,
    LANGUAGES,
    MONTHS,
    NOUNS,
    OPPOSITES,
    PRODUCTS,
    ROOMS,
    SPEEDS,
    SPORTS,
    STEPS,
    TOPICS,
    UNITS,
    VERBS,
    WEEKDAYS,
    make_code,
    make_date,
    make_person,
    make_street,
    make_time,
    make_title,
    make_word,
)

Pair = tuple[str, str]


def arithmetic(rng: random.Random) -> Pair:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    word, result = rng.choice((("plus", a + b), ("minus", a - b)))
    question = rng.choice(("What is {} {} {}?", "How much is {} {} {}?", "Please compute {} {} {}.", "{} {} {}?"))
    return question.format(a, word, b), rng.choice(("{} {} {} is {}.", "{} {} {} equals {}.")).format(
        a, word, b, result
    )


def word_problem(rng: random.Random) -> Pair:
    name, thing = rng.choice(FIRST_NAMES), rng.choice(PRODUCTS)
    a, b = rng.randint(8, 40), rng.randint(1, 7)
    verb, result = rng.choice((("gets", a + b), ("gives away", a - b)))
    question = rng.choice(("How many are there now?", "How many {t}s does {n} have now?"))
    return (
        f"{name} has {a} {thing}s and {verb} {b}. {question.format(t=thing, n=name)}",
        f"{name} has {result} {thing}s now.",
    )


def convert_units(rng: random.Random) -> Pair:
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 20)
    question = rng.choice((f"How many {small} are {n} {large}?", f"Convert {n} {large} to {small}."))
    return question, f"{n} {large} are {n * factor} {small}."


def capital(rng: random.Random) -> Pair:
    country, city = rng.choice(list(CAPITALS.items()))
    other = rng.choice(CITIES)
    kind = rng.randrange(3)
    if kind == 0:
        question = rng.choice(
            ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.")
        )
        return question.format(country), f"The capital of {country} is {city}."
    if kind == 1:
        return f"Of which country is {city} the capital?", f"{city} is the capital of {country}."
    answer = "Yes, it is." if other == city else f"No, the capital of {country} is {city}."
    return f"Is {other} the capital of {country}?", answer


def opposite(rng: random.Random) -> Pair:
    a, b = rng.sample(rng.choice(OPPOSITES), 2)
    if rng.random() < 0.5:
        question = rng.choice(
            ("What is the opposite of {}?", "Give me the opposite of {}.", "Which word means not {}?")
        )
        return question.format(a), f"The opposite of {a} is {b}."
    noun = rng.choice(NOUNS + PRODUCTS)
    return f"Change the meaning: The {noun} is {a}.", f"The {noun} is {b}."


def past_tense(rng: random.Random) -> Pair:
    base, present, past = rng.choice(VERBS)
    name, thing, day = rng.choice(FIRST_NAMES), rng.choice(PRODUCTS), rng.choice(WEEKDAYS)
    if rng.random() < 0.3:
        return (
            f"{rng.choice(('What is the past tense of', 'Put into the past:'))} {base}",
            f"The past tense of {base} is {past}.",
        )
    return f"Put into the past: {name} {present} the {thing} on {day}.", f"{name} {past} the {thing} on {day}."


def read_sentence(rng: random.Random) -> Pair:
    present, past = rng.choice(VERBS)[1:]
    name, thing, city, color = rng.choice(FIRST_NAMES), rng.choice(PRODUCTS), rng.choice(CITIES), rng.choice(COLORS)
    question, answer = rng.choice(
        (
            (f"Who {past} the {thing}?", f"{name} {past} the {thing}."),
            (f"What color is the {thing}?", f"The {thing} is {color}."),
            (f"Where is {name}?", f"{name} is in {city}."),
            (f"What does {name} do there?", f"{name} {present} a {thing} there."),
        )
    )
    return f"{name} {past} a {color} {thing} in {city}. {question}", answer


def remember_fact(rng: random.Random) -> Pair:
    label, value = rng.choice(
        (
            ("locker code", make_code(rng)),
            ("address", make_street(rng)),
            ("appointment", f"{make_date(rng)} at {make_time(rng)}"),
            ("password", make_word(rng)),
            ("new boss", make_person(rng)),
            ("favourite song", make_title(rng)),
            ("booking number", make_code(rng)),
            ("birthday", make_date(rng)),
            ("lucky number", str(rng.randint(11, 9999))),
        )
    )
    second, other = rng.choice((("friend", make_person(rng)), ("team", make_title(rng)), ("room key", make_code(rng))))
    if rng.random() < 0.5:
        return f"My {label} is {value} and my {second} is {other}. What is my {label}?", f"Your {label} is {value}."
    return f"My {label} is {value} and my {second} is {other}. What is my {second}?", f"Your {second} is {other}."


def repeat_words(rng: random.Random) -> Pair:
    pool = rng.choice(
        (CITIES, PRODUCTS, FIRST_NAMES, NOUNS, [make_word(rng) for _ in range(8)], [make_code(rng) for _ in range(8)])
    )
    words = rng.sample(pool, rng.randint(2, 6))
    question = rng.choice(("Repeat after me: {}", "Say this again: {}", "Copy these words: {}"))
    return question.format(" ".join(words)), " ".join(words)


def sort_words(rng: random.Random) -> Pair:
    words = rng.sample(rng.choice((CITIES, PRODUCTS, FIRST_NAMES, ANIMALS)), rng.randint(2, 4))
    question = rng.choice(("Sort these words by the alphabet: {}.", "Put in alphabetical order: {}."))
    return question.format(", ".join(words)), ", ".join(sorted(words)) + "."


def first_or_last(rng: random.Random) -> Pair:
    words = rng.sample(rng.choice((CITIES, PRODUCTS, FIRST_NAMES, NOUNS)), rng.randint(3, 5))
    which, word = rng.choice((("first", words[0]), ("last", words[-1])))
    return f"What is the {which} word in this list: {', '.join(words)}?", f"The {which} word is {word}."


def upper_case(rng: random.Random) -> Pair:
    name, city = rng.choice(FIRST_NAMES), rng.choice(CITIES)
    return f"Write the name {name} from {city} in capital letters.", f"{name.upper()} FROM {city.upper()}"


def weekday_after(rng: random.Random) -> Pair:
    names = rng.choice((WEEKDAYS, MONTHS))
    i, step = rng.randrange(len(names)), rng.choice((1, 1, -1, 2))
    word = {1: "comes after", -1: "comes before", 2: "is two after"}[step]
    unit = "day" if names is WEEKDAYS else "month"
    return f"Which {unit} {word} {names[i]}?", f"{names[(i + step) % len(names)]} {word} {names[i]}."


def compare_numbers(rng: random.Random) -> Pair:
    a, b = rng.sample(range(10, 999), 2)
    word, result = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    return f"Which number is {word}, {a} or {b}?", f"{result} is {word} than {a + b - result}."


def compare_animals(rng: random.Random) -> Pair:
    a, b = rng.sample(list(SPEEDS), 2)
    fast, slow = (a, b) if SPEEDS[a] > SPEEDS[b] else (b, a)
    return f"Which is faster, a {a} or a {b}?", f"A {fast} is faster than a {slow}."


def how_to(rng: random.Random) -> Pair:
    task, steps = rng.choice(list(STEPS.items()))
    name = rng.choice(FIRST_NAMES)
    question = rng.choice(
        (f"How do I {task}?", f"Explain to {name} how to {task}.", f"My friend {name} asks how to {task}.")
    )
    opening = rng.choice(("First", "To begin"))
    return question, f"{opening}, {steps[0]}. Then {steps[1]}. After that, {steps[2]}. Finally, {steps[3]}."


def story(rng: random.Random) -> Pair:
    name, animal, city = rng.choice(FIRST_NAMES), rng.choice(ANIMALS), rng.choice(CITIES)
    adjective, noun, day = rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(WEEKDAYS)
    friend, thing, color = rng.choice(FIRST_NAMES), rng.choice(PRODUCTS), rng.choice(COLORS)
    openings = (
        f"One {day}, {name} met a {animal} in {city}.",
        f"There was once a {animal} in {city} that belonged to {name}.",
    )
    middles = (
        f"They walked to the {adjective} {noun} and found a {color} {thing}.",
        f"The {animal} was afraid of the {noun}, but {name} was not.",
        f"{friend} had lost a {color} {thing} near the {noun}, and the {animal} saw it.",
    )
    endings = (
        f"In the end, {name} gave it to {friend}.",
        f"From then on, {name} and the {animal} were friends.",
        f"{friend} laughed, and they all went home.",
    )
    question = rng.choice(
        (f"Tell me a story about {name} and a {animal}.", f"Write a short story with {name}, a {animal} and {city}.")
    )
    return question, " ".join((rng.choice(openings), rng.choice(middles), rng.choice(endings)))


def polite(rng: random.Random) -> Pair:
    errand = rng.choice(ERRANDS)
    name = rng.choice(FIRST_NAMES)
    question = rng.choice((f"Ask {name} politely to {errand}.", f"I want {name} to {errand}. Say it nicely."))
    return question, f"Dear {name}, could you please {errand}? Thank you very much."


def invitation(rng: random.Random) -> Pair:
    name, event, day, hour = rng.choice(FIRST_NAMES), rng.choice(EVENTS), rng.choice(WEEKDAYS), make_time(rng)
    city = rng.choice(CITIES)
    return (
        f"Invite {name} to {event} in {city} on {day} at {hour}.",
        f"Hi {name}, would you like to come to {event} in {city}? We meet on {day} at {hour}. I hope to see you there.",
    )


def advice(rng: random.Random) -> Pair:
    topic, sport, city = rng.choice(TOPICS), rng.choice(SPORTS), rng.choice(CITIES)
    return rng.choice(
        (
            (
                f"How can I learn more about {topic}?",
                f"Read a good book about {topic}, visit a museum and ask people who know it.",
            ),
            (f"Is {sport} good for me?", f"Yes, {sport} keeps you fit. Start slowly and train twice a week."),
            (
                f"What should I see in {city}?",
                f"Walk through the old town of {city}, try the local food and visit a museum.",
            ),
            (f"I am tired of {topic}. What else is there?", f"Leave {topic} for a while and try {sport} instead."),
            (f"I moved to {city} and feel alone.", f"Join a {sport} club in {city}. You will soon meet new people."),
            (f"Can I learn {sport} in {city}?", f"Of course. There are many places for {sport} in {city}."),
        )
    )


def shopping(rng: random.Random) -> Pair:
    dish, items = rng.choice(DISHES), rng.sample(PRODUCTS, 3)
    a, b, c = items
    return rng.choice(
        (
            (f"I need a {a}, a {b} and a {c}. Make a list.", f"1. {a}\n2. {b}\n3. {c}"),
            (f"What goes well with {dish}?", f"Fresh bread and a small salad go well with {dish}."),
            (f"Where do I put the {a}?", f"Put the {a} in the {rng.choice(ROOMS)}."),
            (
                f"I have a {a} and a {b}. Which one can I give away?",
                f"Give away the {rng.choice((a, b))} if you do not need it.",
            ),
        )
    )


def languages(rng: random.Random) -> Pair:
    name, language = make_person(rng), rng.choice(LANGUAGES)
    years = rng.randint(2, 20)
    return (
        f"{name} has learned {language} for {years} years. Write one sentence about it.",
        f"{name} speaks {language} well after {years} years of practice.",
    )


FAMILIES: tuple[Callable[[random.Random], Pair], ...] = (
    arithmetic,
    word_problem,
    convert_units,
    capital,
    opposite,
    past_tense,
    read_sentence,
    remember_fact,
    remember_fact,
    repeat_words,
    repeat_words,
    sort_words,
    first_or_last,
    upper_case,
    weekday_after,
    compare_numbers,
    compare_animals,
    how_to,
    story,
    story,
    polite,
    invitation,
    advice,
    shopping,
    languages,
)


def generate_pairs(num_rows: int, seed: int) -> dict[str, str]:
    """`num_rows` distinct questions with their answers."""
    rng = random.Random(f"general/{seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < num_rows:
        question, answer = rng.choice(FAMILIES)(rng)
        pairs.setdefault(question, answer)
    return pairs


def generate_conversations(num_train: int, num_test: int, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Distinct everyday conversations, split so that no prompt is in both parts.

    Args:
        num_train (`int`): Rows of the train split.
        num_test (`int`): Rows of the test split.
        seed (`int`): The same seed gives the same rows.

    Returns:
        `tuple[list[dict], list[dict]]`: Train and test rows with `prompt` (a user message) and `completion`.
    """
    rows = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in generate_pairs(num_train + num_test, seed).items()
    ]
    # Later draws repeat less often in the small families, so the split is by a shuffle, not by order.
    random.Random(f"general-split/{seed}").shuffle(rows)
    return rows[:num_train], rows[num_train:]
