"""Distils a function-calling target into its draft.

With no argument: the embedded default. Small models and conversations made on the spot, no network, no GPU:

    accelerate launch examples/train_fc.py

With models and data: the real recipe.

    accelerate launch examples/train_fc.py \
        --teacher_model_name_or_path my-org/target --model_name_or_path my-org/draft \
        --dataset_name my-org/function-calling --output_dir fc-draft --align_vocabulary
    accelerate launch examples/train_fc.py --config examples/configs/function_calling.yaml
"""

import sys

import function_calling_corpus
from domain_example import Domain, run_example
from recipe import RecipeResult

DOMAIN = Domain(
    name="function calling",
    unseen="unseen tools",
    output_dir="outputs/train_fc",
    generate_conversations=function_calling_corpus.generate_conversations,
)


def main(argv: list[str]) -> RecipeResult:
    return run_example(DOMAIN, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
