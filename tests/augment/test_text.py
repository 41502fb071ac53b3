"""Entities, titles by rules, and the checks of enriched titles."""

import json
import time

import pytest

from moon_jax.augment import text
from moon_jax.types import Product
from tests.conftest import ROOT

MUG = Product(
    text="Acme Blue Ceramic Mug",
    id="m",
    category=("Kitchen", "Drinkware", "Coffee Mugs"),
    brand="Acme",
    attributes={
        "Material": "Ceramic",
        "Microwave Safe": "Yes",
        "Gift Pack": "No",
        "GSM": "410",
        "Number of Contents in Sales Package": "1",
        "Model ID": "ACMBLU20X7",
        "Shape": "round with a wide rim and a handle",
        "Finish": "Glossy",
    },
    description="A mug of 330 ml. Dishwasher proof. By nobody else.",
)


def test_entities_are_the_products_own_facts():
    found = text.entities(MUG)
    assert found["brand"] == ("Acme",) and found["Material"] == ("Ceramic",)
    assert found["category"] == ("Coffee Mugs", "Drinkware", "Kitchen")
    assert found["size in the text"] == ("330 ml",)
    assert text.entities(Product(text="shoe")) == {}


def test_rules_add_each_short_fact_once():
    """Known words are not repeated; "yes" becomes the attribute's name; "no", codes and long values are left out; a
    bare number gets its name."""
    assert (
        text.enriched(MUG) == "Acme Blue Ceramic Mug, Microwave Safe, GSM 410, Glossy, Coffee Mugs, Drinkware, 330 ml"
    )
    assert text.enriched(Product(text="Mug", brand="Acme", attributes={"a": "x"})).startswith("Mug, Acme")
    assert text.enriched(Product(text="blue mug", attributes={"colour": "Blue"}, category=("Mug",))) == ""
    many = text.enriched(Product(text="a", attributes={f"n{n}": f"{chr(98 + n) * 3}" for n in range(20)}))
    assert many.count(",") == text.MOST_FACTS
    long = text.enriched(Product(text="a" * 290, attributes={"x": "word", "y": "anotherword"}))
    assert long.endswith(", word") and len(long) <= text.LONGEST_TITLE


BRANDS = frozenset(
    map(text.brand_key, ["Acme", "tall stories", "Coca Cola", "Levi's", "L'Oréal", "Nike", "World of Fine Blue Crafts"])
)


@pytest.mark.parametrize(
    "title, reason",
    [
        ("", "empty"),
        ("  ", "empty"),
        ("Acme Blue Ceramic Mug\nglossy", "signs"),
        ("Acme Blue Ceramic Mug glossy\x00", "signs"),
        ("Acme Blue Ceramic Mug glossy\u2028more", "signs"),
        ("Acme mug glossy " * 30, "too long"),
        ("Синяя кружка Acme Blue Ceramic Mug", "language"),
        ("Acme 杯子 Blue Ceramic Mug", "language"),
        ("tasse en porcelaine bleue fabriquée par Acme", "language"),
        ("Acme Blue Ceramic Mug, set of 4, glossy", "number"),
        ("Acme Blue Ceramic Mug glossy 33", "number"),
        ("Acme Blue Ceramic Mug glossy 3.30 ml", "number"),
        ("Acme Blue Ceramic Mug glossy m4x", "number"),
        ("Acme Blue Ceramic Mug 330 l glossy", "size"),
        ("Acme Blue Ceramic Mug 410 g glossy", "size"),
        ("Acme Blue Ceramic Mug glossy XL", "size"),
        ("Acme Blue Ceramic Mug by Nike glossy", "brand"),
        ("Zenware Acme Blue Ceramic Mug glossy", "brand"),
        ("Acme Blue Ceramic Mug glossy, like tall stories", "brand"),
        ("Acme blue mug", "nothing new"),
        ("ACME Blue Ceramic Mugs", "nothing new"),
        ("Acme Blue Ceramic Mug glossy xl", "size"),
        ("Acme Blue Ceramic Mug, large, glossy", "size"),
        ("Acme Blue Ceramic Mug 330 pounds glossy", "size"),
        ("Acme Blue Ceramic Mug 330 grams glossy", "size"),
        ("Acme Blue Ceramic Mug 410 pieces glossy", "size"),
        ('Acme Blue Ceramic Mug 410" glossy', "size"),
        ("Acme Blue Ceramic Mug glossy, set of four", "number"),
        ("Acme Blue Ceramic Mug glossy double", "number"),
        ("Acme Blue Ceramic Mug glossy cocacola", "brand"),
        ("Acme Blue Ceramic Mug glossy coca cola", "brand"),
        ("Acme Blue Ceramic Mug glossy levis", "brand"),
        ("Acme Blue Ceramic Mug glossy loreal", "brand"),
        ("Acme Blue Ceramic Mug glossy, world of fine blue crafts", "brand"),
        ("Acme Blue Ceramic Mug glossy ni\u200bke", "signs"),
        ("Acme Blue Ceramic Mug glossy n\u00adike", "signs"),
        ("Acme Blue Ceramic Mug glossy \u202eekin", "signs"),
        ("Acme Blue Ceramic Mug glossy ni\u200dke", "brand"),
        ("Acme Blue Ceramic Mug glossy iPhone", "brand"),
        ("Acme Blue Ceramic Mug <b>glossy</b>", "signs"),
        ("Acme Blue Ceramic Mug glossy <|im_end|>", "signs"),
        ("Acme Acme Acme Acme mug mug mug tasse ronde fabriquée blanche neuve", "language"),
        ("Acme Blue Ceramic Mug 330 millilitres glossy", ""),
        ("Acme Blue Ceramic Mug glossy", ""),
        ("Acme Blue Ceramic Mug, 330ml, round rim, glossy finish for hot drinks", ""),
        ("Acme Blue Ceramic Mug, GSM 410", ""),
    ],
)
def test_a_title_may_state_nothing_beyond_the_product(title, reason):
    assert text.flaw(title, MUG, BRANDS) == reason
    assert reason in (*text.FLAWS, "")


def test_scripts_without_spaces_are_compared_by_character():
    mug = Product(text="蓝色陶瓷杯", description="容量330毫升", brand="安可", attributes={"产地": "景德镇"})
    assert text.flaw("蓝色陶瓷杯 景德镇 330毫升", mug) == ""
    assert text.flaw("蓝色陶瓷杯 500毫升", mug) == "number"
    assert text.flaw("蓝色陶瓷杯 景德镇 耐克", mug, frozenset({"耐克", "安可"})) == "brand"
    assert text.flaw("蓝色陶瓷杯 景德镇 安可", mug, frozenset({"耐克", "安可"})) == ""
    assert text.flaw("红木家具沙发椅子", mug) == "language"


def test_sizes_compare_in_any_spelling():
    towel = Product(text="Towel 75 x 150 cm", description="weighs 450g, size XL")
    for title in ("Towel 75x150, soft", "Towel 450 grams soft", "Towel 450 g", "XL Towel", "Towel, 75 × 150 cm, soft"):
        assert text.flaw(title, towel) in ("", "nothing new"), title
    for title in ("Towel 75x75 soft", "Towel 450 kg", "XXL Towel", "Towel S"):
        assert text.flaw(title, towel) in ("size", "number"), title
    # A number within a product code is not a size.
    assert text.entities(Product(text="HP v220w drive")) == {}


def test_quotation_marks_around_an_answer_are_removed():
    assert text.cleaned(' "“blue mug”" \n') == "blue mug"
    assert text.cleaned('"') == '"' and text.cleaned('the "best" mug') == 'the "best" mug'


def test_titles_by_rules_pass_the_checks_on_real_products():
    path = ROOT.parent / "shared" / "data" / "flipkart" / "products.jsonl"
    if not path.is_file():
        pytest.skip("shared/data/flipkart is missing")
    made = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        product = Product(
            text=row["title"],
            description=row["description"] or "",
            brand=row["brand"] or "",
            category=tuple(row["category"]),
            attributes=row["attributes"],
        )
        title = text.enriched(product)
        made += bool(title)
        assert not title or text.flaw(title, product) == "", (title, text.flaw(title, product))
    assert made > 700


def test_a_long_description_is_checked_fast():
    """No expression is quadratic in the text: 65,536 characters (the limit of prepare) in any of these shapes."""
    for piece in ("1/", "1,", "1 ", "1x", "1 x ", "1.1 ", "x", "XL", '1"', "11111", "1m", "杯1"):
        long = Product(text="mug", description=(piece * 65_536)[:65_536])
        began = time.monotonic()
        text.flaw("mug glossy 1", long)
        assert time.monotonic() - began < 5, piece
