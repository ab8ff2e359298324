from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from askew import published, sources
from askew.errors import DataError
from askew.sources import Layout, Table

KINDS = {"items": "item", "queries": "query", "judgments": "judgment"}


def write(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def write_parquet(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def read(layout: Layout, data: Path, which: str) -> list[dict[str, object]]:
    found = []
    tables: tuple[Table, ...] = getattr(layout, which)
    for table in tables:
        for unit in sources.units(table, str(data)):
            for chunk in sources.read(unit, table, KINDS[which]):
                assert not chunk.bad
                rows = sources.graded(chunk.table, layout.grades).table if which == "judgments" else chunk.table
                found += rows.to_pylist()
    return found


def judgments(layout: Layout, data: Path) -> list[tuple[object, ...]]:
    return [(r["query_id"], r["item_id"], r["grade"], r.get("split")) for r in read(layout, data, "judgments")]


@pytest.fixture
def esci(tmp_path: Path) -> Path:
    examples = [
        (0, "mug", 7, "B1", "us", "E", "train"),
        (1, "mug", 7, "B2", "us", "I", "train"),
        (2, "taza", 8, "B1", "es", "S", "test"),
        (3, "pan", 9, "B2", "us", "C", "test"),
    ]
    names = ("example_id", "query", "query_id", "product_id", "product_locale", "esci_label", "split")
    rows = [dict(zip(names, e, strict=True)) | {"small_version": 1, "large_version": 1} for e in examples]
    write_parquet(tmp_path, "shopping_queries_dataset_examples.parquet", rows)
    products = [("B1", "us", "red mug"), ("B2", "us", "pan"), ("B1", "es", "taza roja")]
    told = {f"product_{name}": None for name in ("description", "bullet_point", "brand", "color")}
    rows = [{"product_id": p, "product_title": t, **told, "product_locale": loc} for p, loc, t in products]
    write_parquet(tmp_path, "shopping_queries_dataset_products.parquet", rows)
    return tmp_path


def test_esci(esci: Path) -> None:
    layout = published.recognise(str(esci))
    assert {(r["item_id"], r["title"]) for r in read(layout, esci, "items")} == {("B1", "red mug"), ("B2", "pan")}
    assert [(r["query_id"], r["query"]) for r in read(layout, esci, "queries")] == [("7", "mug"), ("9", "pan")]
    assert judgments(layout, esci) == [
        ("7", "B1", 3, "train"), ("7", "B2", 0, "train"), ("9", "B2", 1, "test"),
    ]  # fmt: skip


def test_esci_with_the_images_of_sqid(esci: Path) -> None:
    write(esci, "product_image_urls.csv", "product_id,image_url\nB1,https://images.example/1.jpg\nB9,x\n")
    write(esci, "supp_product_image_urls.csv", "product_id,image_url\nB2,https://images.example/2.jpg\n")
    items = read(published.recognise(str(esci)), esci, "items")
    assert [(r["item_id"], r["image"]) for r in items] == [
        ("B1", "https://images.example/1.jpg"), ("B2", "https://images.example/2.jpg"),
    ]  # fmt: skip
    assert "color" in items[0]


def test_wands(tmp_path: Path) -> None:
    write(tmp_path, "query.csv", 'query_id\tquery\tquery_class\n0\tsalon chair\tChairs\n1\t"36"" vanity"\t\n')
    names = (
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features"
        "\trating_count\taverage_rating\treview_count"
    )
    write(tmp_path, "product.csv", f"{names}\n5\tsolid wood bed\tBeds\tA / B\tgood\tx:1|y:2\t15.0\t4.5\t15.0\n")
    write(tmp_path, "label.csv", "id\tquery_id\tproduct_id\tlabel\n0\t0\t5\tExact\n1\t1\t5\tIrrelevant\n")
    layout = published.recognise(str(tmp_path))
    (item,) = read(layout, tmp_path, "items")
    assert (item["item_id"], item["title"], item["product_class"]) == ("5", "solid wood bed", "Beds")
    assert [r["query"] for r in read(layout, tmp_path, "queries")] == ["salon chair", '36" vanity']
    assert judgments(layout, tmp_path) == [("0", "5", 2, None), ("1", "5", 0, None)]


MARQO = [
    ("in_domain", "query_0_product_id_0", "mug", 18446744073709551615, 1),
    ("in_domain", "query_0_product_id_0", "mug", 12, 2),
    ("zero_shot", "query_1_product_id_1", "pan", 13, 1),
]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_marqo(tmp_path: Path, ending: str) -> None:
    for name, stem in {name: stem for name, stem, *_ in MARQO}.items():
        rows = [m[2:] for m in MARQO if m[0] == name]
        if ending == "csv":
            lines = [f"{q},{p},{n},title {p},pair{p},{101 - n},images/{p}.webp" for q, p, n in rows]
            header = "query,product_id,position,title,pair_id,score_linear,image_local"
            write(tmp_path, f"{stem}.csv", "\n".join([header, *lines]))
        else:
            made = [
                {
                    "query": q, "product_id": str(p), "position": n, "title": f"title {p}", "pair_id": f"pair{p}",
                    "score_linear": 101 - n, "query_id": q, "image": {"bytes": b"jpeg", "path": f"{p}.jpg"},
                }
                for q, p, n in rows
            ]  # fmt: skip
            write_parquet(tmp_path, f"data/{name}-00000-of-00001.parquet", made)
    layout = published.recognise(str(tmp_path))
    items = read(layout, tmp_path, "items")
    assert [(r["item_id"], r["split"]) for r in items] == [
        ("18446744073709551615", "in_domain"), ("12", "in_domain"), ("13", "zero_shot"),
    ]  # fmt: skip
    assert items[1]["image"] == ("images/12.webp" if ending == "csv" else b"jpeg")
    queries = {r["query"]: r["query_id"] for r in read(layout, tmp_path, "queries")}
    assert [q[2:] for q in judgments(layout, tmp_path)] == [
        (100, "in_domain"),
        (99, "in_domain"),
        (100, "zero_shot"),
    ]
    assert {q[0] for q in judgments(layout, tmp_path)} == set(queries.values())
    assert len(read(layout, tmp_path, "queries")) == 2


def test_fashion_products_whose_names_hold_commas(tmp_path: Path) -> None:
    header = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    write(
        tmp_path,
        "styles.csv",
        f"{header}\n15970,Men,Apparel,Topwear,Shirts,Navy Blue,Fall,2011,Casual,Blue Shirt\n"
        "39386,Men,Apparel,Bottomwear,Jeans,Blue,Summer,2012,Casual,Jeans, blue, slim\n",
    )
    layout = published.recognise(str(tmp_path))
    assert [(r["item_id"], r["title"], r["image"], r["baseColour"]) for r in read(layout, tmp_path, "items")] == [
        ("15970", "Blue Shirt", "images/15970.jpg", "Navy Blue"),
        ("39386", "Jeans, blue, slim", "images/39386.jpg", "Blue"),
    ]


def test_a_shops_own_folder_is_recognised_too(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", "item_id,title\na,mug\n")
    write(tmp_path, "queries.csv", "query_id,query\nq,mug\n")
    write(tmp_path, "judgments.csv", "query_id,item_id,grade\nq,a,1\n")
    layout = published.recognise(str(tmp_path))
    assert judgments(layout, tmp_path) == [("q", "a", 1, None)]


def test_an_unknown_folder_is_refused_with_all_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"WANDS.*BEIR.*no files"):
        published.recognise(str(tmp_path))
