"""What a training command may fail with and says in one line. Knows the console, not the commands."""

from rich.console import Console
from rich.markup import escape

from engine.errors import EngineError
from router.errors import RouterError
from stack_store.errors import StoreError
from training.errors import TrainingError

EXPECTED_ERRORS = (TrainingError, StoreError, EngineError, RouterError)


def show_error(error: Exception) -> None:
    """On standard error, by every worker for itself: another's console may be quiet."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
