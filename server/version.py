"""The version of the package that runs."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """A checkout that was never installed has none."""
    try:
        return version("brainstacks")
    except PackageNotFoundError:
        return "uninstalled"
