"""Progress bars of long work over rows: they move with every row and show tokens a second."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from datasets.utils import are_progress_bars_disabled
from tqdm.auto import tqdm
from tqdm.std import tqdm as tqdm_without_screen
from transformers.utils.logging import is_progress_bar_enabled

from spec_kd.open_types import Call


class RowProgress:
    """A bar that is shown unless the bars of `datasets` or `transformers` are switched off.

    Args:
        total (`int`, *optional*): Rows of the whole work; `None` if unknown.
        description (`str`): Before the bar.
        is_shown (`bool`, *optional*, defaults to `True`): Whether this process shows it.
        num_done (`int`, *optional*, defaults to `0`): Rows that were done before; they count as no speed.
        unit (`str`, *optional*, defaults to `"rows"`): What is counted.

    Attributes:
        is_shown (`bool`): The argument.
        num_tokens (`int`): Tokens that it was told of.
        num_rows (`int`): Rows that it was told of.
    """

    def __init__(
        self, total: int | None, description: str, is_shown: bool = True, num_done: int = 0, unit: str = "rows"
    ):
        is_disabled = not is_shown or are_progress_bars_disabled() or not is_progress_bar_enabled()
        self._bar = tqdm(total=total, desc=description, unit=f" {unit}", initial=num_done, disable=is_disabled)
        self.is_shown, self.num_tokens, self.num_rows = is_shown, 0, 0
        self._start, self._num_parts = time.monotonic(), 0

    def __enter__(self) -> "RowProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, which stays on the screen."""
        self._bar.close()

    def advance(self, num_tokens: int = 0, num_rows: int = 1) -> None:
        """Counts tokens that were written, and rows that are done; drawn at most ten times a second."""
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        if self.num_tokens:
            seconds = max(time.monotonic() - self._start, 1e-9)
            parts = f"{self._num_parts} completions, " if self._num_parts else ""
            self._bar.set_postfix_str(f"{parts}{self.num_tokens / seconds:.3g} tokens/s", refresh=False)
        self._bar.update(num_rows)

    @contextmanager
    def batch(self, num_rows: int) -> Iterator[Callable[[int, int], None]]:
        """Rows that are done together; the block is given `advance`, to tell of each as it is done.

        Those that it was not told of count at the end, for work that is only known as a whole.
        """
        before = self.num_rows
        yield self.advance
        if rest := num_rows - (self.num_rows - before):
            self.advance(num_rows=rest)


class PartProgress(RowProgress):
    """Of work that is a part of other work: its completions and tokens are shown in the other's bar.

    Args:
        whole (`RowProgress`): The bar.
    """

    def __init__(self, whole: RowProgress):
        super().__init__(0, "", is_shown=False)
        self._whole = whole

    def advance(self, num_tokens: int = 0, num_rows: int = 1) -> None:
        """Counts completions of the part."""
        self.num_rows += num_rows
        self._whole._num_parts += num_rows
        self._whole.advance(num_tokens, 0)


def forward_updates(tell: Callable[[int, int], None]) -> "Call[tqdm_without_screen[NoReturn]]":
    """What a library makes a bar with (vLLM's `use_tqdm`), which tells of its rows and shows nothing."""

    class Forwarding(tqdm_without_screen):  # type: ignore[type-arg]  # takes none when the program runs
        def update(self, n: float | None = 1) -> bool | None:
            tell(0, int(n or 0))
            return super().update(n)

    return lambda *args, **options: Forwarding(*args, **{**options, "file": io.StringIO(), "disable": False})
