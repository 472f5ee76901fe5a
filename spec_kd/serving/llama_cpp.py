"""llama.cpp: `llama-server` with a standalone draft under `--spec-type draft-simple`."""

from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import ServingEngine


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The commands that convert both models to GGUF and start `llama-server` with them."""
    # Without `--spec-type` the draft is loaded and never used
    return (
        f"python convert_hf_to_gguf.py {quote_argument(draft)} --outfile draft.gguf\n"
        f"python convert_hf_to_gguf.py {quote_argument(target)} --outfile target.gguf\n"
        f"llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {num_draft_tokens}"
    )


LLAMA_CPP = ServingEngine(
    name="llama.cpp",
    draft_sampling="greedy",
    rule="the draft proposes its most likely token, which is accepted if the target samples the same",
    source=(
        "`common_sampler_sample_and_accept_n` in common/sampling.cpp of llama.cpp (October 2026); drafts that are less "
        "sure than `--spec-draft-p-min` end early there, which is not modeled"
    ),
    vocabulary=(
        "the same type of tokenizer, bos and eos; sizes that differ by at most 128; the same token texts from id 5 on"
    ),
    counters="`timings.draft_n` and `timings.draft_n_accepted` of each response of `/completion`",
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
)
