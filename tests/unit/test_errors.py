"""Errors and the suggestions in them."""

import inspect

import pytest

from blemish import errors
from blemish.errors import BlemishError, nearest_names

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_is_shown_as_a_sentence(kind):
    assert issubclass(kind, BlemishError)
    assert not issubclass(kind, (ValueError, TypeError, OSError))
    assert kind.__doc__
    assert str(kind("Expected a, found b: do c.")) == "Expected a, found b: do c."


def test_the_closest_name_is_suggested():
    assert nearest_names("tilling", ["tiling", "smoothing", "seed"]) == "did you mean 'tiling'?"


def test_several_close_names_are_suggested_best_first():
    assert nearest_names("l1_ssi", ["l1_ssim", "l2_ssim", "gradient"]) == "did you mean 'l1_ssim' or 'l2_ssim'?"


def test_at_most_so_many_names_are_suggested():
    known = [f"name{number}" for number in range(9)]
    assert nearest_names("name", known, most=2).count("'") == 4


def test_without_a_close_name_all_are_listed_in_order_and_once():
    assert nearest_names("xyz", ["silu", "relu", "gelu", "relu"]) == "known: gelu, relu, silu"


def test_a_long_list_is_cut_short():
    known = [f"{number:02d}" for number in range(30)]
    assert nearest_names("xyz", known[:20]) == "known: " + ", ".join(known[:20])
    assert nearest_names("xyz", known) == "known: " + ", ".join(known[:20]) + ", ..."


def test_without_any_name_nothing_is_said():
    assert nearest_names("xyz", []) == ""


@pytest.mark.parametrize("known", [["abc", "abd"], ("abd", "abc"), {"abc": 1, "abd": 2}, iter(["abc", "abd"])])
def test_any_collection_of_names_gives_the_same_answer(known):
    assert nearest_names("ab", known) == nearest_names("ab", ["abc", "abd"])
