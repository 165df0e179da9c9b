"""What can go wrong while a prompt is routed or a router file is read. Knows no HTTP status; the server maps these.

RouterError
├── EmptyText               a text without tokens has nothing to route by
├── ScoresNotFinite         the features or the network made a score that is no number
├── CheckpointInvalid       a router file is damaged, incomplete or of another kind
└── CheckpointIncompatible  a sound router file of another base, or not the file that was asked for
"""


class RouterError(Exception):
    """Every error of this package."""


class EmptyText(RouterError):
    """The text has no tokens, so there is nothing to route by."""


class ScoresNotFinite(RouterError):
    """A score is NaN or infinite; the domains are named."""


class CheckpointInvalid(RouterError):
    """The router file breaks its format; the fault is named."""


class CheckpointIncompatible(RouterError):
    """The router file is sound but belongs to another base, or its digest is another one."""
