"""Base classes of the errors that this project raises on purpose. Messages name the field at fault and the remedy."""


class LoraServeError(Exception):
    """Base of all errors that this project raises on purpose."""


class ConfigError(LoraServeError):
    """A configuration, model directory or profile that cannot be used. The message names the field and the remedy."""


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
    """A peer did not answer a request in time. Whether it acted on the request is unknown."""


class PeerError(LoraServeError):
    """A peer answered a request with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
