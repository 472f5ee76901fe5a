"""Distils a target for questions about biology into its draft; all but the data is shared with train_fc.py.

With no argument: the embedded default. Small models and questions made on the spot, no network, no GPU:

    accelerate launch examples/train_bio.py

With models and data: the real recipe.

    accelerate launch examples/train_bio.py --config examples/configs/biology.yaml
"""

import sys

import biology_corpus
from domain_example import Domain, run_example
from recipe import RecipeResult

DOMAIN = Domain(
    name="biology",
    unseen="unseen subjects",
    output_dir="outputs/train_bio",
    generate_conversations=biology_corpus.generate_conversations,
)


def main(argv: list[str]) -> RecipeResult:
    return run_example(DOMAIN, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
