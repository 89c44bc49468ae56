"""The registry: names are given once, and a wrong one is answered with the nearest."""

import pytest

from hfprune.errors import ConfigError
from hfprune.registry import Registry, did_you_mean, nearest


@pytest.fixture
def shapes():
    registry = Registry("shape")
    registry.register("square")(len)
    registry.register("circle")(max)
    return registry


def test_registers_and_finds(shapes):
    assert shapes["square"] is len
    assert list(shapes) == ["circle", "square"]
    assert len(shapes) == 2
    assert "square" in shapes
    assert "line" not in shapes


def test_the_decorator_returns_its_object(shapes):
    @shapes.register("point")
    def point():
        return 0

    assert point() == 0
    assert shapes["point"] is point


def test_a_name_is_given_once(shapes):
    with pytest.raises(ConfigError, match="^the shape 'square' is registered already$"):
        shapes.register("square")(max)
    assert shapes["square"] is len


def test_an_unregistered_name_is_free_again(shapes):
    shapes.unregister("square")
    assert "square" not in shapes
    shapes.register("square")(max)
    assert shapes["square"] is max


def test_near_names_are_suggested(shapes):
    with pytest.raises(ConfigError, match="^unknown shape 'sqare'; did you mean 'square'\\?$"):
        shapes["sqare"]


def test_all_names_are_listed_where_none_is_near(shapes):
    with pytest.raises(ConfigError, match="^unknown shape 'x'; known: circle, square$"):
        shapes["x"]


def test_nearest():
    assert nearest("lamb", ["lamp", "taylor"]) == "lamp"
    assert nearest("zzz", ["lamp"]) is None
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert nearest(3, ["lamp"]) is None
