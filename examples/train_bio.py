"""Distills a target for questions about biology into its draft. Everything but the conversations is train_fc.py's.

With no argument: the embedded default. Small models and conversations made on the spot, no network, no GPU:

    accelerate launch examples/train_bio.py

With models and data of your own:

    accelerate launch examples/train_bio.py --config examples/configs/biology.yaml
"""

import sys

import train_fc
from made_up.embedded_run import BIOLOGY as DOMAIN
from made_up.record import ExampleResult


def main(argv: list[str]) -> ExampleResult:
    return train_fc.main(argv, DOMAIN)


if __name__ == "__main__":
    main(sys.argv[1:])
