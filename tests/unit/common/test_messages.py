"""Every message round-trips, is compatible with older and newer releases, and is readable without our types."""

import types
import typing
from typing import Annotated, Any, Union, get_args, get_origin

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraserve.messages as catalogue
from loraserve.bus import wire
from loraserve.messages import Message, TokenBatch, TokenDelta

MESSAGES: list[type[Message]] = sorted(
    (kind for kind in vars(catalogue).values() if isinstance(kind, type) and issubclass(kind, Message)),
    key=lambda kind: kind.__name__,
)
MESSAGES.remove(Message)
UNIONS = {name: value for name, value in vars(catalogue).items() if name.startswith("To") and get_args(value)}

each_message = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


def values(annotation: Any) -> "st.SearchStrategy[Any]":
    """Return a strategy for all values that the annotation allows and MessagePack can encode."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if issubclass(annotation, msgspec.Struct):
        hints = typing.get_type_hints(annotation)
        return st.builds(annotation, **{field: values(hints[field]) for field in annotation.__struct_fields__})
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple[annotation]


def encoded(message: Any) -> bytes:
    return bytes(wire.pack_message(wire.SEND, wire.NO_CORRELATION, message)[2])


def example(kind: type[Message]) -> Message:
    """Return the smallest value of the type, such as 0 or an empty text."""
    required = (field for field in msgspec.structs.fields(kind) if field.required)
    return kind(**{field.name: least(field.type) for field in required})


def least(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return least(get_args(annotation)[0])
    if get_origin(annotation) in (tuple, dict):
        return get_origin(annotation)()
    if get_origin(annotation) in (Union, types.UnionType):
        return None if type(None) in get_args(annotation) else least(get_args(annotation)[0])
    if issubclass(annotation, msgspec.Struct):
        required = (field for field in msgspec.structs.fields(annotation) if field.required)
        return annotation(**{field.name: least(field.type) for field in required})
    return annotation()


@each_message
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    payload = encoded(message)
    assert wire.decode_payload(msgspec.msgpack.Decoder(kind), payload) == message
    for union in UNIONS.values():
        if kind in get_args(union):
            assert wire.decode_payload(msgspec.msgpack.Decoder(union), payload) == message


@each_message
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_msgpack_package_reads_it_without_a_schema(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    seen = msgpack.unpackb(encoded(message), use_list=False, strict_map_key=False)
    assert seen["type"] == kind.__name__
    assert seen == plain(message)


def plain(value: Any) -> Any:
    """Return the content as a reader without our types decodes it."""
    if isinstance(value, msgspec.Struct):
        fields = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        tag = {"type": type(value).__name__} if value.__struct_config__.tag else {}
        return tuple(fields.values()) if value.__struct_config__.array_like else tag | fields
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


@each_message
def test_a_message_of_an_older_release_gets_the_defaults(kind: type[Message]) -> None:
    message = example(kind)
    sent = plain(message)
    for field in msgspec.structs.fields(kind):
        if not field.required:
            del sent[field.name]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=kind) == message


@each_message
def test_a_field_of_a_newer_release_is_ignored(kind: type[Message]) -> None:
    message = example(kind)
    sent = plain(message) | {"added_later": {"deep": [1, 2]}}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=kind) == message


@each_message
def test_a_missing_required_field_is_refused_by_name(kind: type[Message]) -> None:
    for field in msgspec.structs.fields(kind):
        if field.required:
            sent = plain(example(kind))
            del sent[field.name]
            with pytest.raises(msgspec.ValidationError, match=f"missing required field `{field.name}`"):
                msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=kind)


def test_token_deltas_are_arrays_that_may_grow_at_the_end() -> None:
    delta = TokenDelta("r", 3, (5, 6))
    message = TokenBatch(engine="engine-0", incarnation="x", deltas=(delta,))
    for row in (["r", 3, [5, 6]], ["r", 3, [5, 6], None, 0, [], None, "added later"]):
        sent = {"type": "TokenBatch", "engine": "engine-0", "incarnation": "x", "deltas": [row]}
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=TokenBatch) == message


def test_every_tag_means_one_message() -> None:
    tags = [kind.__struct_config__.tag for kind in MESSAGES]
    assert len(set(tags)) == len(tags)
    assert tags == [kind.__name__ for kind in MESSAGES]


def test_every_process_kind_answers_pings() -> None:
    assert set(UNIONS) == {"ToEngine", "ToGateway", "ToMonitor", "ToPlanner", "ToRouter", "ToStore"}
    assert all({catalogue.Ping, catalogue.TellStory} <= set(get_args(union)) for union in UNIONS.values())


def test_every_message_is_exported() -> None:
    assert {kind.__name__ for kind in MESSAGES} <= set(vars(catalogue))
    assert set(UNIONS) <= set(vars(catalogue))
