"""A cell of an experiment: one draft, trained and measured, and what it is known by in the record."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .profile import Profile
from .record import Record, compute_hash

WHITE_BOX, BLACK_BOX = "white_box", "black_box"
STEPS, WALL_CLOCK = "steps", "wall_clock"
RESULT, DIVERGED = "cell", "diverged"  # kinds of lines that a cell leaves in the record


@dataclass(frozen=True)
class Cell:
    """One trained and measured draft.

    Args:
        domain (`str`): Name.
        num_prompts (`int`): Queries that it learns from.
        scenario (`str`): One of `data.SCENARIOS` or a mix of the profile.
        method (`str`): `"white_box"`, `"black_box"` or an online method of the profile.
        divergence, token_selection (`str`): As of `WhiteBoxDistillConfig`.
        signal (`str`, *optional*): A cached teacher's signal of the profile; the live teacher by default.
        completion_temperature (`float`): At which the target wrote its answers.
        adapter (`str`, *optional*): An adapter of the profile; full fine-tuning by default.
        draft (`str`): Which generic draft it begins with.
        polish (`str`, *optional*): Online method of the last part.
        polish_share (`float`): Which share of the steps that part has.
        options (`dict`): Of the trainer's configuration, in place of the profile's.
        budget (`str`): `"steps"`: as many as every other cell; `"wall_clock"`: as long as the domain's base cell, the
            target's answers included.
        split (`str`): `"test"` or `"validation"`.
        seed (`int`): Of the choice among the queries, their order and sampling.
    """

    domain: str
    num_prompts: int
    scenario: str = "historical"
    method: str = WHITE_BOX
    divergence: str = "forward_kl"
    token_selection: str = "all"
    signal: str | None = None
    completion_temperature: float = 1.0
    adapter: str | None = None
    draft: str = "default"
    polish: str | None = None
    polish_share: float = 0.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    budget: str = STEPS
    split: str = "test"
    seed: int = 0

    @property
    def phases(self) -> list[tuple[str, float]]:
        """Methods one after the other, with their shares of the steps."""
        if self.polish is None:
            return [(self.method, 1.0)]
        return [(self.method, 1.0 - self.polish_share), (self.polish, self.polish_share)]

    @property
    def reads_answers(self) -> bool:
        """Whether it needs what the target answered before."""
        return self.method in (WHITE_BOX, BLACK_BOX)


def make_base(profile: Profile, domain: str) -> Cell:
    """Offline forward KL on historical queries with the live teacher: what everything is compared with."""
    return Cell(domain, profile.plan.num_prompts)


def describe_changes(changes: dict[str, Any]) -> str:
    """Changes of the base cell in words."""
    parts = []
    for name, value in changes.items():
        parts += [f"{n}={v}" for n, v in value.items()] if name == "options" else [f"{name}={value}"]
    return ", ".join(parts)


def apply_changes(cell: Cell, changes: dict[str, Any]) -> Cell:
    """The cell with changes, at the base cell's wall-clock; `options` are added to its own."""
    options = {**cell.options, **changes.get("options", {})}
    return replace(cell, **{**changes, "options": options}, budget=WALL_CLOCK)


def compute_key(profile: Profile, cell: Cell) -> str:
    """Hash of everything that decides the result of a cell, and of nothing else."""
    data, training, build = (
        {} if part is None else asdict(part) for part in (profile.data, profile.training, profile.build)
    )
    data.pop("folder")
    signals, adapters, length_ordered = (training.pop(name) for name in ("signals", "adapters", "length_ordered"))
    for name in ("options", "learning_rates", "online"):
        training.pop(name)
    changed = asdict(cell)
    changed.pop("options")
    changed["answer_temperature"] = changed.pop("completion_temperature")  # the name that the record's keys are made of
    options = [profile.training.find_options(cell.domain, method, cell.options) for method, _ in cell.phases]
    used = [options, signals.get(cell.signal), adapters.get(cell.adapter)]
    used += ["length_ordered"] if cell.domain in length_ordered else []
    draft = build.pop("drafts", {}).get(cell.draft)
    weights = profile.plan.mixes.get(cell.scenario)
    return compute_hash(changed, data, profile.domains[cell.domain], training, used, build, draft, weights)


def find_outcomes(profile: Profile, record: Record, cell: Cell) -> dict[str, dict[str, Any]]:
    """By build, the cell's result or the line that says that its loss diverged."""
    key = compute_key(profile, cell)
    return {**record.find_builds(DIVERGED, key), **record.find_builds(RESULT, key)}
