"""Bundled questions and answers about biology, generated: deterministic for a seed, no network.

Most rows are a short passage with a question about it, as in PubMedQA: a trial, a knockout, an organ, an enzyme, a
cross, a food chain. What they are about (organisms, organs, enzymes, traits, habitats, ...) is split: the words of
`TEST` occur in no training row, and each test row has at least one of them. Names of compounds, genes and species are
invented anew in each row, so they can only be copied. The passages are made up, and so are the findings in them.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from .values import LETTERS, make_word, phrases, records

Pair = tuple[str, str]


@dataclass(frozen=True)
class Terms:
    """What a split's rows are about.

    Args:
        organisms, measures, microbes (`list[str]`): In the plural, the singular and the plural.
        phenotypes (`list[list[str]]`): What is seen without a gene, and what the gene is therefore needed for.
        organs (`list[list[str]]`): Organ, verb, object, system.
        enzymes (`list[list[str]]`): Enzyme, substrate, product.
        traits (`list[list[str]]`): Plants, their trait, its dominant and its recessive form.
        food_chains (`list[list[str]]`): Habitat, what is eaten, who eats it, who eats that one; all in the plural.
    """

    organisms: list[str]
    measures: list[str]
    microbes: list[str]
    phenotypes: list[list[str]]
    organs: list[list[str]]
    enzymes: list[list[str]]
    traits: list[list[str]]
    food_chains: list[list[str]]


TRAIN = Terms(
    organisms=phrases(
        "mice,rats,rabbits,pigs,sheep,goats,dogs,zebrafish,frogs,salamanders,chickens,quails,fruit flies,honeybees,"
        "beetles,nematodes,sea urchins,mussels,oysters,ducks,guinea pigs,octopuses"
    ),
    measures=phrases(
        "heart rate,body weight,blood pressure,blood glucose,liver weight,bone density,muscle mass,lifespan,"
        "oxygen uptake,growth rate,serum calcium,plasma insulin,reaction time,cell number,protein content,water loss,"
        "sleep duration,food intake,nerve speed,enzyme activity"
    ),
    microbes=phrases("yeast,gut bacteria,soil bacteria,green algae,lactic bacteria,diatoms,marine bacteria"),
    phenotypes=records(
        """
        smaller eyes / the growth of the eyes
        brittle bones / the hardening of bone
        an irregular heartbeat / the rhythm of the heart
        pale skin / the making of pigment
        thick blood / the flow of blood
        no response to light / the sensing of light
        slow wound healing / the repair of skin
        high blood sugar / the control of blood sugar
        short legs / the growth of legs
        weak muscles / the strength of muscle
        poor memory / the storing of memories
        few red blood cells / the making of red blood cells
        restless sleep / the timing of sleep
        a fatty liver / the burning of fat
        """
    ),
    organs=records(
        """
        kidney / filter / waste out of the blood / urinary system
        heart / pump / blood through the body / circulatory system
        liver / break down / poisons in the blood / digestive system
        pancreas / release / insulin into the blood / endocrine system
        stomach / churn / food with acid / digestive system
        small intestine / absorb / nutrients from food / digestive system
        large intestine / absorb / water from waste / digestive system
        skin / shield / the body from germs / integumentary system
        thyroid / set / the speed of metabolism / endocrine system
        bladder / store / urine / urinary system
        cerebellum / control / balance and movement / nervous system
        spinal cord / conduct / signals to the brain / nervous system
        trachea / lead / air to the bronchi / respiratory system
        bone marrow / produce / blood cells / skeletal system
        artery / transport / blood away from the heart / circulatory system
        ovary / release / egg cells / reproductive system
        """
    ),
    enzymes=records(
        """
        amylase / starch / maltose
        lipase / fats / fatty acids
        pepsin / proteins / peptides
        lactase / lactose / glucose and galactose
        sucrase / sucrose / glucose and fructose
        cellulase / cellulose / glucose
        catalase / hydrogen peroxide / water and oxygen
        nuclease / nucleic acids / nucleotides
        pectinase / pectin / galacturonic acid
        """
    ),
    traits=records(
        """
        peas / flower color / purple / white
        peas / seed shape / round / wrinkled
        peas / pod color / green / yellow
        snapdragons / height / tall / dwarf
        tomatoes / fruit color / red / yellow
        tomatoes / stem / hairy / smooth
        maize plants / kernel color / purple / white
        beans / seed color / black / white
        pumpkins / fruit color / white / orange
        """
    ),
    food_chains=records(
        """
        a meadow / grasses / voles / owls
        a pond / algae / tadpoles / herons
        a kelp forest / kelp / snails / sea otters
        a desert / cacti / lizards / hawks
        an oak wood / acorns / squirrels / martens
        a river / mayflies / trout / kingfishers
        a savanna / shrubs / gazelles / lions
        the tundra / lichens / lemmings / foxes
        a field / clover / hares / lynxes
        a reef / corals / parrotfish / groupers
        """
    ),
)
TEST = Terms(
    organisms=phrases("hamsters,geckos,crickets,starfish,squid,bats,ferrets,hedgehogs"),
    measures=phrases("body temperature,brain volume,tail length,breathing rate,egg mass,iron uptake"),
    microbes=phrases("cyanobacteria,amoebas,vinegar bacteria"),
    phenotypes=records(
        """
        deaf ears / the hearing of sounds
        loose teeth / the anchoring of teeth
        hairless tails / the growth of hair
        thin wings / the forming of wings
        """
    ),
    organs=records(
        """
        gallbladder / hold / bile / biliary tract
        spleen / remove / worn cells / lymphatic tract
        cornea / bend / rays / visual tract
        cochlea / turn / vibrations into impulses / auditory tract
        larynx / form / the voice / vocal tract
        """
    ),
    enzymes=records(
        """
        chitinase / chitin / glucosamine
        urease / urea / ammonia
        keratinase / keratin / amino acids
        """
    ),
    traits=records(
        """
        petunias / petal edge / frilled / plain
        lentils / spots / dotted / spotless
        cucumbers / taste / bitter / mild
        """
    ),
    food_chains=records(
        """
        a mangrove swamp / mangroves / crabs / egrets
        a vineyard / grapes / wasps / bee-eaters
        the open ocean / krill / penguins / seals
        a cave / guano / millipedes / spiders
        """
    ),
)
GROUPS = records(
    """
    mammal / fur / milk glands
    bird / feathers / a beak
    reptile / dry scales / eggs with a leathery shell
    amphibian / moist skin / larvae with gills
    fish / fins / gills
    insect / six legs / antennae
    arachnid / eight legs / no antennae
    mollusk / a soft body / a mantle
    fern / fronds / spores
    conifer / needles / cones
    """
)
BASES = {"A": "T", "T": "A", "G": "C", "C": "G"}


def make_compound(rng: random.Random) -> str:
    return make_word(rng) + rng.choice(("min", "sol", "vir", "xin"))


def make_gene(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(3)) + str(rng.randint(1, 9))


def make_species(rng: random.Random) -> str:
    return f"{make_word(rng).title()} {make_word(rng)}us"


def trial(rng: random.Random, terms: Terms) -> Pair:
    organisms, measure, compound = rng.choice(terms.organisms), rng.choice(terms.measures), make_compound(rng)
    number, weeks, percent = 4 * rng.randint(3, 30), rng.randint(2, 12), rng.randint(3, 60)
    change, base = rng.choice((("rose", "raise"), ("fell", "lower")))
    is_significant = rng.random() < 0.6
    p = f"0.00{rng.randint(1, 9)}" if is_significant else f"0.{rng.randint(11, 89)}"
    passage = (
        f"We gave {compound} to {number} {organisms} for {weeks} weeks. Compared with untreated {organisms}, {measure} "
        f"{change} by {percent} percent (p = {p})."
    )
    question = rng.choice(("Does {} {} {} in {}?", "Can {} {} {} in {}?")).format(compound, base, measure, organisms)
    if is_significant:
        answer = f"Yes. In {number} {organisms}, {measure} {change} by {percent} percent with {compound} (p = {p})."
        return f"{passage} {question}", answer + " The change is significant."
    answer = f"Probably not. In {number} {organisms}, the change of {measure} was not significant (p = {p})."
    return f"{passage} {question}", answer + f" It may be due to chance, not to {compound}."


def knockout(rng: random.Random, terms: Terms) -> Pair:
    organisms, gene = rng.choice(terms.organisms), make_gene(rng)
    phenotype, function = rng.choice(terms.phenotypes)
    opening = rng.choice((f"{organisms} without the gene {gene} have {phenotype}.",
                          f"Knocking out {gene} in {organisms} leads to {phenotype}."))  # fmt: skip
    question = rng.choice((f"What is the role of {gene}?", f"What does {gene} normally do?"))
    return (
        f"{opening[0].upper()}{opening[1:]} {question}",
        f"{gene} is needed for {function}, since {organisms} that lack it show {phenotype}.",
    )


def organ(rng: random.Random, terms: Terms) -> Pair:
    name, verb, thing, system = rng.choice(terms.organs)
    first, *rest = verb.split()
    present = " ".join([first + ("es" if first.endswith("sh") else "s"), *rest])
    note = f"The {name} {present} {thing}."
    if rng.random() < 0.5:
        question = rng.choice(("What happens when the {} fails?", "Why is damage to the {} dangerous?")).format(name)
        return f"{note} {question}", f"When the {name} fails, the body can no longer {verb} {thing}."
    question = rng.choice(("Summarise the role of the {}.", "What is the {} for?")).format(name)
    return (
        f"{note} It belongs to the {system}. {question}",
        f"The {name} is a part of the {system}. Its task is to {verb} {thing}.",
    )


def enzyme(rng: random.Random, terms: Terms) -> Pair:
    name, substrate, product = rng.choice(terms.enzymes)
    degrees, acidity = rng.randint(20, 70), rng.randint(2, 10)
    note = (
        f"The enzyme {name} turns {substrate} into {product}. It is most active at {degrees} degrees and pH {acidity}."
    )
    return rng.choice(
        (
            (
                f"{note} What limits {name} at {degrees + 20} degrees?",
                f"At {degrees + 20} degrees {name} unfolds. Its optimum is {degrees} degrees, so less {substrate} is "
                f"turned into {product}.",
            ),
            (
                f"{note} What are substrate and product?",
                f"The substrate of {name} is {substrate}, and the product is {product}.",
            ),
            (
                f"{note} Under which conditions should I run the assay?",
                f"Run the assay at {degrees} degrees and pH {acidity}, with {substrate} as the substrate, and measure "
                f"{product}.",
            ),
        )
    )


def cross(rng: random.Random, terms: Terms) -> Pair:
    plants, trait, dominant, recessive = rng.choice(terms.traits)
    letter = rng.choice("ABDEGHRT")
    both, one = f"{letter}{letter.lower()}", f"{letter.lower()}{letter.lower()}"
    start = f"In {plants}, {dominant} is dominant over {recessive} for {trait}."
    if rng.random() < 0.5:
        return (
            f"{start} Two plants {both} are crossed. What is the ratio of the offspring?",
            f"Crossing {both} with {both} gives one {letter}{letter}, two {both} and one {one}. So three of four are "
            f"{dominant} and one of four is {recessive}.",
        )
    return (
        f"{start} A plant {both} is crossed with {one}. What is the ratio of the offspring?",
        f"Crossing {both} with {one} gives one {both} and one {one}. So half are {dominant} and half are {recessive}.",
    )


def food_chain(rng: random.Random, terms: Terms) -> Pair:
    habitat, food, eaters, hunters = rng.choice(terms.food_chains)
    note = f"In {habitat}, {eaters} feed on {food}, and {hunters} hunt {eaters}."
    if rng.random() < 0.5:
        return (
            f"{note} What happens to the {food} when the {hunters} disappear?",
            f"Without {hunters}, the number of {eaters} grows. More {eaters} eat more {food}, so the {food} decline.",
        )
    return (
        f"{note} What happens to the {hunters} when a disease kills the {food}?",
        f"Without {food}, the {eaters} starve. The {hunters} then find fewer {eaters}, so the {hunters} decline as "
        "well.",
    )


def classify(rng: random.Random, terms: Terms) -> Pair:
    group, first, second = rng.choice(GROUPS)
    species, habitat = make_species(rng), rng.choice(terms.food_chains)[0]
    article = "an" if group[0] in "ai" else "a"
    question = rng.choice(("To which group does it belong?", "How would you classify it?"))
    return (
        f"{species}, a new species found in {habitat}, has {first} and {second}. {question}",
        f"{species} has {first} and {second}, so the species from {habitat} is {article} {group}.",
    )


def doubling(rng: random.Random, terms: Terms) -> Pair:
    microbes, minutes, hours = rng.choice(terms.microbes), rng.choice((10, 15, 20, 30)), rng.randint(2, 6)
    each = 60 // minutes
    return (
        f"A culture of {microbes} doubles every {minutes} minutes. How often does it double in {hours} hours?",
        f"Dividing every {minutes} minutes, the {microbes} double {each} times an hour, "
        f"so {each * hours} times in {hours} hours.",
    )


def strand(rng: random.Random, terms: Terms) -> Pair:
    organisms = rng.choice(terms.organisms)
    bases = [rng.choice("ATGC") for _ in range(rng.randint(5, 9))]
    return (
        f"A piece of DNA of {organisms} reads {' '.join(bases)}. What is the complementary strand?",
        f"The complementary strand reads {' '.join(BASES[base] for base in bases)}.",
    )


FAMILIES: tuple[Callable[[random.Random, Terms], Pair], ...] = (
    trial,
    trial,
    trial,
    knockout,
    knockout,
    organ,
    organ,
    enzyme,
    enzyme,
    cross,
    food_chain,
    food_chain,
    classify,
    doubling,
    strand,
)
# What stands before a question; the most frequent is nothing at all.
OPENINGS = ("",) * 5 + (
    "I am preparing for an exam. ",
    "A question for class: ",
    "From my lecture notes: ",
    "Please help me with this. ",
    "Reading a paper, I found this. ",
)


def generate_conversations(split: str, num_rows: int, seed: int = 0) -> list[dict]:
    """Distinct questions about biology with their answers.

    Args:
        split (`str`): `"train"` (about the terms of `TRAIN`) or `"test"` (about those of `TEST`).
        num_rows (`int`): How many rows.
        seed (`int`): The same seed gives the same rows.

    Returns:
        `list[dict]`: Rows with `prompt` (a user message) and `completion` (an assistant message).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    terms = TRAIN if split == "train" else TEST
    rng = random.Random(f"biology/{split}/{seed}")
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        question, answer = rng.choice(FAMILIES)(rng, terms)
        prompt = [{"role": "user", "content": rng.choice(OPENINGS) + question}]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        rows.setdefault(json.dumps(prompt), row)
    return list(rows.values())
