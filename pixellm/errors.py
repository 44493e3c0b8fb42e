"""Every exception that pixellm raises on purpose, in one tree.

A message says what was got, what was wanted, and the knob or command that mends it. All of them pickle, because they
cross Ray process boundaries. `exit_code` is what the command line ends with: 2 for wrong usage, 1 for a failed run.
"""


class PixelLMError(Exception):
    """Base of all errors that are the caller's or the environment's to mend."""

    exit_code: int = 1


class ConfigError(PixelLMError):
    """A recipe, an override or an option that cannot be used as given."""

    exit_code = 2


class DataError(PixelLMError):
    """Input data that is missing, malformed or does not fit together."""


class CheckpointError(PixelLMError):
    """A training checkpoint that is absent, incomplete or damaged."""


class ModelLoadError(PixelLMError):
    """A model folder or reference that does not resolve to a complete, consistent model."""


class TrackingError(PixelLMError):
    """The MLflow store or registry refused, or does not hold what was asked for."""


class ClusterError(PixelLMError):
    """Ray could not be reached, started, or given a job."""


class JudgeError(PixelLMError):
    """The language-model judge could not give a usable verdict."""


class LanguageModelError(PixelLMError):
    """The endpoint of a language model cannot be used: wrong address, key or model, or it is down."""


class ServingError(PixelLMError):
    """A request that could not be answered, or a service that could not be started.

    `status_code` is the HTTP status that the ingress answers with.
    """

    status_code: int = 500


class BadRequestError(ServingError):
    """The request is malformed or asks for something out of range (HTTP 400 unless given).

    `param` names the field of the request that is at fault, `code` is a short machine-readable reason.
    """

    exit_code = 2
    status_code = 400

    def __init__(
        self, message: str, *, status_code: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_bad_request, (str(self), self.status_code, self.param, self.code))


class AuthenticationError(ServingError):
    """The API key is missing or unknown (HTTP 401)."""

    status_code = 401


class OverloadedError(ServingError):
    """The bounded queue is full; try again after `retry_after_s` seconds (HTTP 503)."""

    status_code = 503

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_overloaded, (type(self), str(self), self.retry_after_s))


class RateLimitedError(OverloadedError):
    """One caller asks more than it may; try again after `retry_after_s` seconds (HTTP 429)."""

    status_code = 429


class RequestTimeoutError(ServingError):
    """The answer was not ready within the request's deadline (HTTP 504)."""

    status_code = 504


class RequestCancelledError(ServingError):
    """The caller gave the request up; there is no answer (HTTP 499, as nginx says it)."""

    status_code = 499


def _rebuild_bad_request(message: str, status_code: int, param: str | None, code: str | None) -> BadRequestError:
    return BadRequestError(message, status_code=status_code, param=param, code=code)


def _rebuild_overloaded(kind: type[OverloadedError], message: str, retry_after_s: float) -> OverloadedError:
    return kind(message, retry_after_s=retry_after_s)
