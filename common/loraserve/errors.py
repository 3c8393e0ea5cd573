"""Base classes of the errors that this project raises. Messages name the invalid field and the remedy."""


class LoraServeError(Exception):
    """Base class of the errors that this project reports to users and peers."""


class ConfigError(LoraServeError):
    """A configuration, model directory or cost profile is invalid."""


class AdapterError(LoraServeError):
    """An adapter cannot be registered, stored or served. ``code`` is for programs, ``message`` for people.

    The codes are ``bad_format``, ``bad_shape``, ``bad_rank``, ``bad_name``, ``not_finite``, ``unsupported``,
    ``not_found`` and ``duplicate``. The store also uses other codes, such as ``disk_full``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestTimeoutError(LoraServeError):
    """No answer to a request arrived in time, or the connection was lost. The peer may have acted on the request."""


class PeerError(LoraServeError):
    """A peer answered a request with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
