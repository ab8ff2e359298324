"""Asks a search endpoint by askew's client: ASKEW_URL=http://… python examples/search.py"""

import os
import sys

from askew.client import Client
from askew.errors import EndpointError, UnreachableError


def main(url: str) -> None:
    with Client(url, timeout_s=10) as shop:
        release = shop.release()
        print(f"{release.model.name} {release.model.version} serves {release.items} products")

        found = shop.search("red striped mug", k=3, filter={"price": {"lt": 20}}, fields=["price"])
        for hit in found.hits:
            print(f"{hit.score:.3f} {hit.title}, {hit.fields['price']}")
        for hit in found.hits[:1]:
            like = shop.similar(hit.item_id, k=3)
            print(f"like {hit.title}: {', '.join(other.title for other in like.hits)}")

        try:
            shop.search("mug", k=1000)
        except EndpointError as error:
            print(f"refused: {error.code} {error.param}: {error.message}")


if __name__ == "__main__":
    try:
        main(os.environ.get("ASKEW_URL", "http://127.0.0.1:8000"))
    except UnreachableError as error:
        sys.exit(str(error))
