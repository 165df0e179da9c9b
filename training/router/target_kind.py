"""Names where a router's targets come from. Knows nothing else, so that the command line may import it."""

from enum import StrEnum


class TargetKind(StrEnum):
    """The combination that made a prompt's answer likeliest, or the domain that its record lies in."""

    DISCOVERED = "discovered"
    LABELS = "labels"
