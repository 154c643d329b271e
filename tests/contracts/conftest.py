"""What the contracts share: the settings of `blemish train` as they would be used."""

from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest

from blemish.errors import ConfigError
from blemish.settings import settings_of


@cache
def composed(verb, *overrides):
    needed = {"train": ["data.root=."], "diff": ["reference=.", "query=."]}
    return settings_of(verb, [*needed[verb], *overrides])


@pytest.fixture(scope="session")
def settings():
    """Compose `train`, or `diff`, with some overrides, resolved to plain data that may be changed."""
    return lambda *overrides, verb="train": deepcopy(composed(verb, *overrides))


@pytest.fixture(scope="session")
def installed():
    """A context that skips the test where an option needs a package which is not there."""

    @contextmanager
    def skipping():
        try:
            yield
        except ConfigError as error:
            if "pip install" in str(error):
                pytest.skip(str(error))
            raise

    return skipping
