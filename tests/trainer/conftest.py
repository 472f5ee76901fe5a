import pytest
import torch
from datasets import Dataset


def make_rows(count: int, seed: int = 0, vocab_size: int = 261, max_completion: int = 12) -> list[dict]:
    """Random prompts and completions of very different lengths, EOS (id 1) at the end of each completion."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, vocab_size, (length,), generator=generator).tolist()

    return [{"prompt_ids": draw(2, 10), "completion_ids": [*draw(1, max_completion), 1]} for _ in range(count)]


@pytest.fixture
def rows():
    return make_rows(16)


@pytest.fixture
def dataset(rows):
    return Dataset.from_list(rows)


@pytest.fixture
def options(tmp_path):
    """Arguments of a small, exact, silent run."""
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


@pytest.fixture
def reference_loss():
    """The white-box loss of a batch of rows in float64, from full logits of both models and autograd."""
    from spec_kd.losses import dense_divergence

    def compute(draft, teacher, rows, vocab_size=261, divergence="forward_kl", temperature=1.0):
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            start = len(row["prompt_ids"]) - 1
            z = draft(input_ids=ids).logits[0, start:-1, :vocab_size].double()
            with torch.no_grad():
                t = teacher(input_ids=ids).logits[0, start:-1, :vocab_size].double()
            total = total + dense_divergence(z, t, divergence, temperature=temperature).sum()
            count += z.shape[0]
        return total / count

    return compute
