"""How each engine is told to use a draft."""


def serving_commands(draft_path: str, target_name: str, num_assistant_tokens: int = 5) -> dict[str, str]:
    """Commands and snippets that serve `target_name` with the draft.

    Written after the documentation of each engine; of these, only transformers is run by the tests of this package.
    The draft must have as many vocabulary rows as the target, see [`export_draft`].

    Args:
        draft_path (`str`): Folder or Hub id of the draft.
        target_name (`str`): Folder or Hub id of the target.
        num_assistant_tokens (`int`): Tokens drafted in a round.

    Returns:
        `dict[str, str]`: Engine to command (vLLM, SGLang, llama.cpp: shell; TensorRT-LLM, transformers: Python).
    """
    if num_assistant_tokens < 1:
        raise ValueError(f"`num_assistant_tokens` must be at least 1, got {num_assistant_tokens}.")
    gamma = num_assistant_tokens
    return {
        "vllm": (
            f"vllm serve {target_name} --speculative-config "
            f'\'{{"method": "draft_model", "model": "{draft_path}", "num_speculative_tokens": {gamma}}}\''
        ),
        "sglang": (
            # a chain of gamma drafted tokens: top-k 1, and the token that starts the round counts as one more
            f"python -m sglang.launch_server --model-path {target_name} --speculative-algorithm STANDALONE "
            f"--speculative-draft-model-path {draft_path} --speculative-num-steps {gamma} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {gamma + 1}"
        ),
        "llama.cpp": (
            f"python convert_hf_to_gguf.py {draft_path} --outfile draft.gguf\n"
            f"llama-server -m target.gguf -md draft.gguf --draft-max {gamma}"
        ),
        "tensorrt-llm": (
            "from tensorrt_llm import LLM\n"
            "from tensorrt_llm.llmapi import DraftTargetDecodingConfig\n\n"
            f'config = DraftTargetDecodingConfig(max_draft_len={gamma}, speculative_model="{draft_path}")\n'
            f'llm = LLM("{target_name}", speculative_config=config, disable_overlap_scheduler=True)'
        ),
        "transformers": (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{target_name}")\n'
            f'target = AutoModelForCausalLM.from_pretrained("{target_name}", dtype="auto", device_map="auto")\n'
            f'draft = AutoModelForCausalLM.from_pretrained("{draft_path}", dtype="auto", device_map="auto")\n'
            "# read from the draft's config only; the default stops drafting at tokens it is less than 40 % sure of\n"
            f"draft.generation_config.num_assistant_tokens = {gamma}\n"
            'draft.generation_config.num_assistant_tokens_schedule = "constant"\n'
            "draft.generation_config.assistant_confidence_threshold = 0.0\n\n"
            'inputs = tokenizer("Hello", return_tensors="pt").to(target.device)\n'
            "output = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))"
        ),
    }
