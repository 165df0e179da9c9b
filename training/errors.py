"""Names what can go wrong in training.

TrainingError
├── RecipeInvalid     a recipe file has a missing, unknown or impossible setting
├── BadRecord         a data record cannot be used; names file, line and field
└── TrainingDiverged  a loss was not finite, or no evaluation beat the base: there is nothing to keep
"""


class TrainingError(Exception):
    """Root of everything that training raises on purpose."""


class RecipeInvalid(TrainingError):
    """A recipe has a missing, unknown or impossible setting."""


class BadRecord(TrainingError):
    """A data record cannot be used."""


class TrainingDiverged(TrainingError):
    """A loss was not finite, or no evaluation beat the base: there is nothing worth keeping."""
