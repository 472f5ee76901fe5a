"""What can be known of a recipe from its files and tokenizers, before the first step."""

import os
from typing import TYPE_CHECKING

from spec_kd.cli import prompts, synthesize, train
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.recipe import Recipe, naming
from spec_kd.cli.respond import RespondCall
from spec_kd.cli.rows import check_exists, load_rows

if TYPE_CHECKING:
    from spec_kd.data.teacher_signal import TeacherInfo
    from spec_kd.vocabulary import ProcessingClass


def check_sources(recipe: Recipe) -> None:
    """Looks at the files, folders and tokenizers that a recipe names; loads no weights.

    Raises:
        ValueError: Names the section: models that do not share a tokenizer, a target without a chat template, a signal
            that cannot serve the loss with the temperatures chosen.
        OSError: For files and models that are not there.
    """
    from spec_kd.loading import load_tokenizer
    from spec_kd.trainer.arguments import get_load_options
    from spec_kd.trainer.teachers.stored import check_stored_teacher
    from spec_kd.vocabulary import check_same_tokenizer

    method, config, draft = recipe.train.method, recipe.train.config, recipe.train.draft
    recipe.evaluate[1].check()
    processing_class = recipe.evaluate[1].load_processing_class()
    if not getattr(processing_class, "chat_template", None):
        raise ValueError(f"the tokenizer of the target `{recipe.evaluate[1].target}` has no chat template.")
    if recipe.respond is not None:
        with naming("respond"):
            recipe.respond[1].check()
    for name, part in recipe.parts.items():
        with naming(f"prompts: {name}"):
            synthesize.check_synthesis(*part) if isinstance(part, tuple) else prompts.check_part(part)
    load_options = get_load_options(config, {"revision": draft.model_revision})
    check_model("draft", draft.model_name_or_path, load_options)
    with naming_model("tokenizer of the draft", draft.model_name_or_path):
        draft_class = load_tokenizer(draft.model_name_or_path, load_options)
    if method != "black_box":
        check_same_tokenizer(draft_class, processing_class)
    with naming("train"):
        train.check_call(recipe.train)
        check_teacher(recipe)
        is_stored = method == "white_box" and config.teacher_model_name_or_path is None
        if is_stored and recipe.respond is not None and (info := describe_signal(recipe.respond, processing_class)):
            check_stored_teacher(info, config.build_loss(), processing_class)
    with naming("evaluate"):
        check_evaluation_prompts(recipe)


def check_teacher(recipe: Recipe) -> None:
    """Raises `ValueError` for a training whose teacher, or whose reference draft, will not be there."""
    method, config = recipe.train.method, recipe.train.config
    has_signal = method == "white_box" and recipe.respond is not None and recipe.respond[0].teacher_signal is not None
    needs_teacher = method != "black_box" and not has_signal
    if needs_teacher and config.teacher_model_name_or_path is None:
        check_model("teacher", recipe.train.arguments.target, config.teacher_model_init_kwargs)
    if getattr(config, "token_selection", None) == "adaspec" and config.ref_model_name_or_path is None:
        raise ValueError(
            "`token_selection: adaspec` compares with a reference draft. Set `ref_model_name_or_path` to a draft that "
            "was trained before."
        )


def check_evaluation_prompts(recipe: Recipe) -> None:
    """Raises `ValueError` for test prompts without the columns to group by, `OSError` for those that are not there."""
    from spec_kd.prompts.logs.prompt_store import FEATURES

    arguments = recipe.evaluate[0]
    columns = [*FEATURES, "chat_template_kwargs"]
    if not arguments.prompts.startswith(f"{recipe.output_dir}/"):
        check_exists("prompts", arguments.prompts)
        if not os.path.exists(arguments.prompts):
            return  # of the Hub
        columns = load_rows(arguments.prompts, arguments.split, option="prompts").column_names
        if not {"prompt", "prompt_ids"} & set(columns):
            raise ValueError(f"`prompts` has the columns {columns}, but neither `prompt` nor `prompt_ids`.")
    arguments.make_options().check_columns(columns)


def describe_signal(call: RespondCall, processing_class: "ProcessingClass") -> "TeacherInfo | None":
    """What the responses will say of their teacher signal, or `None` where they will have none."""
    from spec_kd.data.teacher_signal import TeacherInfo
    from spec_kd.vocabulary import count_real_ids, fingerprint_tokenizer

    arguments, target = call
    signal = arguments.build_options().signal
    if signal is None:
        return None
    is_processed = (
        arguments.temperature > 0
        and {
            "transformers": True,
            "vllm": target.init_kwargs.get("logprobs_mode", "processed_logprobs") == "processed_logprobs",
            "server": target.init_kwargs.get("logprobs_mode", "raw") == "processed",
        }[target.engine]
    )
    return TeacherInfo(
        target_name=target.target,
        target="",
        tokenizer=fingerprint_tokenizer(processing_class),
        vocab_size=count_real_ids(processing_class),
        engine=target.engine,
        method=signal.method,
        num_draws=signal.num_draws,
        top_k=signal.top_k,
        sampling_temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        logprobs_mode="processed" if is_processed else "raw",
        logprobs_temperature=arguments.temperature if is_processed else 1.0,
    )
