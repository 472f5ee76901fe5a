"""Distils a target for conversations in Chinese into its draft; all but the data is shared with train_fc.py.

With no argument: the embedded default. Small models and conversations made on the spot, no network, no GPU:

    accelerate launch examples/train_zh.py

With models and data: the real recipe.

    accelerate launch examples/train_zh.py --config examples/configs/chinese.yaml
"""

import sys

import chinese_corpus
from domain_example import Domain, run_example
from recipe import RecipeResult

DOMAIN = Domain(
    name="Chinese",
    unseen="unseen subjects",
    output_dir="outputs/train_zh",
    generate_conversations=chinese_corpus.generate_conversations,
)


def main(argv: list[str]) -> RecipeResult:
    return run_example(DOMAIN, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
