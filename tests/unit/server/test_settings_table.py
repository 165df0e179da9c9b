"""The page of settings is made from the code."""

from pathlib import Path

from pydantic import BaseModel

from server.config import Settings
from server.settings_table import DEFAULT_SAID, settings_page

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text() == settings_page(), "make it anew: python -m server.settings_table > docs/settings.md"


def test_every_setting_says_what_it_is() -> None:
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        for key, setting in field.annotation.model_fields.items():
            assert DEFAULT_SAID.sub("", setting.description or ""), f"{section}.{key} has no description"


def test_secrets_have_no_default_to_show() -> None:
    page = settings_page()
    assert "| `server.admin_key` | `BRAINSTACKS_SERVER__ADMIN_KEY` | text | none |" in page
