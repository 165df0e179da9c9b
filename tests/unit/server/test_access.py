"""Who has no key does not get in by an empty one."""

import pytest
from starlette.requests import Request

from server.access import Keys
from server.errors import InvalidKey


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic one", "one"])
def test_empty_key_opens_nothing_even_if_it_is_configured(authorization: str | None) -> None:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    keys = Keys(api_keys=("", "one"), admin_key="")
    for guard in (keys.require_api_key, keys.require_admin_key):
        with pytest.raises(InvalidKey):
            guard(Request({"type": "http", "headers": headers}))
