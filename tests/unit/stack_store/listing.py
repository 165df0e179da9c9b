"""What a folder holds, to the byte: for tests that compare before with after."""

from pathlib import Path


def list_store(path: Path) -> dict[str, bytes | None]:
    """Relative path -> content, None for a folder."""
    return {
        str(inner.relative_to(path)): None if inner.is_dir() else inner.read_bytes()
        for inner in sorted(path.rglob("*"))
    }
