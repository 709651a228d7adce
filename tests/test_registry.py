"""What a run names is called with what it asks for."""

from typing import Any

import pytest

from fedinit.errors import RequestError
from fedinit.registry import call, resolve, source_of, taken


class Base:
    def __init__(self, a: int = 0, b: int = 0) -> None:
        self.a, self.b = a, b


class Mixin:
    pass


class Hands(Base):
    def __init__(self, own: int = 0, **rest: Any) -> None:
        super().__init__(**rest)
        self.own = own


class HandsThroughAMixin(Mixin, Base):
    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)


class Pins(Base):
    """Decides `a` itself, and hands on the others."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(a=5, **rest)


class Takes(Base):
    """Takes an argument out of the others."""

    def __init__(self, **rest: Any) -> None:
        self.extra = rest.pop("extra", None)
        super().__init__(**rest)


class Keeps:
    def __init__(self, **rest: Any) -> None:
        self.rest = rest


@pytest.mark.parametrize(
    ("which", "a", "b"),
    [(Base, 1, 2), (Hands, 1, 2), (HandsThroughAMixin, 1, 2), (Pins, 5, 2), (Takes, 1, 2)],
)
def test_what_is_offered_reaches_the_base_that_asks_for_it(which, a, b):
    made = call("strategy", which, {}, a=1, b=2, c=3)
    assert (made.a, made.b) == (a, b)
    assert call("strategy", which, {"b": 7}, a=1, b=2).b == 7


def test_what_takes_anything_is_given_what_was_asked_for():
    assert call("strategy", Takes, {"extra": 4}, a=1).extra == 4
    assert call("model", Keeps, {"width": 5}, a=1).rest == {"width": 5}
    assert taken(Keeps) == []
    with pytest.raises(RequestError, match="unknown model_args key 'width'; valid: a, b"):
        call("model", Base, {"width": 5})


def test_what_is_handed_on_to_a_base_that_does_not_take_it_is_unknown():
    expected = r"unknown strategy_args key 'ow'; did you mean 'own'\? valid: a, b, own"
    with pytest.raises(RequestError, match=expected):
        call("strategy", Hands, {"ow": 1}, a=1)
    with pytest.raises(RequestError, match=r"Pins failed: TypeError: .*multiple values"):
        call("strategy", Pins, {"a": 1})

    def hands_on(**rest: Any) -> Base:
        return Base(**rest)  # what is valid there is not known here

    with pytest.raises(RequestError, match=r"hands_on failed: TypeError: .*argument 'c' \("):
        call("model", hands_on, {"c": 1})


def test_a_mistake_within_is_told():
    def wrong(a: int) -> None:
        raise TypeError("'a' is wrong")

    with pytest.raises(RequestError, match="strategy: wrong failed: TypeError: 'a' is wrong"):
        call("strategy", wrong, {}, a=1)


def test_a_module_that_fails_when_it_is_asked_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_lab.py").write_text("def __getattr__(name): raise ImportError('no such')")
    with pytest.raises(RequestError, match="model: cannot import 'lazy_lab:net': ImportError"):
        resolve("model", "lazy_lab:net", {})


def test_the_source_of_a_name_is_what_was_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_lab.py").write_text("def net(): pass")
    found = source_of("model", "edited_lab:net")
    (tmp_path / "edited_lab.py").write_text("def net(): return 1")
    assert source_of("model", "edited_lab:net") == found
    assert found is not None
    assert source_of("model", "cnn") is None
