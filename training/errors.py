"""Names what can go wrong in training.

TrainingError
├── RecipeInvalid     a recipe file has a missing, unknown or impossible setting
├── BadRecord         a data record cannot be used; names file, line and field
├── DataUnusable      a domain's data as a whole cannot be used: too many bad records, nothing left, no such dataset
├── ProtectedSpaceInvalid  a file of directions is not what this version writes, or not of this base
├── ReportInvalid     a report in a store is not what this version writes
├── DiscoveryInvalid  outcomes or measured losses are damaged, or of other stacks than the store's
├── FeaturesInvalid   a file of features to use again is damaged or foreign
├── RouterNotExtendable  a router cannot take a domain: it has it, or its old domains are not what they were
├── EvaluationInvalid  an evaluation asks for what cannot be measured: a mode, a task, its data, a text's length
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


class DiscoveryInvalid(TrainingError):
    """Outcomes or measured losses are damaged, or of other stacks than the store's."""


class FeaturesInvalid(TrainingError):
    """A file of features to use again is damaged or foreign."""


class RouterNotExtendable(TrainingError):
    """A router cannot take a domain: it has it already, or its old domains are not what they were."""


class EvaluationInvalid(TrainingError):
    """An evaluation asks for what cannot be measured; names the mode, task, record or file."""


class TrainingDiverged(TrainingError):
    """A loss was not finite, or no evaluation beat the base: there is nothing worth keeping."""
