"""What the contracts share: the settings of `blemish train` as they would be used."""

from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blemish.cli import config_folder
from blemish.errors import ConfigError


@cache
def composed(verb, *overrides):
    needed = {"train": ["data.root=."], "diff": ["reference=.", "query=."]}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(verb, [*needed[verb], *overrides])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


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
