"""Names what can go wrong in training.

TrainingError
├── RecipeInvalid     a recipe file has a missing, unknown or impossible setting
├── BadRecord         a data record cannot be used; names file, line and field
└── TrainingDiverged  no validation loss was finite, so there is no stack to keep
"""


class TrainingError(Exception):
    """Root of everything that training raises on purpose."""


class RecipeInvalid(TrainingError):
    """A recipe has a missing, unknown or impossible setting."""


class BadRecord(TrainingError):
    """A data record cannot be used."""


class TrainingDiverged(TrainingError):
    """No validation loss was finite: there is no stack worth keeping."""
