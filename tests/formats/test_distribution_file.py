from __future__ import annotations

import json

import pytest

from explorer.distribution import SparsityDistribution
from explorer.errors import FormatError
from explorer.formats import Recipe, read_distribution
from explorer.pruning import RunSettings

DISTRIBUTION = SparsityDistribution({"a": 0.5, "b": 0.5, "0": 0.25}, ["b"], [["a", "b"]])
RECIPE = Recipe(
    "m",
    "d",
    dict(DISTRIBUTION),
    ("b",),
    (("a", "b"),),
    target={"speedup": 3.0},
    settings=RunSettings(epochs=3),
)


@pytest.mark.parametrize(
    "text", [DISTRIBUTION.to_yaml(), DISTRIBUTION.to_json(), "\ufeff" + DISTRIBUTION.to_yaml()]
)
def test_a_distribution_is_read_in_both_formats(text: str) -> None:
    assert read_distribution(text) == (DISTRIBUTION, None)


def test_a_recipe_is_read_in_both_formats() -> None:
    import yaml

    document = yaml.safe_load(RECIPE.to_yaml())
    for text in (RECIPE.to_yaml(), json.dumps(document, indent="\t")):
        assert read_distribution(text) == (DISTRIBUTION, RECIPE)


def test_a_layer_that_is_called_by_a_number_need_not_be_quoted() -> None:
    assert read_distribution("sparsity: {0: 0.5, 2: 0.25}\nlocked: [2]\ngroups: []")[
        0
    ] == SparsityDistribution({"0": 0.5, "2": 0.25}, ["2"])


# Ten lines that stand for ten billion texts; whoever writes it out does not come back.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("\x00\x01PK", "is not text"),
        ("sparsity:\n  a: 0.5\n  b: [0.5\n", "line 4"),
        ('{"sparsity": {"a": 0.5,}}', "line 1"),
        ("sparsity:\n  a: 0.5\n  a: 0.6\n", "'a' is written twice"),
        ('{"sparsity": {"a": 0.5, "a": 0.6}}', "'a' is written twice"),
        ('{"sparsity": {"a": NaN}}', "NaN is no number"),
        ("sparsity: {a: 1.5}", "Sparsity of layer 'a'"),
        ("sparsity: {a: many}", "Sparsity of layer 'a'"),
        ("sparsity: {a: .nan}", "Sparsity of layer 'a'"),
        ("sparsity: {a: [0.5]}", "Sparsity of layer 'a'"),
        ("sparsity: 0.9", "a distribution is written as"),
        ("sparsity: {a: 0.5}\nlocked: [b]", "No layer 'b'"),
        ("sparsity: {a: 0.5}\nlocked: [[b]]", "cannot be used"),
        ("sparsity: {a: 0.5, b: 0.6}\ngroups: [[a, b]]", "these differ"),
        ("dense: 1\npruned: 2\nlayers: 3", "It holds dense, pruned, layers"),
        ("just words", "neither a recipe nor a distribution"),
        ("- 0.5\n- 0.6", "neither a recipe nor a distribution"),
        (RECIPE.to_yaml().replace("sparsity: 0.25", "sparsity: lots"), "sparsity of layer '0' is 'lots'"),
        (BOMB, "line 2"),
        ("[" * 3000, "This is not YAML"),
        ('{"a":' * 20_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_line_or_layer(text: str, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_distribution(text)
    assert words.lower() in str(caught.value).lower()
    assert len(str(caught.value)) < 600
