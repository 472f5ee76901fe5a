"""Words and value generators that the bundled conversations are made of.

`VALUES` maps a kind of value to its JSON type and a function `rng -> value`. Values are drawn from large products of
lists (12,000 people, 60,000 codes, ...), so a model has to copy them from the prompt instead of knowing them by heart.
"""

import random
from collections.abc import Callable


def words(text: str) -> list[str]:
    """The words of a block of text."""
    return text.split()


def phrases(text: str) -> list[str]:
    """The parts of a text between its commas."""
    return [part.strip() for part in text.split(",")]


def records(text: str) -> list[list[str]]:
    """The lines of a block of text, each split at `/`."""
    return [[part.strip() for part in line.split("/")] for line in text.strip().splitlines()]


CITIES = words(
    """
    Lisbon Porto Madrid Seville Paris Lyon Nantes Brussels Ghent Utrecht Hamburg Leipzig Munich Vienna Graz
    Zurich Geneva Milan Turin Naples Athens Sofia Bucharest Budapest Prague Brno Warsaw Krakow Vilnius Riga
    Tallinn Helsinki Turku Stockholm Malmo Oslo Bergen Copenhagen Aarhus Dublin Cork Glasgow Leeds Bristol
    London Boston Denver Chicago Austin Seattle Portland Toronto Montreal Calgary Lima Quito Bogota Santiago
    Montevideo Havana Cairo Tunis Accra Lagos Nairobi Kampala Lusaka Windhoek Pretoria Istanbul Ankara Tbilisi
    Baku Tehran Delhi Mumbai Chennai Dhaka Hanoi Bangkok Manila Jakarta Perth Sydney Auckland Osaka Kyoto Tokyo
    Sapporo Seoul Busan Taipei Shanghai
    """
)
COUNTRIES = words(
    """
    Portugal Spain France Belgium Germany Austria Italy Greece Bulgaria Romania Hungary Poland Latvia Estonia
    Finland Sweden Norway Denmark Ireland Canada Mexico Peru Ecuador Colombia Chile Uruguay Cuba Egypt Tunisia
    Ghana Nigeria Kenya Zambia Namibia Turkey Georgia Iran India Vietnam Thailand Indonesia Australia Japan
    Korea
    """
)
FIRST_NAMES = words(
    """
    Anna Ben Clara David Elena Felix Grace Hugo Ida Jonas Karim Lena Marco Nina Omar Paula Quentin Rosa Sami
    Tara Ugo Vera Wanda Xavier Yara Zoe Aylin Boris Chloe Dario Emil Fatima Goran Hanna Ivan Julia Kofi Laila
    Mateo Noor Oskar Priya Rafael Selma Theo Uma Viktor Wim Yusuf Zara Amir Bianca Cem Dora Erik Freya Gita Hiro
    Ines Jamal Kira Luca Mira Nils Olga Pedro Ravi Sofia Tomas Vikram
    """
)
LAST_NAMES = words(
    """
    Adler Baker Costa Diaz Evans Fischer Garcia Haas Ito Jansen Keller Lopez Meyer Novak Okoye Petrov Quinn
    Rossi Silva Tanaka Usman Vogel Walker Xu Young Zhang Abbas Berger Chen Dubois Eriksen Ferrari Gomez Huber
    Ivanov Jones Khan Larsen Moreau Nguyen Olsen Park Ramos Santos Tran Ueda Vargas Weber Yilmaz Ziegler
    """
)
COMPANIES = words(
    """
    Nordwind Bluepeak Castello Verdana Lumina Kestrel Maplewood Orbita Pinecrest Quantra Riverton Solaris Tandem
    Umbra Vistaro Westgate Zenova Altamar Brightway Corvus Delphine Evergreen Fontana Greystone Harbor Ironbark
    Juniper Kobalt Lanterna Meridian
    """
)
TOPICS = words(
    """
    history biology chess painting robotics climate football gardening economics astronomy poetry cinema geology
    medicine sailing photography nutrition philosophy energy transport fashion education chemistry architecture
    tourism
    """
)
PRODUCTS = words(
    """
    lamp kettle backpack camera jacket keyboard blender tent umbrella notebook bicycle guitar pillow toaster
    headset printer carpet mirror suitcase scarf wallet drill hammock telescope scooter helmet teapot armchair
    monitor watch
    """
)
DISHES = words(
    """
    pasta soup salad pizza curry risotto lasagna omelette tacos dumplings pancakes couscous goulash ramen paella
    falafel stew noodles burger quiche chili sushi
    """
)
ANIMALS = words(
    """
    dog cat rabbit parrot hamster turtle pony goat duck lizard canary ferret sheep donkey goose hen
    """
)
SPORTS = words(
    """
    tennis squash badminton running rowing yoga boxing cycling swimming climbing karate volleyball
    """
)
ROOMS = words("kitchen bedroom hallway bathroom office garage attic nursery lounge basement library studio")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLORS = words("red blue green yellow black white orange purple brown grey pink silver")
ADJECTIVES = [
    "quiet",
    "golden",
    "broken",
    "silver",
    "distant",
    "hidden",
    "bitter",
    "gentle",
    "frozen",
    "early",
    "empty",
    "bright",
    "wild",
    "lonely",
    "velvet",
]
NOUNS = [
    "river",
    "morning",
    "garden",
    "window",
    "mountain",
    "letter",
    "harbor",
    "shadow",
    "forest",
    "island",
    "summer",
    "mirror",
    "train",
    "winter",
    "station",
]
LANGUAGES = words("French German Spanish Italian Polish Turkish Greek Swedish Japanese Korean Hindi Dutch")
CURRENCIES = words("USD EUR GBP CHF JPY SEK CAD AUD INR BRL PLN TRY")
STREETS = words(
    """
    Main Oak Church Mill Station Park Garden River Castle Market Bridge School Lake Hill Harbor Tower
    """
)
ERRANDS = [
    "call the bank",
    "water the plants",
    "buy some bread",
    "fix the printer",
    "send the report",
    "feed the cat",
    "pay the rent",
    "clean the oven",
    "pick up the kids",
    "check the contract",
    "order new chairs",
    "update the website",
    "return the books",
    "prepare the slides",
    "test the backup",
    "wash the car",
    "renew the passport",
    "charge the phone",
]
MESSAGES = [
    "I will be late.",
    "The meeting is cancelled.",
    "Please call me back.",
    "Happy birthday!",
    "Dinner is ready.",
    "We arrived safely.",
    "Can you bring the keys?",
    "The train is delayed.",
    "See you tomorrow.",
    "I found your bag.",
    "The package is here.",
    "Thank you for the gift.",
    "I forgot my wallet.",
    "Where should we meet?",
    "The tickets are sold out.",
    "I am on my way.",
]
EVENTS = words(
    """
    lunch dinner coffee breakfast training rehearsal interview review workshop class picnic brunch
    """
)
SYLLABLES = words("ka lo mi ra tu ve so ni pa de ru fi go ba le shi mo ta ze hu")
LETTERS = "ABCDEFGHJKLMNPRSTVWXYZ"
CAPITALS = dict(
    pair.split(":")
    for pair in words(
        """
        Portugal:Lisbon Spain:Madrid France:Paris Belgium:Brussels Germany:Berlin Austria:Vienna Italy:Rome
        Greece:Athens Bulgaria:Sofia Romania:Bucharest Hungary:Budapest Poland:Warsaw Latvia:Riga
        Estonia:Tallinn Finland:Helsinki Sweden:Stockholm Norway:Oslo Denmark:Copenhagen Ireland:Dublin
        Canada:Ottawa Peru:Lima Ecuador:Quito Cuba:Havana Egypt:Cairo Tunisia:Tunis Ghana:Accra Kenya:Nairobi
        Zambia:Lusaka Turkey:Ankara Iran:Tehran Japan:Tokyo Korea:Seoul
        """
    )
)
OPPOSITES = [
    pair.split(":")
    for pair in words(
        """
        hot:cold big:small fast:slow early:late happy:sad rich:poor full:empty light:dark old:young hard:soft
        wet:dry high:low open:closed clean:dirty loud:quiet near:far strong:weak cheap:expensive sweet:bitter
        thick:thin
        """
    )
]
VERBS = [  # base, third person, past
    verb.split(":")
    for verb in words(
        """
        walk:walks:walked visit:visits:visited clean:cleans:cleaned paint:paints:painted open:opens:opened
        close:closes:closed repair:repairs:repaired find:finds:found see:sees:saw buy:buys:bought
        sell:sells:sold bring:brings:brought carry:carries:carried watch:watches:watched lose:loses:lost
        take:takes:took
        """
    )
]
STEPS = {
    "make tea": ["boil the water", "put the tea in the cup", "pour the water", "wait three minutes"],
    "wash a car": ["rinse the dust off", "use a soft sponge with soap", "rinse again", "dry it with a cloth"],
    "plant a tree": ["dig a deep hole", "set the roots inside", "fill it with earth", "water it well"],
    "change a tire": ["loosen the bolts", "lift the car", "swap the wheel", "tighten the bolts"],
    "pack for a trip": ["make a list", "fold the clothes", "put heavy things below", "keep the passport at hand"],
    "learn new words": ["write them on cards", "read them aloud", "test yourself daily", "use them in sentences"],
    "cook rice": ["wash the rice", "add twice as much water", "let it simmer", "leave it to rest"],
    "clean a window": ["mix water with vinegar", "wipe the glass", "pull off the water", "polish the corners"],
    "write a letter": ["start with a greeting", "say why you write", "keep it short", "sign your name"],
    "calm down": ["sit in a quiet place", "breathe slowly", "count to twenty", "drink some water"],
}
SPEEDS = {
    "snail": 1,
    "turtle": 2,
    "hen": 3,
    "duck": 4,
    "goat": 5,
    "cat": 6,
    "rabbit": 7,
    "dog": 8,
    "pony": 9,
    "horse": 10,
}
UNITS = [("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
         ("kilometers", "meters", 1000), ("years", "months", 12), ("dozens", "pieces", 12)]  # fmt: skip
MONTHS = words("January February March April May June July August September October November December")


def make_person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def make_code(rng: random.Random) -> str:
    return f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}-{rng.randint(100, 999)}"


def make_date(rng: random.Random) -> str:
    return f"{rng.randint(2024, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def make_time(rng: random.Random) -> str:
    return f"{rng.randint(6, 22):02d}:{rng.choice((0, 10, 15, 20, 30, 45)):02d}"


def make_word(rng: random.Random) -> str:
    """An invented word: it can only be copied."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def make_title(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES).title()} {rng.choice(NOUNS).title()}"


def make_message(rng: random.Random) -> str:
    return rng.choice(MESSAGES)


def make_event(rng: random.Random) -> str:
    return f"{rng.choice(EVENTS)} with {rng.choice(FIRST_NAMES)}"


def make_street(rng: random.Random) -> str:
    return f"{rng.randint(1, 99)} {rng.choice(STREETS)} Street"


def choice_of(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


def integer_between(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(low, high)


VALUES: dict[str, tuple[str, Callable[[random.Random], str | int | float]]] = {
    "amount": ("number", lambda rng: round(rng.randint(20, 9999) / 10 + 0.05 * rng.randint(0, 1), 2)),
    "animal": ("string", choice_of(ANIMALS)),
    "city": ("string", choice_of(CITIES)),
    "code": ("string", make_code),
    "company": ("string", choice_of(COMPANIES)),
    "count": ("integer", integer_between(2, 12)),
    "country": ("string", choice_of(COUNTRIES)),
    "currency": ("string", choice_of(CURRENCIES)),
    "date": ("string", make_date),
    "degrees": ("number", lambda rng: rng.randint(30, 58) / 2),
    "dish": ("string", choice_of(DISHES)),
    "email": ("string", lambda rng: f"{rng.choice(FIRST_NAMES).lower()}@{rng.choice(COMPANIES).lower()}.com"),
    "event": ("string", make_event),
    "firstname": ("string", choice_of(FIRST_NAMES)),
    "flight": ("string", lambda rng: f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}{rng.randint(100, 9999)}"),
    "host": ("string", lambda rng: f"{make_word(rng)}-{rng.randint(1, 99)}"),
    "hours": ("number", lambda rng: rng.randint(1, 23) / 2),
    "language": ("string", choice_of(LANGUAGES)),
    "message": ("string", make_message),
    "minutes": ("integer", lambda rng: 5 * rng.randint(1, 36)),
    "number": ("integer", integer_between(11, 9999)),
    "path": ("string", lambda rng: f"/{rng.choice(TOPICS)}/{make_word(rng)}.{rng.choice(('txt', 'pdf', 'csv'))}"),
    "percent": ("integer", lambda rng: 5 * rng.randint(1, 19)),
    "person": ("string", make_person),
    "product": ("string", lambda rng: f"{rng.choice(COLORS)} {rng.choice(PRODUCTS)}"),
    "quantity": ("integer", lambda rng: 10 * rng.randint(2, 90)),
    "room": ("string", choice_of(ROOMS)),
    "service": ("string", lambda rng: f"{make_word(rng)}-{rng.choice(('api', 'web', 'db', 'auth'))}"),
    "sport": ("string", choice_of(SPORTS)),
    "stars": ("integer", integer_between(1, 5)),
    "street": ("string", make_street),
    "task": ("string", choice_of(ERRANDS)),
    "team": ("string", lambda rng: f"{rng.choice(CITIES)} {rng.choice(('Lions', 'Rovers', 'Sharks', 'United'))}"),
    "ticker": ("string", lambda rng: "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 4)))),
    "time": ("string", make_time),
    "title": ("string", make_title),
    "topic": ("string", choice_of(TOPICS)),
    "version": ("string", lambda rng: f"v{rng.randint(1, 9)}.{rng.randint(0, 20)}"),
    "weekday": ("string", choice_of(WEEKDAYS)),
    "weight": ("number", lambda rng: rng.randint(400, 1200) / 10),
    "word": ("string", make_word),
    "year": ("integer", integer_between(1990, 2029)),
}
