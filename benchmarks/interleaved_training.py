"""Several trainers in one process, an optimizer step each in turn, so that a drift of the machine meets all alike.

Each trains in a thread of its own, of which one runs at a time. A step's clock goes from the end of the step before to
its own end, whatever a trainer does in between and where: data, generation, teacher, loss, update, logging.
"""

import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback

GENERATION, TEACHER, LOSS, OPTIMIZER, OTHER = (
    "generation", "teacher", "draft forward, loss, backward", "optimizer", "other"
)  # fmt: skip
PARTS = (GENERATION, TEACHER, LOSS, OPTIMIZER, OTHER)


class Stopwatch:
    """Seconds of methods by part of a step; of methods that call each other, each has its own time only."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def measure(self, owner: Any, method: str, part: str) -> None:
        """Replaces a method of one object by itself, timed."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args, **kwargs):
            self._book()
            self._running.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._book()
                self._running.pop()

        setattr(owner, method, timed)

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class Turns:
    """Whose turn it is, of threads that each have a name."""

    def __init__(self, names: list[str]):
        self._order = deque(names)
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Returns when it is the turn of `name`."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)

    def pass_on(self, name: str) -> None:
        """Gives the turn to the next and returns when it has come round."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()
        self.wait(name)

    def leave(self, name: str) -> None:
        """Takes `name` out."""
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()


class StepRecorder(TrainerCallback):
    """What every optimizer step of a trainer took, and what it was over.

    Tokens are counted for every trainer alike, where its loss is computed: positions of the loss, which are the tokens
    generated where every step has completions of its own.

    Args:
        name (`str`): Of the trainer.
        trainer (`Trainer`): Its loss, draft and optimizer are timed from here on.
        target (`PreTrainedModel`): Its teacher.
        turns (`Turns`): Shared with the other trainers.
        evaluate (`Callable`, *optional*): Called with the draft after every `eval_steps` steps, with the clock stopped.
        eval_steps (`int`): See `evaluate`.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        target: PreTrainedModel,
        turns: Turns,
        evaluate: Callable[[PreTrainedModel], Any] | None = None,
        eval_steps: int = 1,
    ):
        self.name, self.steps, self.evaluations = name, [], []
        self._turns, self._evaluate, self._eval_steps = turns, evaluate, eval_steps
        self._watch, self._counts = Stopwatch(), Counter()
        self._started = 0.0
        compute_loss = trainer.compute_loss

        def counted(model, inputs, *args, **kwargs):
            self._counts.update(count_tokens(inputs))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted
        self._watch.measure(trainer, "compute_loss", LOSS)
        self._watch.measure(trainer.accelerator, "backward", LOSS)
        self._watch.measure(trainer.accelerator, "clip_grad_norm_", OPTIMIZER)
        self._watch.measure(trainer.model, "generate", GENERATION)
        for module in (target, target.base_model):  # some run the whole model, some the backbone alone
            self._watch.measure(module, "forward", TEACHER)
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, optimizer, **_):
        self._watch.measure(optimizer, "step", OPTIMIZER)
        self._start()

    def on_step_end(self, args, state, control, model, **_):
        seconds = time.perf_counter() - self._started
        parts = dict(self._watch.seconds)
        parts[OTHER] = seconds - sum(parts.values())
        self.steps.append({"seconds": seconds, "parts": parts, **self._counts})
        if self._evaluate is not None and state.global_step % self._eval_steps == 0:
            self.evaluations.append({"step": state.global_step, "result": self._evaluate(model)})
        self._turns.pass_on(self.name)
        self._start()

    def _start(self) -> None:
        self._watch.seconds.clear()
        self._counts.clear()
        self._started = time.perf_counter()


def count_tokens(inputs: dict[str, Any]) -> dict[str, int]:
    """Completion and prompt tokens of what a trainer computes its loss over."""
    if "prompt_mask" in inputs:  # of TRL's DistillationTrainer
        return {"tokens": int(inputs["completion_mask"].sum()), "prompt_tokens": int(inputs["prompt_mask"].sum())}
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    return {"tokens": tokens, "prompt_tokens": int(inputs["attention_mask"].sum()) - tokens}


def train_in_turns(
    trainers: dict[str, tuple[Trainer, PreTrainedModel]],
    evaluate: Callable[[PreTrainedModel], Any] | None = None,
    eval_steps: int = 1,
) -> dict[str, dict[str, list]]:
    """Trains all of them to the end; `steps` and `evaluations` of each, as [`StepRecorder`] notes them.

    Args:
        trainers (`dict[str, tuple[Trainer, PreTrainedModel]]`): Trainers, each with its own teacher, by their names.
        evaluate (`Callable`, *optional*): As for [`StepRecorder`].
        eval_steps (`int`): As for [`StepRecorder`].

    Raises:
        RuntimeError: If they did not read the same prompts in the same steps.
    """
    turns = Turns(list(trainers))
    recorders = [
        StepRecorder(name, trainer, target, turns, evaluate, eval_steps) for name, (trainer, target) in trainers.items()
    ]

    def train(name: str) -> None:
        turns.wait(name)
        try:
            trainers[name][0].train()
        finally:
            turns.leave(name)

    with ThreadPoolExecutor(len(trainers)) as pool:
        for future in [pool.submit(train, name) for name in trainers]:
            future.result()
    check_same_prompts({recorder.name: recorder.steps for recorder in recorders})
    return {r.name: {"steps": r.steps, "evaluations": r.evaluations} for r in recorders}


def check_same_prompts(steps: dict[str, list[dict]]) -> None:
    """Raises `RuntimeError` unless all steps were over prompts of the same length in sum."""
    read = {name: [step["prompt_tokens"] for step in own] for name, own in steps.items()}
    if len(set(map(tuple, read.values()))) > 1:
        raise RuntimeError(f"The trainers read different prompts, so their speeds do not compare. Tokens: {read}")
