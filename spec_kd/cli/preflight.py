"""What can be known of a recipe from its files and tokenizers, before the first step."""

from typing import TYPE_CHECKING

from spec_kd.cli import queries
from spec_kd.cli.recipe import Recipe, naming
from spec_kd.cli.respond import RespondCall
from spec_kd.cli.sources import check_exists

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
    from spec_kd.trainer.cached_teacher import check_cached_teacher
    from spec_kd.trainer.draft_trainer import get_load_options
    from spec_kd.vocabulary import check_same_tokenizer

    method, config, draft = recipe.train.method, recipe.train.config, recipe.train.draft
    for name, part in recipe.parts.items():
        with naming(f"queries: {name}"):
            queries.check_part(part)
    with naming("target"):
        recipe.evaluate[1].check()
        processing_class = recipe.evaluate[1].load_processing_class()
        if not getattr(processing_class, "chat_template", None):
            raise ValueError(f"the tokenizer of `{recipe.evaluate[1].target}` has no chat template.")
    with naming("draft"):
        check_exists(draft.model_name_or_path)
        draft_class = load_tokenizer(
            draft.model_name_or_path, get_load_options(config, {"revision": draft.model_revision})
        )
        if method != "black-box":
            check_same_tokenizer(draft_class, processing_class)
    with naming("train"):
        is_cached = method == "white-box" and config.teacher_model_name_or_path is None
        if is_cached and recipe.respond is not None and (info := describe_signal(recipe.respond, processing_class)):
            check_cached_teacher(info, config.build_loss(), processing_class)
    with naming("evaluate"):
        prompts = recipe.evaluate[0].prompts
        if not prompts.startswith(f"{recipe.output_dir}/"):
            check_exists(prompts)


def describe_signal(call: RespondCall, processing_class: "ProcessingClass") -> "TeacherInfo | None":
    """What the responses will say of their teacher signal, or `None` where they will have none."""
    from spec_kd.data.teacher_signal import TeacherInfo
    from spec_kd.vocabulary import count_real_ids, fingerprint_tokenizer

    arguments, target = call
    signal = arguments.build_signal()
    if signal is None:
        return None
    is_processed = (
        arguments.temperature > 0
        and {
            "transformers": True,
            "vllm": target.engine_kwargs.get("logprobs_mode", "processed_logprobs") == "processed_logprobs",
            "server": target.engine_kwargs.get("logprobs_are", "raw") == "processed",
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
        logprobs_are="processed" if is_processed else "raw",
        logprobs_temperature=arguments.temperature if is_processed else 1.0,
    )
