"""The error tree: everything in it crosses process boundaries whole."""

import inspect
import pickle

import pytest

from pixellm import errors
from pixellm.errors import PixelLMError

ALL_ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]


def instances(kind: type[BaseException]) -> list[BaseException]:
    """One with the message alone, and one with every keyword at an unusual value."""
    made = [kind("what was got; what was wanted")]
    keywords = {
        name: {int: 418, float: 7.25, str | None: "other"}[parameter.annotation]
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if keywords:
        made.append(kind("what was got; what was wanted", **keywords))
    return made


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_pickles_with_its_message_and_its_fields(kind: type[BaseException]) -> None:
    for error in instances(kind):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error) == "what was got; what was wanted"
        assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_one_tree_and_says_its_exit_code(kind: type[BaseException]) -> None:
    assert issubclass(kind, PixelLMError)
    assert kind.exit_code in (1, 2)
    assert kind.__doc__


def test_wrong_configuration_is_wrong_usage() -> None:
    assert errors.ConfigError.exit_code == 2
    assert errors.DataError.exit_code == 1


def test_http_statuses_mean_what_http_says() -> None:
    wanted = {
        errors.BadRequestError: 400,
        errors.AuthenticationError: 401,
        errors.OverloadedError: 503,
        errors.RequestTimeoutError: 504,
        errors.ServingError: 500,
    }
    assert {kind: kind("x").status_code for kind in wanted} == wanted
    assert errors.BadRequestError("too large", status_code=413).status_code == 413
    assert errors.OverloadedError("full", retry_after_s=2.5).retry_after_s == 2.5
