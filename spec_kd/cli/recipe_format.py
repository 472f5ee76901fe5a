"""A recipe is one YAML file for a whole pipeline: from prompts to a draft that an engine serves.

```yaml
target: my-org/Qwen2.5-7B-medical      # folder or name on the Hub; or a mapping, see below
draft: Qwen/Qwen2.5-0.5B-Instruct      # folder or name on the Hub; or a section `init`, see below
output_dir: runs/medical               # gets one folder for each step
seed: 0                                # seed of every step that sets none

prompts:                               # one or several parts, each with the options of its command
  historical:                          # options of `spec-kd prompts logs`
    paths: [logs/2026-*.jsonl.gz]
    redact: [email, phone]
  curated:                             # options of `spec-kd prompts curated`
    dataset: my-org/medical-questions
    prompt_column: question
  synthetic:                           # options of `spec-kd synthesize`
    num_queries: 5000
  leaflets:                            # a part with another name says its scenario
    scenario: curated
    dataset: data/leaflets.jsonl
  mix:                                 # options of `spec-kd prompts mix`; may be left out
    weights: {historical: 0.5, curated: 0.2, synthetic: 0.2, leaflets: 0.1}
    num_prompts: 20000

respond:                               # options of `spec-kd respond`; or `false`, see below
  temperature: 1.0
  max_new_tokens: 512
  teacher_signal: sampled_logprobs     # without it, training loads the target

pretrain:                              # options of `spec-kd train white_box`; may be left out, see below
  corpus: my-org/medical-articles      # text that the target did not write
  score: {teacher_signal: top_k_tail}  # options of `spec-kd score`; without it, training loads the target
  max_train_tokens: 50_000_000

train:                                 # `method`, and the options of `spec-kd train METHOD`
  method: white_box                    # white_box, black_box or online_gkd
  divergence: forward_kl
  learning_rate: 2e-5
  num_train_epochs: 3
  save_steps: 200                      # a stopped training continues from the last checkpoint

evaluate:                              # options of `spec-kd evaluate`
  serving_engine: vllm
  num_prompts: 200                     # the default of a recipe
  fail_under: {block_efficiency: 2.5}  # exit status 3 below it

export:                                # options of `spec-kd export`
  serving_engines: [vllm]              # the default is the engine of `evaluate`

check:                                 # options of `spec-kd check-serving`; may be empty

observe:                               # options of `spec-kd observe`, for servers that run by then
  url: http://localhost:8000           # with the draft
  plain_url: http://localhost:8001     # without it
```

`target`, `output_dir`, `prompts`, `train` and one of `draft`, `init` and `plan` are required. The steps run in this
order: prompts, respond, plan, init, pretrain, train, evaluate, export, check, costs, observe. Those without a section
are left out, but for `respond` and `evaluate`, which have defaults. If no shape of `plan` can pay, a threshold of
`fail_under` is not reached, or `check` finds an error, the steps after it do not run, and the exit status is 3.

**Paths.** A relative path of an input is relative to the folder of the recipe. A name such as `my-org/target` is a path
if that folder has a file or folder of this name, and otherwise a name on the Hub. `output_dir` is relative to the
working directory, as it is for every command. `~` is the home folder. Logs, datasets and a corpus may lie at addresses
such as `s3://my-bucket/logs`; `output_dir` is a folder of this machine.

**Target.** As a mapping, `target` has a `name` and the engine that runs it for synthesis, responses and evaluation:
`{name: my-org/target, engine: server, base_url: "http://localhost:8000/v1"}`. `spec-kd respond --help` lists its other
options. A section may set another `engine` for itself. Training loads a live target with transformers.

**Responses.** `respond: false` trains on the completions that the prompts come with: those of logs, and those of
curated datasets with `keep_completions: true`.

**A draft of your own.** A section `init`, in place of `draft`, makes the draft from the target, or from another
`donor`, with the options of `spec-kd init-draft`: `init: {num_hidden_layers: 4, hidden_size: 192}`. The responses are
its sample text. A section `plan`, with the options of `spec-kd plan-draft`, chooses the shape: by costs in the
llama.cpp of `export` if there is one, and with `run_minutes` by short runs on the responses. `init` then says no shape,
and may be left out.

**Text of others first.** A section `pretrain` trains the draft of `draft`, `init` or `plan` on every token of a corpus,
and `train` goes on with the result. With `score` the target reads the corpus once, into `corpus` in `output_dir`. Rows
are packed, and long texts are split, unless the section says otherwise.

**In the engine.** `export` writes the draft and its `serving.json` to `exported`, with the acceptance that the
evaluation found if it was for the same engine. `observe` asks the first 100 test prompts. With `llama_cpp_dir` in
`export`, `serving_engine: llama.cpp` and no `url`, it starts two llama-servers, with the draft and without it.
`server_flags`, `context_length` (2048 tokens) and `server`, the program, say how. Their rounds are timed before that,
with the options of `spec-kd measure-costs` in a section `costs`, so that the run ends with a predicted and an observed
speed-up. `costs: false` leaves that out. From a target alone to a server:

```yaml
target: my-org/Qwen2.5-7B-medical
output_dir: runs/medical
prompts: {synthetic: {num_queries: 5000}}
plan: {run_minutes: 10}
train: {method: white_box, learning_rate: 1e-3, num_train_epochs: 5}
evaluate: {serving_engine: llama.cpp}
export: {llama_cpp_dir: ~/llama.cpp, quantization: Q8_0}
check:
costs: {context_length: 512}
observe: {server_flags: "--threads 4"}
```

**Drafted tokens.** Unless `evaluate` sets `num_assistant_tokens` and `costs`, it takes them from the plan. Its report
says which number of drafted tokens is predicted to be the fastest for the temperature and the concurrency of `observe`.
That number goes on to `export`, `check`, `costs` and `observe`, except to a section that sets its own. If the report
recommends a probability below which drafts end, that goes on too: to the command of `export` and to the server that
`observe` starts. If `evaluate` sets `num_assistant_tokens`, that number goes on alone. Without a plan, `evaluate`
measures costs in transformers, or takes yours. For those of llama.cpp, plan a single shape: `plan: {shapes: [192x4]}`.

**Time.** Before its first step, and again before training, a run prints what is known of the time of each step.
Budgets, such as `max_train_minutes` and the plan's `run_minutes`, are known in minutes. `--only_check` prints the same.

**A quick run.** With `--quick` the values of a section `quick` replace those of the recipe, such as
`quick: {train: {max_train_minutes: 5}, observe: {num_prompts: 20}}`. The run has a folder of its own, whose name is
that of `output_dir` with `-quick` after it.

**Test prompts.** `evaluate` uses the test prompts of all parts unless it sets `prompts`. Synthetic prompts that repeat
one of them are dropped, unless the part sets its own `test_sets`.

**Set by the recipe.** `output_dir`, `target`, `drafts` and what one step reads of another are refused in a section.
Leave `bf16` out as well: it is on where there is a GPU, and an error where there is none.

**Several GPUs.** A recipe runs in one process. To train on several GPUs, run
`accelerate launch -m spec_kd.cli train ...` on the responses. If vLLM does not free its memory and training runs out of
it, the same command continues with the training.

**Steps.** `.step.json` in the folder of a step records what the step was made from: the options that are not defaults,
and hashes of the files that it reads. If an input changes, the steps that depend on it run again and no others. The old
results move to `replaced/` in `output_dir`. Versions of libraries and of this package do not count: delete a folder to
run its step again.
"""
