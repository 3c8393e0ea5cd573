"""Errors that name the field at fault and the remedy."""


class LoraServeError(Exception):
    """Base of everything this project raises on purpose."""


class ConfigError(LoraServeError):
    """A configuration or model directory that cannot be used."""


class AdapterError(LoraServeError):
    """An adapter that cannot be served: wrong format, shape, rank or values.

    ``code`` is stable for programs (``bad_format``, ``bad_shape``, ``bad_rank``, ``not_finite``, ``unsupported``,
    ``not_found``, ``duplicate``); the message is for people and names the field and the remedy.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestTimeoutError(LoraServeError):
    """A peer did not answer in time."""


class PeerError(LoraServeError):
    """A peer answered a request with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
