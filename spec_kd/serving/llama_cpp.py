"""llama.cpp: `llama-server` with a standalone draft under `--spec-type draft-simple`."""

from dataclasses import replace

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.lookup import NGRAM_SIMPLE


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The commands that convert both models to GGUF and start `llama-server` with them."""
    # Without `--spec-type` the draft is loaded and never used
    return (
        f"python convert_hf_to_gguf.py {quote_argument(draft)} --outfile draft.gguf\n"
        f"python convert_hf_to_gguf.py {quote_argument(target)} --outfile target.gguf\n"
        f"llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {num_draft_tokens}"
    )


COUNTING = Counting(first_round=1, counts_drafted_past_end=True, end="if_last")

LLAMA_CPP = ServingEngine(
    name="llama.cpp",
    title="llama.cpp",
    rules=(
        DraftingRule("greedy"),
        # Rejection sampling does not look for the end of the text
        DraftingRule("stochastic", "--spec-draft-sampling probabilistic", 10, replace(COUNTING, end="passed")),
    ),
    counting=COUNTING,
    source=(
        "`common_sampler_sample_and_accept_n` in common/sampling.cpp of llama.cpp (October 2026); drafts that are less "
        "sure than `--spec-draft-p-min` end early there, which is not modeled"
    ),
    is_observed=False,
    vocabulary=(
        "the same type of tokenizer, bos and eos; sizes that differ by at most 128; the same token texts from id 5 on"
    ),
    length="no draft reaches the end of the context, which is the smaller one of target and draft",
    counters="`timings.draft_n` and `timings.draft_n_accepted` of each response of `/completion`",
    figures={
        "mean_acceptance_length": "mean len",
        "acceptance_rate": "draft acceptance",
        "acceptance_rate_per_position": "acceptance rate per pos",
        "drafted": "draft_n",
        "accepted": "draft_n_accepted",
    },
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
    lookup=NGRAM_SIMPLE,
)
