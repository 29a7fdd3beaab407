import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft.soup
from core.checkpoint.check import NonFinite
from core.checkpoint.shards import LayoutError, weights_hash
from core.training.config import LearnerConfig
from core.training.model import load_model
from corpus.records import DataSource
from sft.config import SoupConfig, Variant
from sft.soup import SoupError, check_ingredients, distances, greedy, merge, soup

CONFIG = SoupConfig(
    variants=(Variant(seed_offset=1),), validation=DataSource(set="validation"), max_distance=1.0
)


@pytest.fixture
def ingredients(core_path, tmp_path):
    """Three fine-tunings of one start: the core's weights plus small noise."""
    return [perturbed(core_path, tmp_path / f"ingredient-{number}", number) for number in range(3)]


def perturbed(start, path, seed, dtype=torch.float32, scale=0.01):
    model = load_model(start, LearnerConfig(deepspeed=None))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB")
    for file in start.iterdir():
        if file.suffix in (".json", ".jinja") and not (path / file.name).exists():
            (path / file.name).write_text(file.read_text())
    (path / "start.json").write_text(json.dumps({"weights": weights_hash(start)}))
    return path


def weights_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_uniform_soup_is_the_plain_mean(ingredients, tmp_path):
    merged = weights_of(merge(ingredients, tmp_path / "soup"))
    parts = [weights_of(path) for path in ingredients]
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).mean(0))


def test_weights_weigh(ingredients, tmp_path):
    merged = weights_of(merge(ingredients[:2], tmp_path / "soup", weights=[0.25, 0.75]))
    one, two = (weights_of(path) for path in ingredients[:2])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name])


def test_weights_must_sum_to_one(ingredients, tmp_path):
    with pytest.raises(SoupError, match="summing to 1"):
        merge(ingredients[:2], tmp_path / "soup", weights=[0.5, 0.6])


def test_a_soup_loads_with_its_tied_output_layer(ingredients, tmp_path):
    merge(ingredients, tmp_path / "soup")
    model = load_model(tmp_path / "soup", LearnerConfig(deepspeed=None))
    assert "lm_head.weight" not in weights_of(tmp_path / "soup")
    embedding = torch.stack(
        [weights_of(p)["model.language_model.embed_tokens.weight"] for p in ingredients]
    ).mean(0)
    torch.testing.assert_close(model.lm_head.weight.data, embedding)


def test_bfloat16_sums_in_float32_and_stays_bfloat16(core_path, tmp_path):
    paths = [perturbed(core_path, tmp_path / str(seed), seed, torch.bfloat16) for seed in range(3)]
    merged = weights_of(merge(paths, tmp_path / "soup"))
    parts = [weights_of(path) for path in paths]
    for name, tensor in merged.items():
        exact = torch.stack([part[name].float() for part in parts]).mean(0)
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), exact, atol=1e-7, rtol=2**-8)  # one rounding, not three


def test_slicing_changes_nothing(ingredients, tmp_path, monkeypatch):
    whole, apart = weights_of(merge(ingredients, tmp_path / "whole")), distances(ingredients)
    monkeypatch.setattr(sft.soup, "_SLICE_ELEMENTS", 100)
    sliced = weights_of(merge(ingredients, tmp_path / "sliced"))
    assert all(torch.equal(sliced[name], tensor) for name, tensor in whole.items())
    assert distances(ingredients).pairwise == pytest.approx(apart.pairwise)


def test_a_soup_of_sharded_ingredients_loads_whatever_its_own_files(ingredients, tmp_path):
    assert len(list(ingredients[0].glob("*.safetensors"))) > 1
    soup = merge(ingredients, tmp_path / "soup")
    assert [file.name for file in soup.glob("*.safetensors*")] == ["model.safetensors"]  # no index of others
    load_model(soup, LearnerConfig(deepspeed=None))


def test_distances_are_the_plain_ones(ingredients, core_path):
    flat = [
        torch.cat([t.flatten() for _, t in sorted(weights_of(p).items())]) for p in (core_path, *ingredients)
    ]
    start, *parts = [vector.double() for vector in flat]
    measured = distances(ingredients, core_path)
    for number, part in enumerate(parts):
        assert measured.from_start[number] == pytest.approx(float((part - start).norm() / start.norm()))
    assert measured.pairwise["0-2"] == pytest.approx(float((parts[0] - parts[2]).norm() / start.norm()))
    cosine = torch.nn.functional.cosine_similarity(parts[0] - start, parts[1] - start, dim=0)
    assert measured.cosine["0-1"] == pytest.approx(float(cosine), abs=1e-6)


def test_one_ingredient_is_refused(ingredients):
    with pytest.raises(SoupError, match="two ingredients"):
        check_ingredients(ingredients[:1])


def test_equal_ingredients_pass(ingredients):
    check_ingredients(ingredients)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_architecture_is_refused_with_the_key(ingredients):
    edit_json(ingredients[1] / "config.json", downsample_ratio=0.25)
    with pytest.raises(SoupError, match=r"ingredient-1: config.json differs.*downsample_ratio: 0.5 and 0.25"):
        check_ingredients(ingredients)


def test_another_tokenizer_is_refused(ingredients):
    edit_json(ingredients[2] / "tokenizer.json", added_tokens=[])
    with pytest.raises(SoupError, match=r"ingredient-2: tokenizer.json differs.*added_tokens"):
        check_ingredients(ingredients)


def test_another_chat_template_is_refused(ingredients):
    (ingredients[1] / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(SoupError, match=r"chat_template.jinja differs"):
        check_ingredients(ingredients)


def test_another_start_is_refused(ingredients):
    edit_json(ingredients[1] / "start.json", weights="of something else")
    with pytest.raises(SoupError, match=r"different weights.*ingredient-1: of something"):
        check_ingredients(ingredients)


def test_an_ingredient_of_unknown_start_is_refused(ingredients):
    (ingredients[1] / "start.json").unlink()
    with pytest.raises(SoupError, match=r"ingredient-1: no start.json"):
        check_ingredients(ingredients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.language_model.norm.weight"),
            "1 tensors are in only one of them",
        ),
        (lambda weights: weights.update({"extra": torch.zeros(1)}), "e.g. extra"),
        (
            lambda weights: weights.update({"model.language_model.norm.weight": torch.zeros(3)}),
            r"language_model.norm.weight: \(\(32,\), 'F32'\).*\(\(3,\), 'F32'\)",
        ),
        (
            lambda weights: weights.update({"model.language_model.norm.weight": torch.zeros(32).half()}),
            "language_model.norm.weight: .*'F32'.*'F16'",
        ),
    ],
)
def test_mismatched_tensors_are_refused(ingredients, tmp_path, change, message):
    weights = weights_of(ingredients[1])
    change(weights)
    for file in ingredients[1].glob("*.safetensors*"):
        file.unlink()
    save_file(weights, ingredients[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SoupError, match=message):
        check_ingredients(ingredients)
    with pytest.raises(SoupError, match=message):
        merge(ingredients, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def score_by(wanted):
    """A score of 1 less the distance of the final norm's first weight from a wanted one."""

    def score(path):
        weight = weights_of(path)["model.language_model.norm.weight"][0]
        return 1 - abs(float(weight) - wanted)

    return score


def test_a_greedy_soup_keeps_what_does_not_lower_the_score(ingredients, tmp_path):
    set_first_norm(ingredients, [1.0, 3.0, 9.0])
    score = score_by(2.0)  # alone: 0, 0, -6; 0 + 1 reach 2.0 -> 1; with 2 the mean is 4.33 -> -1.33
    used = greedy(ingredients, tmp_path / "soup", score, [score(path) for path in ingredients])
    assert used == [0, 1]
    assert score(tmp_path / "soup") == pytest.approx(1.0)
    assert sorted(path.name for path in tmp_path.iterdir() if "soup" in path.name) == ["soup"]


def set_first_norm(paths, values):
    for path, value in zip(paths, values, strict=True):
        weights = weights_of(path)
        weights["model.language_model.norm.weight"][0] = value
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_the_record_holds_ingredients_and_merge(ingredients, core_path, tmp_path):
    set_first_norm(ingredients, [1.0, 2.0, 3.0])
    found = soup(CONFIG, ingredients, tmp_path / "soup", score=score_by(2.0), start=core_path)
    assert [entry["score"] for entry in found["ingredients"]] == [0.0, 1.0, 0.0]
    assert [entry["path"] for entry in found["ingredients"]] == [str(path) for path in ingredients]
    assert found["ingredients"][0]["distance"] == distances(ingredients, core_path).from_start[0]
    assert found["merged"] == {"method": "uniform", "used": [0, 1, 2], "score": pytest.approx(1.0)}
    json.dumps(found)


def test_a_merge_below_its_worst_ingredient_warns_or_refuses(ingredients, core_path, tmp_path, caplog):
    set_first_norm(ingredients, [1.0, 1.0, 4.0])
    worse = lambda path: float("ingredient" in path.name)  # noqa: E731 (every ingredient 1, the merge 0)
    with caplog.at_level(logging.WARNING):
        soup(CONFIG, ingredients, tmp_path / "soup", score=worse, start=core_path)
    assert "merge scores 0.0000, its worst ingredient 1.0000" in caplog.text
    refusing = CONFIG.model_copy(update={"on_worse": "refuse"})
    with pytest.raises(SoupError, match="worst ingredient"):
        soup(refusing, ingredients, tmp_path / "refused", score=worse, start=core_path)
    assert not (tmp_path / "refused").exists()


def test_ingredients_too_far_apart_are_refused_before_scoring(core_path, ingredients, tmp_path):
    far = perturbed(core_path, tmp_path / "far", seed=9, scale=1.0)
    never = lambda path: pytest.fail("scored")  # noqa: E731
    with pytest.raises(SoupError, match=r"far lie \d+\.\d+ of the start's norm apart, max_distance is 1.0"):
        soup(CONFIG, [*ingredients, far], tmp_path / "soup", score=never, start=core_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_ingredient_that_is_not_finite_is_refused_with_its_tensors(
    ingredients, core_path, tmp_path, value
):
    set_first_norm(ingredients[1:2], [value])
    never = lambda path: pytest.fail("scored")  # noqa: E731
    what = "NaN" if value != value else "infinity"
    with pytest.raises(
        NonFinite, match=rf"ingredient-1(?s:.*)language_model.norm.weight: {what}, in model.safe"
    ):
        soup(CONFIG, ingredients, tmp_path / "soup", score=never, start=core_path)
    with pytest.raises(NonFinite, match=rf"language_model.norm.weight holds {what}"):
        merge(ingredients, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_nan_distance_is_too_far(ingredients, core_path, tmp_path):
    # Finite weights whose squares are not: infinity less infinity is NaN, which no limit is below.
    set_first_norm(ingredients[:2], [3e38, 3e38])
    assert distances(ingredients, core_path).pairwise["0-1"] != 0.0
    with pytest.raises(SoupError, match=r"lie (nan|inf) of the start's norm apart"):
        soup(CONFIG, ingredients, tmp_path / "soup", score=lambda path: 1.0, start=core_path)


def test_a_nan_score_is_refused(ingredients, core_path, tmp_path):
    for on_worse in ("warn", "refuse"):
        cfg = CONFIG.model_copy(update={"on_worse": on_worse})
        with pytest.raises(SoupError, match="its validation score is nan"):
            soup(cfg, ingredients, tmp_path / "soup", score=lambda path: float("nan"), start=core_path)


def test_nan_shares_are_refused(ingredients, tmp_path):
    with pytest.raises(SoupError, match="summing to 1"):
        merge(ingredients[:2], tmp_path / "soup", weights=[float("nan"), 1.0])


@pytest.mark.parametrize("name", ["LICENSE", "vocab.json", "released/config.json"])
def test_a_link_out_of_an_ingredient_is_not_copied_into_the_soup(ingredients, tmp_path, name):
    (tmp_path / "secret").write_text("of this user")
    (ingredients[0] / name).parent.mkdir(exist_ok=True)
    (ingredients[0] / name).symlink_to(tmp_path / "secret")
    with pytest.raises(LayoutError, match=r"a link to .*secret, outside the checkpoint"):
        merge(ingredients, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_soup_keeps_the_release_its_ingredients_were_imported_from(ingredients, tmp_path):
    (ingredients[0] / "released").mkdir()
    (ingredients[0] / "released" / "config.json").write_text("{}")
    merge(ingredients, tmp_path / "soup")
    assert (tmp_path / "soup" / "released" / "config.json").read_text() == "{}"
