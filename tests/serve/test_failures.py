"""What each exception means over HTTP."""

import pickle

import pytest
from pydantic import ValidationError

from pixellm.errors import (
    AuthenticationError,
    BadRequestError,
    DataError,
    OverloadedError,
    RequestTimeoutError,
    ServingError,
)
from pixellm.serve.failures import failure_of
from pixellm.serve.schemas import SegmentBody


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BadRequestError("x", status_code=413, param="image", code="c"), 413, "invalid_request_error"),
        (AuthenticationError("x"), 401, "authentication_error"),
        (BadRequestError("x", status_code=429), 429, "rate_limit_error"),
        (OverloadedError("x", retry_after_s=0.2), 503, "overloaded_error"),
        (RequestTimeoutError("x"), 504, "timeout_error"),
        (ServingError("x"), 500, "server_error"),
        (DataError("x"), 500, "server_error"),
    ],
)
def test_our_errors_carry_their_message_and_survive_a_pickle(error: Exception, status: int, kind: str) -> None:
    for same in (error, pickle.loads(pickle.dumps(error))):
        got_status, body, _headers = failure_of(same)
        assert got_status == status
        assert body["error"]["type"] == kind
        assert body["error"]["message"] == "x"
        assert set(body["error"]) == {"message", "type", "param", "code"}


def test_an_overloaded_service_says_when_to_come_back_in_whole_seconds() -> None:
    assert failure_of(OverloadedError("x", retry_after_s=2.1))[2] == {"Retry-After": "3"}
    assert failure_of(OverloadedError("x", retry_after_s=0.2))[2] == {"Retry-After": "1"}


def test_a_crash_gives_nothing_away() -> None:
    status, body, _headers = failure_of(KeyError("/secret/path"))
    assert status == 500
    assert "secret" not in str(body)


def test_a_wrong_value_names_its_field_and_quotes_it_in_short() -> None:
    with pytest.raises(ValidationError) as wrong:
        SegmentBody.model_validate({"image": "data:", "prompt": "p", "threshold": "x" * 500, "treshold": 1})
    status, body, _headers = failure_of(wrong.value)
    assert status == 422
    assert body["error"]["param"] == "threshold"
    message = body["error"]["message"] or ""
    assert "treshold: unknown field" in message
    assert len(message) < 250
