"""How each engine is told to use a draft."""

import json
import shlex

from spec_kd.escaping import quote_argument, quote_python


def serving_commands(draft_path: str, target_name: str, num_assistant_tokens: int = 5) -> dict[str, str]:
    """Commands and snippets that serve `target_name` with the draft.

    Written after the documentation of each engine; of these, only transformers is run by the tests of this package.
    The draft must have as many vocabulary rows as the target, see [`export_draft`]. Names are quoted, so that no text
    in them is run by a shell or by Python.

    Args:
        draft_path (`str`): Folder or Hub id of the draft.
        target_name (`str`): Folder or Hub id of the target.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Tokens drafted in a round.

    Returns:
        `dict[str, str]`: Engine to command (vLLM, SGLang, llama.cpp: shell; TensorRT-LLM, transformers: Python).

    Raises:
        `ValueError`: `num_assistant_tokens` below 1, or a name that holds a null character, which no command takes.
    """
    if num_assistant_tokens < 1:
        raise ValueError(f"`num_assistant_tokens` must be at least 1, got {num_assistant_tokens}.")
    for name, value in (("draft_path", draft_path), ("target_name", target_name)):
        if "\0" in value:
            raise ValueError(f"`{name}={value!r}` holds a null character, which no command takes.")
    gamma = num_assistant_tokens
    draft, target = quote_argument(draft_path), quote_argument(target_name)
    python_draft, python_target = quote_python(draft_path), quote_python(target_name)
    speculative = {"method": "draft_model", "model": draft_path, "num_speculative_tokens": gamma}
    return {
        "vllm": f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(speculative))}",
        "sglang": (
            # a chain of gamma drafted tokens: top-k 1, and the token that starts the round counts as one more
            f"python -m sglang.launch_server --model-path {target} --speculative-algorithm STANDALONE "
            f"--speculative-draft-model-path {draft} --speculative-num-steps {gamma} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma + 1}"
        ),
        "llama.cpp": (
            # without `--spec-type` the draft is loaded and never used
            f"python convert_hf_to_gguf.py {draft} --outfile draft.gguf\n"
            f"llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {gamma}"
        ),
        "tensorrt-llm": (
            "from tensorrt_llm import LLM\n"
            "from tensorrt_llm.llmapi import DraftTargetDecodingConfig\n\n"
            f"config = DraftTargetDecodingConfig(max_draft_len={gamma}, speculative_model={python_draft})\n"
            f"llm = LLM({python_target}, speculative_config=config, disable_overlap_scheduler=True)"
        ),
        "transformers": (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({python_target})\n"
            f'target = AutoModelForCausalLM.from_pretrained({python_target}, dtype="auto", device_map="auto")\n'
            f'draft = AutoModelForCausalLM.from_pretrained({python_draft}, dtype="auto", device_map="auto")\n'
            "# read from the draft's config only; the default stops drafting at tokens it is less than 40 % sure of\n"
            f"draft.generation_config.num_assistant_tokens = {gamma}\n"
            'draft.generation_config.num_assistant_tokens_schedule = "constant"\n'
            "draft.generation_config.assistant_confidence_threshold = 0.0\n\n"
            'inputs = tokenizer("Hello", return_tensors="pt").to(target.device)\n'
            "output = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))"
        ),
    }
