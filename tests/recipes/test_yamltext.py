"""YAML as version 1.2 reads it: scalars, aliases, merges, lines; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.recipes import yamltext
from cvlctl.recipes.yamltext import Fault, parse

SCALARS = [
    ("0100", 100),  # YAML 1.1 read these three as 64, 90 and a date
    ("1:30", "1:30"),
    ("2001-12-14", "2001-12-14"),
    ("010", 10),
    ("0o10", 8),
    ("0x1F", 31),
    ("-0x1F", "-0x1F"),
    ("0b11", "0b11"),
    ("-12", -12),
    ("+5", 5),
    ("500_000", 500_000),
    ("1__0", "1__0"),
    ("_1", "_1"),
    ("1e6", 1e6),
    ("3e-4", 3e-4),
    ("1.5E+3", 1500.0),
    (".5", 0.5),
    ("-.5", -0.5),
    ("1.", 1.0),
    ("0.000_1", 1e-4),
    ("685_230.15", 685230.15),
    ("190:20:30.15", "190:20:30.15"),
    (".", "."),
    ("1.2.3", "1.2.3"),
    ("e5", "e5"),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("tRUE", "tRUE"),
    *((word, word) for word in ("yes", "no", "on", "off", "y", "n", "Yes", "OFF")),
    ("null", None),
    ("~", None),
    ("", None),
    ("~/x", "~/x"),
    ("=", "="),
    ("'1'", "1"),
    ('"true"', "true"),
    ("!!str 1", "1"),
    ("! x", "x"),
    ("!!float 3", 3.0),
    ("!!int 0o10", 8),
    ("!!null null", None),
    ("9223372036854775807", 2**63 - 1),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
@pytest.mark.parametrize("form", ["a: {}", "a: [{}]"])
def test_a_scalar_is_what_the_core_schema_says(text: str, value: Any, form: str) -> None:
    found, _ = parse(form.replace("{}", text))
    found = found["a"] if "[" not in form else found["a"][0] if found["a"] else None
    assert found == value
    assert type(found) is type(value)


REFUSED = [
    ("a: .inf", ("a",), ".inf is not a finite number"),
    ("a: -.INF", ("a",), "-.INF is not a finite number"),
    ("a: .nan", ("a",), ".nan is not a finite number"),
    ("a: 1e999", ("a",), "1e999 is not a finite number"),
    ("a: 9223372036854775808", ("a",), "9223372036854775808 is too large a number"),
    (f"a: [0x{'f' * 4000}]", ("a", 0), "0xff"),
    (f"a: -{'9' * 100_000}", ("a",), "-99"),
    (f"a: {'9' * 100_000}e5", ("a",), "99"),
    ("a: !!int x", ("a",), "'x' is no !!int"),
    ("a: !!int ''", ("a",), "'' is no !!int"),
    ("a: !!bool maybe", ("a",), "'maybe' is no !!bool"),
    ("a: !!float ''", ("a",), "'' is no !!float"),
    ("a: !!binary aGk=", (), "constructor for the tag 'tag:yaml.org,2002:binary'"),
    ("a: !!timestamp x", (), "constructor for the tag"),
    ("a: !!set {b, c}", (), "constructor for the tag"),
    ("a: !mine [b]", (), "constructor for the tag '!mine'"),
    ("a: {1: b}", ("a",), "key 1 is not text"),
    ("a: {null: b}", ("a",), "key null is not text"),
    ("a: {? [b] : c}", ("a",), "is not text"),
    ("a: {'b': 1, b: 2}", ("a",), "key 'b' is given twice; the first is on line 1"),
    ("a: *b", (), "*b names nothing before it"),
    ("a: &b {c: *b}", (), "an alias that holds itself"),
    ("a: 1\n---\nb: 2", (), "a second document begins"),
    ("a: {<<: 3}", ("a",), "<< merges mappings"),
    ("a: b: c", (), "not valid YAML: mapping values are not allowed"),
    ("a: " + "[" * 80 + "]" * 80, (), "more than 60 deep"),
    ("a: " + "[" * 5_000, (), "more than 60 deep"),
    ("a: \x07", (), "not valid YAML"),
    ("a: \udcff", (), "not valid YAML"),
]


@pytest.mark.parametrize(("text", "key", "problem"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_a_recipe_may_not_be_is_one_short_fault(text: str, key: Any, problem: str) -> None:
    with pytest.raises(Fault) as caught:
        parse(text)
    assert problem in caught.value.problem
    assert len(caught.value.problem) < 200
    assert caught.value.key == key


def test_chains_of_aliases_are_cut_off_before_they_fill_memory_or_the_stack() -> None:
    wide = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    wide += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    deep = ["a0: &a0 [1]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3_000)]
    merged = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: *a{n - 1}}}" for n in range(1, 3_000)]
    for lines in (wide, deep, merged):
        with pytest.raises(Fault, match=r"too many values|RecursionError"):
            parse("\n".join(lines))


def test_nothing_is_shared_after_parsing() -> None:
    data, _ = parse("a: &a {b: [1], c: {d: 2}}\ne: *a\nf: {<<: *a, g: 3}\nh: [*a, *a]")
    assert data["e"] == data["a"] == data["h"][0] == data["h"][1]
    assert data["f"] == data["a"] | {"g": 3}
    seen: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            seen.append(value)
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)

    walk(data)
    assert len({id(value) for value in seen}) == len(seen) == 17


def test_an_override_changes_no_twin(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    stage = "{command: pretrain, stores: [a.zarr], critic: *critic, steps: 1, out: runs/%s}"
    path.write_text(
        "out: runs\nmatrix: {critic: [&critic {hidden: [8], latent_dim: 3}]}\n"
        f"stages:\n  one: {stage % 'one'}\n  two: {stage % 'two'}\n"
    )
    one, two = load(path, ["stages.one.critic.hidden=[16]"], "run").jobs
    assert (one.recipe.critic.hidden, two.recipe.critic.hidden) == ((16,), (8,))
    with pytest.raises(CvlctlError, match=r"^command line: stages\.two\.critic\.hidden: "):
        load(path, ["stages.two.critic.hidden=8"], "run")


def test_merged_keys_give_way_and_know_their_lines() -> None:
    data, lines = parse("a: &a\n  b: 1\n  c: 1\nd: &d {c: 2, e: 2}\nf:\n  e: 3\n  <<: [*a, *d]\n'<<': 4\n")
    assert data["f"] == {"b": 1, "c": 1, "e": 3}
    assert data["<<"] == 4  # in quotes it is a key like another
    assert (lines["f", "b"], lines["f", "c"], lines["f", "e"], lines["d", "e"]) == (2, 3, 6, 4)


def test_without_the_c_library_the_same_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = sorted(Path(__file__).parents[2].joinpath("recipes").rglob("*.yaml"))
    texts = [path.read_text() for path in recipes[:6]] + ["a: &a [1, {b: 'c'}]\nd: *a\ne: {<<: {f: 1}}"]
    fast = [parse(text) for text in texts]
    monkeypatch.setattr(yamltext, "_PARSER", yaml.SafeLoader)
    assert [parse(text) for text in texts] == fast
    for text, key, problem in REFUSED:
        if len(text) < 1_000:
            with pytest.raises(Fault) as caught:
                parse(text)
            assert caught.value.key == key
            assert problem in caught.value.problem or "not valid YAML" in problem


@pytest.mark.parametrize(("word", "value"), [("yes", None), ("no", None), ("On", None), ("true", True)])
def test_a_word_that_was_a_boolean_once_is_told_from_true(word: str, value: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"stores: [a.zarr]\nsteps: 0100\nseeds: [010]\ncritic:\n  layer_norm: {word}\nout: runs/p\n")
    if value is not None:
        recipe = load(path)
        assert (recipe.critic.layer_norm, recipe.steps, recipe.seeds) == (value, 100, (10,))
        return
    with pytest.raises(CvlctlError) as caught:
        load(path)
    assert caught.value.what == f"{path}, line 5: critic.layer_norm: expected true or false, given '{word}'"
    assert caught.value.hint == f"write true or false: to YAML 1.2 {word} is text"


SEXAGESIMAL = [("batch_size=1:30", "batch_size: expected a whole number, given '1:30'"), ("seeds=[0b1]", "seeds.0: ")]


@pytest.mark.parametrize(("override", "what"), SEXAGESIMAL)
def test_what_was_a_number_once_is_refused_as_text(override: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("stores: [a.zarr]\nsteps: 1\nout: runs/p\n")
    with pytest.raises(CvlctlError, match=r"^command line: ") as caught:
        load(path, [override])
    assert what in caught.value.what


LONG = "x" * 10_000
LONG_TEXTS = [
    f"{LONG}: 1",
    f"stores: [a]\nsteps: {LONG}\nout: x",
    f"stores: [a]\nsteps: [{LONG}]\nout: x",
    f"stores: [a]\nsteps: 1\nout: x\n{LONG}: 1",
    f"stores: [a]\nsteps: 1\nout: x\ncritic: {{{LONG}: 1}}",
    f"stores: [a]\nsteps: 1\nout: x\ncritic: {{loss: {LONG}}}",
    f"stores: [a]\nsteps: 1\nout: x\nalgorithm: {{name: {LONG}}}",
    f"stores: [{LONG}]\nsteps: 1\nout: {LONG}",
    f"stores: [a]\nsteps: 1\nout: $y{LONG}",
    f"stores: [a]\nsteps: 1\nout: ~{LONG}/a",
    f"task: {LONG}\nsource: {{name: random, episodes: 1}}\nout: x",
    f"task: [a]\nsource: {{name: random, episodes: 1}}\nout: {LONG}",
    f"a: *{LONG}",
    f"a: !{LONG} 1",
    f"{LONG}: 1\n{LONG}: 1",
    f"? [{LONG}]\n: 1",
    f"out: x\nmatrix: {{{LONG}: 1}}\nstages: {{a: {{command: {LONG}}}}}",
    f"out: x\nstages: {{{LONG}: {{command: b}}}}",
    f"out: x\nstages: {{a: {{command: pretrain, out: '${{{LONG}}}'}}}}",
    f"out: x\nmatrix: {{a: [{LONG}]}}\nstages: {{s: {{command: pretrain, out: '${{a.{LONG}}}'}}}}",
    f"out: x\nmatrix: {{a: [{LONG}]}}\nstages: {{s: {{command: pretrain, out: x, steps: '${{a}}', stores: [a]}}}}",
    "a: " + "b: " * 4_000,
]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=itertools.count())
def test_an_error_about_a_long_text_is_a_screen_at_most(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(CvlctlError) as caught:
        load(path)
    assert len(caught.value.what) <= 1_000
    assert len(caught.value.hint) <= 2_000
    assert str(path) in caught.value.what


@pytest.mark.parametrize("override", [LONG, f"{LONG}=1", f"steps={LONG}", f"steps.{LONG}=1", "a." * 5_000 + "b=1"])
def test_an_error_about_a_long_override_is_a_screen_at_most(override: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stores: [a]\nsteps: 1\nout: x\n")
    with pytest.raises(CvlctlError, match=r"^command line") as caught:
        load(path, [override], "pretrain")
    assert len(caught.value.what) <= 1_000
    assert len(caught.value.hint) <= 2_000


def test_a_place_in_a_list_of_absurdly_many_digits(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stores: [a]\nsteps: 1\nout: x\n")
    with pytest.raises(CvlctlError, match=r"stores\.99.* cannot be set: stores is the list"):
        load(path, [f"stores.{'9' * 5_000}=1"], "pretrain")


def test_control_characters_of_a_file_never_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text('"\\e[31m\\n": 1\n')
    with pytest.raises(CvlctlError) as caught:
        load(path, (), "pretrain")
    assert caught.value.what.endswith(r"unknown key \x1b[31m\n")


def test_a_file_that_never_ends_is_no_recipe() -> None:
    with pytest.raises(CvlctlError, match="longer than a megabyte"):
        load("/dev/zero")


def test_time_grows_with_the_number_of_keys_and_no_faster(tmp_path: Path) -> None:
    def calls(num: int) -> int:
        """How many function calls a recipe of so many unknown keys costs: seconds depend on the machine."""
        import cProfile

        path = tmp_path / f"{num}.yaml"
        path.write_text("stores: [a]\nsteps: 1\nout: x\n" + "".join(f"key{n}: {n}\n" for n in range(num)))
        profile = cProfile.Profile()
        with profile, pytest.raises(CvlctlError, match="unknown key key0"):
            load(path, ["steps=2"], "pretrain")
        return sum(entry.callcount for entry in profile.getstats())

    calls(10)
    assert calls(8_000) < 2.2 * calls(4_000)
