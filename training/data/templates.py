"""Makes a record of a row by the recipe's Jinja templates. Knows columns and texts, not where rows come from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.data.records import Record
from training.errors import BadRecord, DataUnusable, RecipeInvalid
from training.recipe import SourceSection

REQUIRED = ("instruction", "output")
OPTIONAL = ("input", "source")
TEMPLATES = ("instruction", "input", "output", "where")
WHOLE_ROW = "row"  # in a template: all columns, for names that are no identifiers
RANDOM_GLOBAL, RANDOM_FILTER = "lipsum", "random"
JINJA_NAMES = frozenset(DEFAULT_NAMESPACE) - {RANDOM_GLOBAL}  # `range` and the like, unless a column has the name
SHOWN_CHARACTERS = 100  # of a value that a message quotes
# What a template can raise over a row that is not as it expects.
TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class SourceTemplates:
    """How one source's rows become records."""

    label: str  # of the source, in messages
    templates: Mapping[str, Template]  # of those that the recipe gives
    columns: Mapping[str, frozenset[str]]  # template -> the columns that it names
    requires_text_source: bool  # a JSONL file is ours; a dataset's own column `source` may be anything

    def wanted_columns(self, there: Collection[str]) -> list[str]:
        """Of the columns there are, those that these templates read."""
        named = {name for names in self.columns.values() for name in names}
        plain = {name for name in (*REQUIRED, *OPTIONAL) if name not in self.templates}
        return [name for name in there if WHOLE_ROW in named - set(there) or name in named | plain]

    def require_columns(self, there: Collection[str]) -> None:
        """Raises DataUnusable that names the template, the column and the columns there are."""
        for template, names in self.columns.items():
            for column in sorted(names - {*there, WHOLE_ROW, *JINJA_NAMES}):
                raise DataUnusable(
                    f"{self.label}: template {template!r} reads column {column!r}; there are {sorted(there)}"
                )
        for field in REQUIRED:
            if field not in self.templates and field not in there:
                raise DataUnusable(
                    f"{self.label}: no template {field!r} and no column {field!r}; there are {sorted(there)}"
                )

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether `where` wants the row. Raises BadRecord."""
        return "where" not in self.templates or bool(self._render("where", row).strip())

    def record(self, row: Mapping[str, Any]) -> Record:
        """The row's record. Raises BadRecord that names the field, not the place."""
        texts = {name: self._text(name, row) for name in (*REQUIRED, *OPTIONAL)}
        return Record(**texts)

    def _text(self, field: str, row: Mapping[str, Any]) -> str:
        value = self._render(field, row) if field in self.templates else row.get(field)
        if field in OPTIONAL and value is None:  # a table has no other way to say that it is absent
            return ""
        if field == "source" and not isinstance(value, str) and not self.requires_text_source:
            return ""
        return require_text(field, value)

    def _render(self, name: str, row: Mapping[str, Any]) -> str:
        try:
            return self.templates[name].render({WHOLE_ROW: row, **row})
        except TEMPLATE_FAULTS as error:
            raise BadRecord(f"template {name!r}: {_shown(error)}") from error


def compile_templates(section: SourceSection, domain: str) -> SourceTemplates:
    """Compiles a source's templates once. Raises RecipeInvalid that names source, domain, template and fault."""
    label = f"source {section.name!r} of domain {domain!r}"
    records, where = _environment(finalize=_require_scalar), _environment(finalize=_nothing_if_false)
    given = {name: text for name in TEMPLATES if (text := getattr(section, name)) is not None}
    compiled: dict[str, Template] = {}
    columns: dict[str, frozenset[str]] = {}
    for name, text in given.items():
        environment = where if name == "where" else records
        try:
            compiled[name] = environment.from_string(text)
            columns[name] = frozenset(find_undeclared_variables(environment.parse(text)))
        except TemplateSyntaxError as error:
            raise RecipeInvalid(f"{label}: template {name!r} {text!r}: {error}") from error
    return SourceTemplates(label, compiled, columns, requires_text_source=section.file is not None)


def require_text(field: str, value: object) -> str:
    """The value of a field, if it is text that a tokenizer can read. Raises BadRecord."""
    if field in REQUIRED and (not isinstance(value, str) or not value.strip()):
        raise BadRecord(f"field {field!r} must be a non-empty string, got {_shown(value)}")
    if not isinstance(value, str):
        raise BadRecord(f"field {field!r} must be a string, got {_shown(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRecord(f"field {field!r} holds half a surrogate pair, which no encoding can write")
    return value


def _environment(*, finalize: Any) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=finalize
    )
    # The same recipe and files give the same records, so nothing may draw at random.
    del environment.globals[RANDOM_GLOBAL], environment.filters[RANDOM_FILTER]
    return environment


def _require_scalar(value: Any) -> Any:
    if isinstance(value, str | int | float | Undefined):
        return value
    raise TypeError(f"prints {_shown(value)}, which is no text")


def _nothing_if_false(value: Any) -> Any:
    return value if value else ""


def _shown(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
