"""`spec-kd init`: writes a commented recipe for the user's models."""

import json
import os
import re
from pathlib import Path

from spec_kd.cli.arguments import InitArguments
from spec_kd.cli.paths import relate
from spec_kd.cli.steps import tell
from spec_kd.files import write_text
from spec_kd.loading import load_config, load_tokenizer
from spec_kd.open_types import JsonObject
from spec_kd.vocabulary import check_same_tokenizer

PARTS = {
    "historical": """\
  historical:  # `spec-kd prompts logs`: what users asked the target
    paths: [{prompts}]  # files, globs and folders
    # redact: [email, phone, key, card]  # personal data to replace
""",
    "curated": """\
  curated:  # `spec-kd prompts curated`: questions of a dataset
    dataset: {prompts}  # file, folder or name on the Hub
    # prompt_column: question  # if the column is not called prompt, messages or conversations
""",
    "synthetic": """\
  synthetic:  # `spec-kd synthesize`: the target writes its own prompts
    num_queries: 5000
    # system_prompts: ["You are an assistant for students of biology."]  # leads the target to your domain
""",
}
TEMPLATE = """\
# A recipe of `spec-kd run`: from prompts to a draft that is served. `spec-kd run --help` describes the format.
#   spec-kd run {path} --only_check   checks all of it, and runs nothing
#   spec-kd run {path}                runs it; the same command continues where it was stopped
# Relative paths of inputs are relative to this file. `output_dir` is relative to the working directory.

target: {target}  # the model that you serve; it stays as it is
{draft}output_dir: {output_dir}
seed: 0

prompts:  # one or several of: historical, curated, synthetic
{part}
respond:  # `spec-kd respond`: the target completes every prompt
  max_new_tokens: 512
  temperature: 1.0  # sampled completions teach a draft the most
{signal}  # batch_size: 64  # prompts at a time; raise it on a GPU

{plan}train:  # `spec-kd train {method}`: all arguments of the trainer, which are TRL's and more
  method: {method}{reason}
  num_train_epochs: 3
  learning_rate: 2.0e-5
  per_device_train_batch_size: 8
  max_length: 2048  # tokens of prompt and completion
  save_steps: 200  # training continues from the last checkpoint
  report_to: none
{alignment}
evaluate:  # `spec-kd evaluate`: the draft before and after training, on held-out prompts
  serving_engine: {serving_engine}  # where the draft will serve
  max_new_tokens: 512
  # fail_under: {{block_efficiency: 2.5}}  # exit status 3 below it

export:  # `spec-kd export`: the draft as the engine loads it, with the command that serves it
  serving_engines: [{serving_engine}]
  # llama_cpp_dir: ~/llama.cpp  # for GGUF files; `observe` then starts llama-server itself

check:  # `spec-kd check-serving`: whether the engine will serve the draft, and draft with it

# observe:  # `spec-kd observe`: what a server with the draft does, beside what is predicted
#   url: http://localhost:8000
#   plain_url: http://localhost:8001  # the same target without the draft, for the speed-up
"""
GIVEN = "draft: {draft}  # the small model that learns to draft for it\n"
PLAN = """\
plan:  # `spec-kd plan-draft`: shapes of a draft are compared by what they cost, and the best one is made
  run_minutes: 10  # each shape that can pay is trained so long on the responses

"""
SIGNAL = "  teacher_signal: sampled_logprobs  # what training needs of the target, so that it is not loaded again\n"
ALIGNMENT = "  align_vocabulary: true  # servers want as many vocabulary rows as the target has\n"


def run(arguments: InitArguments) -> JsonObject:
    """Writes the recipe.

    Raises:
        FileExistsError: There is a file already.
    """
    output = Path(arguments.output)
    if output.exists():
        raise FileExistsError(f"`{output}` exists already. Choose another `--output`, or delete the file.")
    draft = arguments.draft
    method, reason, is_aligned = compare_models(arguments.target, draft) if draft else ("white_box", "", False)
    folder, scenario = os.path.dirname(arguments.output), arguments.find_scenario()
    prompts = _quote(relate(arguments.prompts, folder)) if arguments.prompts is not None else ""
    text = TEMPLATE.format(
        path=output,
        target=_quote(relate(arguments.target, folder)),
        draft=GIVEN.format(draft=_quote(relate(draft, folder))) if draft else "",
        plan="" if draft else PLAN,
        output_dir=_quote(f"runs/{output.stem}"),
        part=PARTS[scenario].format(prompts=prompts),
        signal=SIGNAL if method == "white_box" else "",
        method=method,
        reason=f"  # {reason}" if reason else "",
        alignment=ALIGNMENT if is_aligned else "",
        serving_engine=arguments.serving_engine,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    tell(f"init: `spec-kd run {output} --only_check` checks the recipe")
    return {"recipe": str(output), "scenario": scenario, "method": method}


def compare_models(target: str, draft: str) -> tuple[str, str, bool]:
    """Chooses how a draft learns from a target.

    Returns:
        `tuple[str, str, bool]`: The method; why it is not the usual one, or `""`; whether the draft's vocabulary has
        to be aligned with the target's.
    """
    try:
        tokenizers = (load_tokenizer(draft), load_tokenizer(target))
        sizes = [load_config(name).get_text_config().vocab_size for name in (draft, target)]
    except (OSError, ValueError, ImportError) as error:
        tell(f"init: the models are not compared, since one cannot be read: {' '.join(str(error).split())}")
        return "white_box", "", False
    try:
        check_same_tokenizer(*tokenizers)
    except ValueError:
        return "black_box", "the tokenizers differ, so the draft learns the target's text alone", False
    return "white_box", "", sizes[0] != sizes[1]


def _quote(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z./][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
