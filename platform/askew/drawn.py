"""A made-up shop: items with drawn photos, queries that name attributes, judgments that follow from them.

Everything follows from a seed. Titles leave attributes out at stated rates; then only the photo can tell.
"""

import io
import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew import photos
from askew.errors import DataError

ATTRIBUTES = ("kind", "colour", "pattern", "material", "brand")
OMITTED = {"kind": 0.15, "colour": 0.65, "pattern": 0.75, "material": 0.4, "brand": 0.1}  # share of titles without
TITLE_SYNONYMS, QUERY_SYNONYMS = 0.2, 0.1  # chance that a word is replaced by one that means the same

TRAIN_QUERIES, SEGMENT_QUERIES, FULL_SIZE, LEAST_ITEMS = 1500, 200, 6600, 300
SEGMENTS = ("seen", "new_query", "new_item")
HELD_OUT, ALSO_VAL = 0.12, 0.09  # share of (kind, colour, pattern) kept for val; share of the other items in val

EXACT, SUBSTITUTE, COMPLEMENT, IRRELEVANT = 3, 2, 1, 0
MOST_JUDGED = {SUBSTITUTE: 120, COMPLEMENT: 30, IRRELEVANT: 5}  # rows for each query; exact items are all judged
CUTOFF = 10

PATTERN_SHARES = {"plain": 0.3, "striped": 0.2, "dotted": 0.15, "checked": 0.15, "zigzag": 0.1, "two-tone": 0.1}
BRANDS = (
    *("Northwind", "Alderby", "Brackenhall", "Calla & Finch", "Dovemoor", "Elmsworth", "Fjordly", "Garrowby"),
    *("Halden", "Isbury", "Juniper Row", "Kestrelle", "Lowmarsh", "Mirano", "Nettlecombe", "Orrinhaven"),
    *("Pellworth", "Quillon", "Rookery Lane", "Solvane"),
)
MODELS = (
    *("Alba", "Boreas", "Cirrus", "Delta", "Echo", "Fable", "Gala", "Harbour", "Indra", "Jura", "Kite", "Lumen"),
    *("Mira", "Nova", "Orla", "Petra", "Quest", "Rialto", "Sella", "Tarn", "Ursa", "Vela", "Wren", "Zephyr"),
)
SYNONYMS = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine",),
    "yellow": ("lemon",),
    "green": ("emerald",),
    "teal": ("turquoise",),
    "blue": ("cobalt",),
    "purple": ("violet",),
    "pink": ("rose",),
    "brown": ("chocolate",),
    "black": ("jet black",),
    "white": ("ivory",),
    "grey": ("gray",),
    "plain": ("solid",),
    "striped": ("stripy", "stripe"),
    "dotted": ("polka dot", "spotted"),
    "checked": ("chequered",),
    "zigzag": ("chevron",),
    "two-tone": ("colour block",),
    "mug": ("cup",),
    "bottle": ("flask",),
    "t-shirt": ("tee", "tshirt"),
    "dress": ("gown",),
    "trousers": ("pants",),
    "sneaker": ("trainer",),
    "backpack": ("rucksack",),
    "handbag": ("purse",),
    "umbrella": ("brolly",),
    "cushion": ("throw pillow",),
    "sofa": ("couch",),
    "rug": ("carpet",),
    "tie": ("necktie",),
}
TITLE_ORDERS = (  # words of an attribute that is left out vanish with the commas around them
    "brand material pattern kind, colour size",
    "brand model colour pattern material kind size",
    "colour pattern material kind by_brand, size",
    "brand model pattern material kind, size, colour",
    "kind brand model, material, colour pattern",
)
QUERY_ORDERS = {  # how shoppers word a query, and how often; the words named are the constraints
    "colour kind": 0.18,
    "kind colour": 0.07,
    "pattern kind": 0.12,
    "colour pattern kind": 0.18,
    "pattern colour kind": 0.1,
    "pattern kind colour": 0.07,
    "material kind colour": 0.08,
    "colour material kind": 0.08,
    "brand colour kind": 0.06,
    "colour kind brand": 0.06,
}
FIRST_QUERY = {"kind": "mug", "colour": "red", "pattern": "striped"}  # always asked, and always for sale


@dataclass(frozen=True)
class Kind:
    """What a shop knows of one kind of product; prices in pounds."""

    materials: tuple[str, ...]
    goes_with: tuple[str, ...]
    price: tuple[float, float]
    sizes: tuple[str, ...]


_VOLUMES, _LENGTHS = ("250 ml", "350 ml", "500 ml"), ("40 cm", "60 cm", "90 cm")
_CLOTHES, _SHOES = ("S", "M", "L", "XL"), ("38", "40", "42", "44")
_POTTERY, _CLOTH = ("ceramic", "porcelain", "stoneware"), ("cotton", "linen", "wool")
KINDS = {
    "mug": Kind(("ceramic", "porcelain", "enamel"), ("bowl", "teapot"), (6, 30), _VOLUMES),
    "bowl": Kind((*_POTTERY, "bamboo"), ("mug", "plate"), (7, 40), _VOLUMES),
    "teapot": Kind((*_POTTERY, "enamel"), ("mug",), (18, 80), ("600 ml", "1 l", "1.2 l")),
    "vase": Kind((*_POTTERY, "glass"), ("lamp", "bowl"), (12, 90), ("20 cm", "30 cm")),
    "bottle": Kind(("steel", "glass", "aluminium"), ("backpack",), (9, 45), ("500 ml", "750 ml", "1 l")),
    "plate": Kind((*_POTTERY, "bamboo"), ("bowl", "mug"), (5, 35), ("20 cm", "27 cm")),
    "t-shirt": Kind(("cotton", "linen", "jersey"), ("trousers", "skirt"), (9, 45), _CLOTHES),
    "dress": Kind(("cotton", "linen", "silk"), ("handbag", "scarf"), (25, 180), _CLOTHES),
    "trousers": Kind(("cotton", "linen", "denim"), ("t-shirt", "sneaker"), (20, 110), _CLOTHES),
    "skirt": Kind(("cotton", "denim", "silk"), ("t-shirt", "boot"), (18, 95), _CLOTHES),
    "cap": Kind(("cotton", "denim", "wool"), ("t-shirt",), (8, 35), ("one size",)),
    "scarf": Kind(("wool", "silk", "cotton"), ("cap", "umbrella"), (10, 80), ("150 cm", "180 cm")),
    "sock": Kind(("wool", "cotton", "bamboo"), ("sneaker", "boot"), (4, 18), ("36-40", "41-45")),
    "sneaker": Kind(("canvas", "leather", "mesh"), ("sock",), (30, 150), _SHOES),
    "boot": Kind(("leather", "suede", "rubber"), ("sock",), (45, 220), _SHOES),
    "backpack": Kind(("canvas", "nylon", "leather"), ("bottle", "umbrella"), (25, 140), ("15 l", "20 l", "28 l")),
    "handbag": Kind(("leather", "canvas", "suede"), ("dress", "watch"), (30, 260), ("small", "large")),
    "suitcase": Kind(("aluminium", "nylon", "polycarbonate"), ("backpack",), (60, 300), ("55 cm", "68 cm")),
    "umbrella": Kind(("nylon", "polyester"), ("boot",), (8, 50), _LENGTHS),
    "watch": Kind(("leather", "nylon", "silicone"), ("tie",), (35, 400), ("38 mm", "42 mm")),
    "lamp": Kind(("linen", "paper", "metal"), ("chair", "sofa"), (20, 160), _LENGTHS),
    "cushion": Kind((*_CLOTH, "velvet"), ("sofa", "rug"), (8, 50), ("40 x 40 cm", "50 x 50 cm")),
    "chair": Kind(("oak", "velvet", "linen"), ("cushion",), (45, 350), ("set of 2", "single")),
    "sofa": Kind(("velvet", "linen", "leather"), ("cushion", "rug"), (250, 1900), ("2-seater", "3-seater")),
    "rug": Kind(("wool", "cotton", "jute"), ("cushion",), (30, 420), ("120 x 170 cm", "160 x 230 cm")),
    "tie": Kind(("silk", "wool", "linen"), ("watch",), (12, 70), ("7 cm", "8 cm")),
}
MATERIALS = tuple(sorted({material for kind in KINDS.values() for material in kind.materials}))
VALUES: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "colour": tuple(photos.COLOURS),
    "pattern": photos.PATTERNS,
    "material": MATERIALS,
    "brand": BRANDS,
}
GOES_WITH = np.array([[other in kind.goes_with for other in KINDS] for kind in KINDS.values()])

Codes = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """One product; `named` lists the attributes its title tells."""

    number: int
    title: str
    kind: str
    colour: str
    pattern: str
    material: str
    brand: str
    price: float
    split: str
    named: frozenset[str]

    @property
    def item_id(self) -> str:
        """Return the id, which sorts as the number does."""
        return f"item-{self.number:05d}"


@dataclass(frozen=True)
class Query:
    """One search: its text, the attribute values it wants, and its segment ("train" for train queries)."""

    query_id: str
    text: str
    wants: dict[str, str]
    segment: str

    @property
    def split(self) -> str:
        """Return "train" or "val"."""
        return "train" if self.segment == "train" else "val"


@dataclass(frozen=True)
class Catalogue:
    """All items, queries and judgments; a judgment is a row (query position, item number, grade) of int64."""

    seed: int
    items: tuple[Item, ...]
    queries: tuple[Query, ...]
    judgments: NDArray[np.int64]

    def items_of(self, split: str) -> tuple[Item, ...]:
        """Return the items of "train" or "val"."""
        return tuple(item for item in self.items if item.split == split)

    def omission_rates(self) -> dict[str, float]:
        """Count, for every attribute, the share of titles that leave it out."""
        return {name: float(np.mean([name not in item.named for item in self.items])) for name in ATTRIBUTES}


def plan(seed: int = 0, num_items: int = FULL_SIZE) -> Catalogue:
    """Make up items, queries and judgments without photos; DataError below 300 items."""
    if num_items < LEAST_ITEMS:
        raise DataError(f"at least {LEAST_ITEMS} items", str(num_items), "ask for more")
    shelf = _Shelf(np.random.default_rng([seed, 0]), num_items)
    items = tuple(_items(shelf, np.random.default_rng([seed, 1])))
    queries = tuple(_queries(shelf, np.random.default_rng([seed, 2])))
    judgments = _judged(queries, shelf, np.random.default_rng([seed, 3]))
    return Catalogue(seed, items, queries, judgments)


def photo(item: Item, seed: int) -> bytes:
    """Draw an item as a JPEG of 128 × 128 pixels that depends on the seed and the item alone."""
    return photos.draw(item.kind, item.colour, item.pattern, np.random.default_rng([seed, 4, item.number]))


def draw_batch(items: Sequence[Item], seed: int) -> pa.Table:
    """Return the items as a table with their photos, in the columns of the item files."""
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(item, name) for item in items], pa.string())
        for name in ("item_id", "title", *ATTRIBUTES)
    }
    columns["price"] = pa.array([item.price for item in items], pa.float64())
    columns["image"] = pa.array([photo(item, seed) for item in items], pa.binary())
    return pa.table(columns)


def write_queries(catalogue: Catalogue, folder: Path) -> None:
    """Write queries as JSON lines and judgments as TREC qrels, for both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        queries, qrels = io.StringIO(), io.StringIO()
        for query in catalogue.queries:
            if query.split == split:
                line = {"query_id": query.query_id, "query": query.text, "segment": query.segment}
                queries.write(json.dumps(line) + "\n")
        for place, number, grade in catalogue.judgments.tolist():
            query = catalogue.queries[place]
            if query.split == split:
                qrels.write(f"{query.query_id}\t0\t{catalogue.items[number].item_id}\t{grade}\n")
        (folder / f"{split}.queries.jsonl").write_text(queries.getvalue(), encoding="utf-8")
        (folder / f"{split}.qrels.tsv").write_text(qrels.getvalue(), encoding="utf-8")


def write(catalogue: Catalogue, folder: Path, rows_per_file: int = 1000) -> None:
    """Write the whole data set in this process: item files, queries and judgments."""
    write_queries(catalogue, folder)
    for split in ("train", "val"):
        items = catalogue.items_of(split)
        (folder / "items" / split).mkdir(parents=True, exist_ok=True)
        for part, start in enumerate(range(0, len(items), rows_per_file)):
            table = draw_batch(items[start : start + rows_per_file], catalogue.seed)
            pq.write_table(table, folder / "items" / split / f"part-{part:05d}.parquet")


class _Shelf:
    """Attribute codes of N items, and which of them are val items or held-out combinations; shapes (N,)."""

    def __init__(self, rng: np.random.Generator, num_items: int) -> None:
        def pick(name: str, shares: list[float] | None = None) -> Codes:
            return rng.choice(len(VALUES[name]), num_items, p=shares)

        self.codes = {"kind": pick("kind"), "colour": pick("colour"), "brand": pick("brand")}
        self.codes["pattern"] = pick("pattern", [PATTERN_SHARES[name] for name in VALUES["pattern"]])
        for name, value in FIRST_QUERY.items():
            self.codes[name][:3] = VALUES[name].index(value)
        kinds = [KINDS[VALUES["kind"][code]] for code in self.codes["kind"]]
        self.codes["material"] = np.array([MATERIALS.index(rng.choice(kind.materials)) for kind in kinds])
        held_out = rng.random((len(KINDS), len(VALUES["colour"]), len(VALUES["pattern"]))) < HELD_OUT
        held_out[tuple(VALUES[name].index(value) for name, value in FIRST_QUERY.items())] = False
        self.held_out = held_out[self.codes["kind"], self.codes["colour"], self.codes["pattern"]]
        self.val = self.held_out | (rng.random(num_items) < ALSO_VAL)
        self.val[:3] = False

    def value(self, name: str, number: int) -> str:
        """Return an item's attribute as a word."""
        return VALUES[name][int(self.codes[name][number])]

    def grades(self, wants: dict[str, str]) -> Codes:
        """Grade every item against the wanted attributes, kind among them; shape (N,)."""
        met = {name: self.codes[name] == VALUES[name].index(value) for name, value in wants.items()}
        missed = sum((~met[name]).astype(np.int64) for name in wants if name != "kind")
        companion = GOES_WITH[VALUES["kind"].index(wants["kind"])][self.codes["kind"]] & met.get("colour", True)
        same_kind = np.where(missed == 0, EXACT, np.where(missed == 1, SUBSTITUTE, IRRELEVANT))
        return np.where(met["kind"], same_kind, np.where(companion, COMPLEMENT, IRRELEVANT))


def _worded(value: str, chance: float, rng: np.random.Generator) -> str:
    """Say a value, at times by another word."""
    if rng.random() < chance and value in SYNONYMS:
        return str(rng.choice(SYNONYMS[value]))
    return value


def _items(shelf: _Shelf, rng: np.random.Generator) -> Iterator[Item]:
    """Price and title every item on the shelf."""
    for number, val in enumerate(shelf.val):
        values = {name: shelf.value(name, number) for name in ATTRIBUTES}
        named = frozenset(name for name in ATTRIBUTES if rng.random() >= OMITTED[name])
        low, high = KINDS[values["kind"]].price
        price = round(float(low * (high / low) ** rng.beta(2, 3)), 2)
        title = _title({name: values[name] for name in ATTRIBUTES if name in named}, rng)
        yield Item(number=number, title=title, price=price, split="val" if val else "train", named=named, **values)


def _title(named: dict[str, str], rng: np.random.Generator) -> str:
    """Write a title from the attributes to be named; without a kind, a model stands and no size gives it away."""
    words = {name: _worded(value, TITLE_SYNONYMS, rng) for name, value in named.items()}
    words = {name: word if name == "brand" else string.capwords(word) for name, word in words.items()}
    if "brand" in words:
        words["by_brand"] = f"by {words['brand']}"
    order = str(rng.choice(TITLE_ORDERS))
    model = f"{rng.choice(MODELS)} {rng.integers(10, 999)}"
    if "kind" in named:
        words |= {"model": model, "size": str(rng.choice(KINDS[named["kind"]].sizes))}
    else:
        order = re.sub(r"\bmodel ?", "", order).replace("kind", "model")
        words["model"] = model
    parts = [" ".join(words[slot] for slot in part.split() if slot in words) for part in order.split(", ")]
    return ", ".join(part for part in parts if part)


def _asked(shelf: _Shelf, number: int, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Word a query that the item answers exactly; return the text and what it wants."""
    order = str(rng.choice(list(QUERY_ORDERS), p=list(QUERY_ORDERS.values()))).split()
    wants = {name: shelf.value(name, number) for name in order}
    text = " ".join(_worded(value, QUERY_SYNONYMS, rng) for value in wants.values()).lower()
    return text, wants


def _fresh(
    shelf: _Shelf,
    sources: Codes,
    taken: Iterable[str],
    count: int,
    rng: np.random.Generator,
    only_val: bool = False,
) -> dict[str, dict[str, str]]:
    """Ask `count` new queries of the source items; DataError where they do not yield so many.

    `only_val` refuses queries that a train item answers exactly.
    """
    found: dict[str, dict[str, str]] = {}
    known = set(taken)
    for number in rng.choice(sources, 40 * count).tolist():
        text, wants = _asked(shelf, number, rng)
        if text not in known and not (only_val and (shelf.grades(wants)[~shelf.val] == EXACT).any()):
            found.setdefault(text, wants)
        if len(found) == count:
            return found
    raise DataError(f"{count} different queries", str(len(found)), "ask for more items")


def _queries(shelf: _Shelf, rng: np.random.Generator) -> Iterator[Query]:
    """Word the train queries, then a third of the val queries for each segment."""
    scale = min(1.0, len(shelf.val) / FULL_SIZE)
    count = int(SEGMENT_QUERIES * scale)
    train_items, held_out = np.flatnonzero(~shelf.val), np.flatnonzero(shelf.held_out)
    first = " ".join((FIRST_QUERY["colour"], FIRST_QUERY["pattern"], FIRST_QUERY["kind"]))
    train = {first: FIRST_QUERY}
    train |= _fresh(shelf, train_items, train, int(TRAIN_QUERIES * scale) - 1, rng)
    again = [first, *rng.choice(list(train)[1:], count - 1, replace=False).tolist()]
    new_query = _fresh(shelf, train_items, train, count, rng)
    new_item = _fresh(shelf, held_out, [*train, *new_query], count, rng, only_val=True)
    groups = {"train": train, "seen": {text: train[text] for text in again}}
    groups |= {"new_query": new_query, "new_item": new_item}
    for segment, texts in groups.items():
        for place, (text, wants) in enumerate(texts.items()):
            yield Query(f"{segment}-{place:04d}", text, wants, segment)


def _judged(queries: Sequence[Query], shelf: _Shelf, rng: np.random.Generator) -> NDArray[np.int64]:
    """Judge all exact items and a sample of the others, train queries over train items alone; shape (rows, 3)."""
    rows = []
    for place, query in enumerate(queries):
        pool = ~shelf.val if query.split == "train" else np.ones_like(shelf.val)
        grades = shelf.grades(query.wants)
        chosen = [np.flatnonzero(pool & (grades == EXACT))]
        for grade, most in MOST_JUDGED.items():
            numbers = np.flatnonzero(pool & (grades == grade))
            chosen.append(rng.choice(numbers, min(most, len(numbers)), replace=False))
        items = np.sort(np.concatenate(chosen))
        rows.append(np.stack([np.full_like(items, place), items, grades[items]], axis=1))
    return np.concatenate(rows)


def text_ceiling(catalogue: Catalogue) -> dict[str, float]:
    """State the mean nDCG@10 (linear gain, unjudged 0) that knowledge of titles can reach, "val" and by segment.

    The ranker knows exactly what each title names. What a title leaves out it guesses from the catalogue's
    frequencies: kind from the named material if any, material from kind, the others on their own, as they are
    drawn. It sorts all items by the grade to be expected, weighed by how likely such an item is to be judged;
    ties count as broken at random. Two approximations: the ideal DCG is taken as known, and the ranker learns
    nothing about single items, as a model that memorises train judgments by model number might.
    """
    guesses = _Guesses(catalogue.items)
    scores: dict[str, list[float]] = {segment: [] for segment in SEGMENTS}
    starts = np.searchsorted(catalogue.judgments[:, 0], np.arange(len(catalogue.queries) + 1))
    for place, query in enumerate(catalogue.queries):
        if query.split == "val":
            rows = catalogue.judgments[starts[place] : starts[place + 1]]
            gains = np.zeros(len(catalogue.items))
            gains[rows[:, 1]] = rows[:, 2]
            scores[query.segment].append(_ndcg(guesses.gains(query.wants), gains))
    means = {segment: float(np.mean(found)) for segment, found in scores.items()}
    return {"val": float(np.mean(np.concatenate(list(scores.values())))), **means}


def _ndcg(scores: Reals, gains: Reals) -> float:
    """Return nDCG@10 of items sorted by score, in expectation over the order of equal scores; both shape (N,)."""
    discounts = 1 / np.log2(np.arange(2, CUTOFF + 2))
    _, tie, sizes = np.unique(scores.round(9), return_inverse=True, return_counts=True)
    shared = np.bincount(tie, gains) / sizes
    top = tie[np.argsort(-tie, kind="stable")[:CUTOFF]]
    return float(shared[top] @ discounts / (np.sort(gains)[::-1][:CUTOFF] @ discounts))


class _Guesses:
    """What titles let one believe about N items' attributes."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.codes = {
            name: np.array([values.index(getattr(item, name)) for item in items])
            for name, values in VALUES.items()
        }
        self.named = {name: np.array([name in item.named for item in items]) for name in VALUES}
        self.share = {
            name: np.bincount(self.codes[name], minlength=len(values)) / len(items)
            for name, values in VALUES.items()
        }
        self.together = np.zeros((len(KINDS), len(MATERIALS)))  # shares of (kind, material)
        np.add.at(self.together, (self.codes["kind"], self.codes["material"]), 1 / len(items))

    def gains(self, wants: dict[str, str]) -> Reals:
        """Return the judged gain to be expected of every item; shape (N,)."""
        kind = VALUES["kind"].index(wants["kind"])
        met = [self._meets(name, value, kind) for name, value in wants.items() if name != "kind"]
        exact = np.prod(met, axis=0)
        one_missed = sum(np.prod([1 - m if m is miss else m for m in met], axis=0) for miss in met)
        companion = self._is_kind(GOES_WITH[kind])
        if "colour" in wants:
            companion = companion * self._meets("colour", wants["colour"], kind)
        same = self._is_kind(np.arange(len(KINDS)) == kind)
        gains: Reals = EXACT * same * exact
        for grade, chance in ((SUBSTITUTE, same * one_missed), (COMPLEMENT, companion)):
            judged = min(1.0, MOST_JUDGED[grade] / max(float(chance.sum()), 1.0))  # the sample holds no more rows
            gains = gains + grade * chance * judged
        return gains

    def _meets(self, name: str, value: str, kind: int) -> Reals:
        """Return the chance that an item of that kind has the value; shape (N,)."""
        code = VALUES[name].index(value)
        guess = float(self.share[name][code])
        if name == "material":
            guess = float(self.together[kind, code] / self.together[kind].sum())
        return np.where(self.named[name], self.codes[name] == code, guess)

    def _is_kind(self, kinds: NDArray[np.bool_]) -> Reals:
        """Return the chance that an item is of one of the marked kinds; shape (N,)."""
        by_material = kinds @ self.together / self.share["material"].clip(1e-12)
        guess = np.where(self.named["material"], by_material[self.codes["material"]], kinds @ self.share["kind"])
        return np.where(self.named["kind"], kinds[self.codes["kind"]], guess)
