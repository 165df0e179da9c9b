"""Settings: order of sources, and the names of mistakes."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.config import demo_store_path, load_settings
from server.errors import ConfigInvalid


def toml(folder: Path, text: str) -> Path:
    """A config file."""
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_flags_beat_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(tmp_path, '[server]\nhost = "file"\nport = 1\nmax_queue = 7\n')
    monkeypatch.setenv("BRAINSTACKS_SERVER__HOST", "env")
    monkeypatch.setenv("BRAINSTACKS_SERVER__PORT", "2")
    server = load_settings(config, {"server": {"port": 3}}).server
    assert (server.host, server.port, server.max_queue) == ("env", 3, 7)


def test_defaults_need_nothing() -> None:
    settings = load_settings()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert settings.server.admin_key is None
    assert settings.engine.max_batch_rows == 16


def test_keys_are_separated_by_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__API_KEYS", "one, two,")
    assert load_settings().server.api_keys == ["one", "two"]


@pytest.mark.parametrize("keys", ['["one", ""]', '[" "]', '" , "'])
def test_empty_key_is_refused(tmp_path: Path, keys: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"server\.api_keys"):
        load_settings(toml(tmp_path, f"[server]\napi_keys = {keys}\n"))


def test_commas_alone_do_not_open_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__API_KEYS", ",")
    with pytest.raises(ConfigInvalid, match=r"server\.api_keys"):
        load_settings()


def test_empty_variable_is_as_if_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_STORE__IMPORT_ROOT", "")
    assert load_settings().store.import_root is None


def test_store_of_a_checkout_is_not_its_demo_store(tmp_path: Path) -> None:
    demo, store = demo_store_path(), load_settings().store
    assert demo is not None, "the tests run in a checkout"
    assert (store.path, store.is_default_path) == (demo.parent.parent / "store", True)
    assert not load_settings(flags={"store": {"path": tmp_path}}).store.is_default_path


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("BRAINSTACKS_SEVRER__PORT", "unknown section 'sevrer'"),
        ("BRAINSTACKS_SERVER__PROT", "unknown key 'prot'"),
        ("BRAINSTACKS_PORT", "unknown section 'port'"),
        ("BRAINSTACKS_SERVER", "unknown key ''"),
        ("BRAINSTACKS_SERVER__PORT__NUMBER", "unknown key 'port__number'"),
    ],
)
def test_mistyped_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, named: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigInvalid, match=f"{variable}: {named}"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nprot = 1\n", "server.prot: unknown setting"),
        ("[sevrer]\nport = 1\n", "sevrer: unknown setting"),
        ('[server]\nport = "many"\n', "server.port: .*'many'"),
        ("[server]\nport = 70000\n", "server.port: .*70000"),
        ("[engine]\nmax_batch_rows = 0\n", "engine.max_batch_rows: .*0"),
        ('[log]\nlevel = "loud"\n', "log.level: .*'loud'"),
        ("[server\n", "does not parse"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid, match=named):
        load_settings(toml(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"nowhere\.toml' does not exist"):
        load_settings(tmp_path / "nowhere.toml")


def test_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_ENGINE__MAX_BATCH_ROWS", "few")
    with pytest.raises(ConfigInvalid, match=r"engine\.max_batch_rows: .*'few'"):
        load_settings()


def test_keys_are_not_told_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__ADMIN_KEY", "secret")
    monkeypatch.setenv("BRAINSTACKS_SERVER__PORT", "many")
    with pytest.raises(ConfigInvalid) as raised:
        load_settings()
    assert "secret" not in str(raised.value)
    monkeypatch.delenv("BRAINSTACKS_SERVER__PORT")
    assert "secret" not in repr(load_settings())


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.server.port = 1


def test_object_roots_are_separated_by_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_STORE__OBJECT_ROOTS", "s3://a/b, file:///mnt/")
    monkeypatch.setenv("BRAINSTACKS_STORE__OBJECT_OPTIONS", '{"s3": {"anon": true}}')
    store = load_settings().store
    assert store.object_roots == ["s3://a/b/", "file:///mnt/"]
    assert store.object_options == {"s3": {"anon": True}}


def test_object_storage_is_off_by_default() -> None:
    assert (load_settings().store.object_roots, load_settings().store.object_options) == ([], {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('object_roots = ["s3://KEY:SECRET@a/"]', "store.object_roots: .*contains credentials"),
        ('object_roots = ["/mnt"]', "store.object_roots: .*root '/mnt' must be SCHEME://PLACE/NAME"),
        ('object_options = { s3 = "SECRET" }', "store.object_options.s3: "),
    ],
)
def test_bad_object_setting_is_named_without_secrets(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid, match=named) as error:
        load_settings(toml(tmp_path, f"[store]\n{text}\n"))
    assert "SECRET" not in str(error.value)


def test_admin_key_that_is_an_api_key_too_is_refused_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__API_KEYS", "one,same-secret")
    monkeypatch.setenv("BRAINSTACKS_SERVER__ADMIN_KEY", "same-secret")
    with pytest.raises(ConfigInvalid, match=r"server\.admin_key: .*must not be one of server\.api_keys") as error:
        load_settings()
    assert "same-secret" not in str(error.value)


@pytest.mark.parametrize("key", ['api_keys = ["secret "]', 'admin_key = "secret\\n"'])
def test_a_key_that_nobody_could_send_is_refused_untold(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigInvalid, match="a key must not begin or end with white space") as error:
        load_settings(toml(tmp_path, f"[server]\n{key}\n"))
    assert "secret" not in str(error.value)


def test_what_is_off_by_default() -> None:
    settings = load_settings()
    assert (settings.server.requests_per_minute, settings.server.tokens_per_minute) == (None, None)
    assert (settings.server.cors_origins, settings.server.trusted_proxies) == ([], [])
    assert (settings.log.format, settings.telemetry.otlp_endpoint) == ("text", None)


def test_origins_and_proxies_are_separated_by_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINSTACKS_SERVER__CORS_ORIGINS", "https://a.example, http://localhost:3000")
    monkeypatch.setenv("BRAINSTACKS_SERVER__TRUSTED_PROXIES", "10.0.0.0/8,::1")
    server = load_settings().server
    assert server.cors_origins == ["https://a.example", "http://localhost:3000"]
    assert server.trusted_proxies == ["10.0.0.0/8", "::1"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[server]\ncors_origins = ["a.example"]\n', "server.cors_origins: .*'a.example' is no origin"),
        ('[server]\ncors_origins = ["https://a.example/"]\n', "server.cors_origins: .*is no origin"),
        ('[server]\ncors_origins = ["https://*.example"]\n', "server.cors_origins: .*is no origin"),
        ('[server]\ntrusted_proxies = ["proxy"]\n', "server.trusted_proxies: .*'proxy'"),
        ("[server]\nrequests_per_minute = 0\n", "server.requests_per_minute: .*0"),
        ('[log]\nformat = "xml"\n', "log.format: .*'xml'"),
        ('[telemetry]\notlp_endpoint = "collector:4318"\n', "telemetry.otlp_endpoint: .*must be an http"),
        ("[telemetry]\nsample_ratio = 2\n", "telemetry.sample_ratio: .*2"),
    ],
)
def test_mistake_in_operations_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid, match=named):
        load_settings(toml(tmp_path, text))
