"""Names what can go wrong in training.

TrainingError
├── RecipeInvalid     a recipe file has a missing, unknown or impossible setting
├── BadRecord         a data record cannot be used; names file, line and field
├── DataUnusable      a domain's data as a whole cannot be used: too many bad records, nothing left, no such dataset
├── ProtectedSpaceInvalid  a file of directions is not what this version writes, or not of this base
├── ReportInvalid     a report in a store is not what this version writes
└── TrainingDiverged  a loss was not finite, or no evaluation beat the base: there is nothing to keep
"""


class TrainingError(Exception):
    """Root of everything that training raises on purpose."""


class RecipeInvalid(TrainingError):
    """A recipe has a missing, unknown or impossible setting."""


class BadRecord(TrainingError):
    """A data record cannot be used."""


class DataUnusable(TrainingError):
    """A domain's data as a whole cannot be used."""


class ProtectedSpaceInvalid(TrainingError):
    """A file of directions is not what this version writes, or not of this base."""


class ReportInvalid(TrainingError):
    """A report in a store is not what this version writes."""


class TrainingDiverged(TrainingError):
    """A loss was not finite, or no evaluation beat the base: there is nothing worth keeping."""
