"""Finds what a request's app was made of. Knows where create_app keeps it."""

import asyncio

from starlette.requests import Request

from server.config import Settings
from server.drain import Drain
from server.service import Service
from server.store_admin import StoreAdmin


def service_of(request: Request) -> Service:
    """The service that answers."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def store_admin_of(request: Request) -> StoreAdmin:
    """The store's administration."""
    store_admin = request.app.state.store_admin
    assert isinstance(store_admin, StoreAdmin)
    return store_admin


def drain_of(request: Request) -> Drain:
    """Where the server is between serving and ending."""
    drain = request.app.state.drain
    assert isinstance(drain, Drain)
    return drain


def settings_of(request: Request) -> Settings:
    """The settings that the app was made with."""
    settings = request.app.state.settings
    assert isinstance(settings, Settings)
    return settings


def deadline_of(request: Request) -> float:
    """In the event loop's own clock, when a request whose body has come must have been answered."""
    return asyncio.get_running_loop().time() + settings_of(request).server.request_timeout_seconds
