"""Public sets of product search as they are published, each recognised by its files.

Amazon ESCI (with SQID's image addresses), Wayfair WANDS, Marqo-GS-10M and Kaggle's fashion products; see
docs/sources.md. The files and columns are those of the sets' own descriptions, but for three that were not
verified: which of ESCI's columns stand in both files, the columns of Kaggle's `styles.csv`, and those of
Marqo's CSV files, which are taken to be those of its Parquet files with `image_local` (the name in Marqo's
own scripts) for the image. Knows nothing of how files are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from askew import sources
from askew.errors import DataError
from askew.sources import Layout, Table

ESCI_GRADES = {"E": 3, "S": 2, "C": 1, "I": 0}
WANDS_GRADES = {"Exact": 2, "Partial": 1, "Irrelevant": 0}
MARQO_SPLITS = {  # Parquet files' name: CSV files' name; the query and the product are known (0) or new (1)
    "in_domain": "query_0_product_id_0",
    "novel_query": "query_1_product_id_0",
    "novel_document": "query_0_product_id_1",
    "zero_shot": "query_1_product_id_1",
}


def esci(data: str) -> Layout:
    """Lay out Amazon's Shopping Queries Dataset: the judgments and products of the us locale.

    A product's id is its own only within a locale, so that one locale is taken. Where SQID's
    `product_image_urls` stand beside, they become the products' images.
    """
    locale = {"product_locale": "us"}
    examples, products = (
        ("shopping_queries_dataset_examples.parquet",),
        "shopping_queries_dataset_products.parquet",
    )
    judged = {"item_id": "product_id", "grade": "esci_label"}
    told = {"item_id": "product_id", "title": "product_title"} | {
        name: f"product_{name}" for name in ("description", "bullet_point", "brand", "color")
    }
    urls = ("product_image_urls.*", "supp_product_image_urls.*")
    found = tuple(pattern for pattern in urls if sources.find(data, (pattern,)))
    images = Table(files=found, columns={"item_id": "product_id", "image": "image_url"})
    return Layout(
        items=(Table(files=(products,), columns=told, where=locale, joins={"item_id": images} if found else {}),),
        queries=(Table(files=examples, where=locale, repeated=True),),
        judgments=(Table(files=examples, columns=judged, where=locale),),
        grades=ESCI_GRADES,
    )


def wands(data: str) -> Layout:
    """Lay out Wayfair's WANDS: its files end in .csv and are separated by tabs; it has no images and no splits."""
    named = {"item_id": "product_id", "title": "product_name"}
    return Layout(
        items=(Table(files=("product.csv",), columns=named, format="tsv"),),
        queries=(Table(files=("query.csv",), format="tsv"),),
        judgments=(
            Table(files=("label.csv",), columns={"item_id": "product_id", "grade": "label"}, format="tsv"),
        ),
        grades=WANDS_GRADES,
    )


def marqo(data: str) -> Layout:
    """Lay out Marqo-GS-10M, from its Parquet or its CSV files: each row is a query, a product and its score.

    The four splits are called as in the Parquet files; a query's id is made of its text, a grade is
    `score_linear` (100 for the first position, one less for each further).
    """
    tables = []
    for split, stem in MARQO_SPLITS.items():
        for pattern, image in ((f"data/{split}-*.parquet", "image"), (f"{stem}.csv", "image_local")):
            if sources.find(data, (pattern,)):
                tables.append((pattern, image, {"split": f"={split}"}))
    item = {"item_id": "product_id"}
    asked = {"query_id": "#query"}
    return Layout(
        items=tuple(Table(files=(f,), columns={**item, "image": i, **s}, repeated=True) for f, i, s in tables),
        queries=tuple(Table(files=(f,), columns=asked | s, repeated=True) for f, _, s in tables),
        judgments=tuple(
            Table(files=(f,), columns={**item, **asked, "grade": "score_linear", **s}) for f, _, s in tables
        ),
    )


def fashion(data: str) -> Layout:
    """Lay out Kaggle's fashion products: items and their images, no queries.

    Some names hold commas that are not quoted: what a row has too much belongs to the name, its last column.
    """
    named = {"item_id": "id", "title": "productDisplayName", "image": "=images/{id}.jpg"}
    return Layout(items=(Table(files=("styles.csv",), columns=named, rest=True),))


class Set(NamedTuple):
    """A public set: the files that tell it, and its layout."""

    files: tuple[str, ...]
    layout: Callable[[str], Layout]


SETS = {
    "Amazon ESCI": Set(
        ("shopping_queries_dataset_examples.parquet", "shopping_queries_dataset_products.parquet"), esci
    ),
    "Wayfair WANDS": Set(("query.csv", "product.csv", "label.csv"), wands),
    "Marqo-GS-10M (CSV)": Set(("query_0_product_id_0.csv",), marqo),
    "Marqo-GS-10M (Parquet)": Set(("data/in_domain-*.parquet",), marqo),
    "Kaggle fashion products": Set(("styles.csv",), fashion),
}


def recognise(data: str) -> Layout:
    """Find a data folder's layout: a public set's, else one of `sources.LAYOUTS`.

    Raises DataError when there is no such folder, or, with a list of them all, when none fits.
    """
    if "://" not in data and not Path(data).is_dir():
        raise DataError("a catalogue's folder", f"no folder {data}", "check the path")
    for files, layout in SETS.values():
        if all(sources.find(data, (file,)) for file in files):
            return layout(data)
    try:
        return sources.recognise(data)
    except DataError:
        known = {name: ", ".join(files) for name, (files, _) in SETS.items()}
        raise sources.unknown(data, known | sources.LAYOUTS) from None
