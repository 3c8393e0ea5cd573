"""Base classes of the errors that this project raises. Messages name the invalid field and the remedy."""


class LoraServeError(Exception):
    """Base class of all errors that this project defines."""


class ConfigError(LoraServeError):
    """A configuration, model directory or cost profile is invalid."""


class AdapterError(LoraServeError):
    """An adapter cannot be served because of its format, shape, rank, values or name.

    Programs can rely on ``code``: ``bad_format``, ``bad_shape``, ``bad_rank``, ``bad_name``, ``not_finite``,
    ``unsupported``, ``not_found``, ``duplicate``. ``message`` is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestTimeoutError(LoraServeError):
    """A peer did not answer a request in time. It may or may not have acted on the request."""


class PeerError(LoraServeError):
    """A peer answered a request with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
