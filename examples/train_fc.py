"""Distills a function-calling target into its draft: completions, training, acceptance before and after.

With no argument: the embedded default. Small models and conversations made on the spot, no network, no GPU:

    accelerate launch examples/train_fc.py

With models and data of your own:

    accelerate launch examples/train_fc.py --config examples/configs/function_calling.yaml
    accelerate launch examples/train_fc.py \
        --teacher_model_name_or_path my-org/target --model_name_or_path my-org/draft \
        --dataset_name my-org/function-calling --output_dir fc-draft --align_vocabulary
"""

import sys
from dataclasses import fields

from datasets import Dataset
from made_up import embedded_run
from made_up.arguments import ExampleArguments, load_data, load_target, parse_arguments
from made_up.record import ExampleResult, save_run
from trl import ModelConfig, get_peft_config, get_quantization_config

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    SpeculativeEvalCallback,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.losses import SPARSE_METHODS
from spec_kd.prompts.splitting import hold_out_rows

DOMAIN = embedded_run.FUNCTION_CALLING


def main(argv: list[str], domain: embedded_run.Domain = DOMAIN) -> ExampleResult:
    options, training, model = parse_arguments(argv, {**embedded_run.DEFAULTS, "output_dir": domain.output_dir})
    if model.model_name_or_path is not None:
        return distill(options, training, model, *load_data(options))
    run = embedded_run.prepare(domain, training.seed)
    model.model_name_or_path, training.teacher_model_name_or_path = run.models.generic_draft, run.models.domain_target
    return distill(options, training, model, run.train_prompts, run.test_prompts, run)


def distill(
    options: ExampleArguments,
    training: WhiteBoxDistillConfig,
    model: ModelConfig,
    train_prompts: Dataset,
    test_prompts: Dataset,
    run: embedded_run.EmbeddedRun | None = None,
) -> ExampleResult:
    signal = options.stored_signal
    if signal is not None:
        training.build_loss().check_served_by(SPARSE_METHODS[signal])
    target, tokenizer = load_target(training)
    rows = train_prompts.select(range(min(options.num_train_prompts or len(train_prompts), len(train_prompts))))
    test_prompts = test_prompts.select(range(min(options.num_eval_prompts, len(test_prompts))))

    # 1. The target completes the prompts and stores its distribution at every token. A killed run continues.
    if options.generate_responses:
        with training.main_process_first(desc="target responses"):  # the other processes read what the first one wrote
            rows = generate_responses(
                target,
                rows,
                processing_class=tokenizer,
                max_new_tokens=options.max_new_tokens,
                temperature=options.response_temperature,
                batch_size=options.generation_batch_size,
                seed=training.seed,
                teacher_signal=signal,
                output_dir=f"{training.output_dir}/responses",
            )

    # 2. The callback measures acceptance on the test prompts before, during and after the training.
    columns = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in test_prompts.column_names]
    callback = SpeculativeEvalCallback(
        test_prompts.select_columns(columns),
        target,
        num_assistant_tokens=options.num_assistant_tokens,
        max_new_tokens=options.max_new_tokens,
        processing_class=tokenizer,
        batch_size=options.generation_batch_size,
    )

    # 3. The draft learns the target's distribution, or its tokens.
    held_out, train_rows = hold_out_rows(rows, min(64, max(1, len(rows) // 20)))  # for `eval_loss`
    common = {
        "model": model.model_name_or_path,
        "train_dataset": train_rows,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model),
        "quantization_config": get_quantization_config(model),
        "callbacks": [callback],
    }
    training.teacher_model_name_or_path = training.teacher_model_init_kwargs = None  # the target is loaded already
    if options.method == "white_box" and signal is None:
        trainer = WhiteBoxDistillTrainer(args=training, teacher_model=target, **common)
    else:
        training.target_vocab_size = target.config.get_text_config().vocab_size
        if options.method == "white_box":
            trainer = WhiteBoxDistillTrainer(args=training, **common)
        else:
            shared = {one.name: getattr(training, one.name) for one in fields(BlackBoxSFTConfig) if one.init}
            trainer = BlackBoxSFTTrainer(args=BlackBoxSFTConfig(**shared), **common)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)

    # 4. The draft is saved as servers load it, with a model card.
    trainer.save_model()
    trainer.create_model_card(dataset_name=options.dataset_name)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=options.dataset_name)

    result = ExampleResult(trainer, target, callback.history)
    if trainer.is_world_process_zero():
        if run is None:
            save_run(result, {"before": result.before, "after": result.after}, options, training)
        else:
            curve = run.models.draft_curve
            save_run(result, run.compare(result, options), options, training, draft_held_out_loss=curve)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
