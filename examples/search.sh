#!/bin/sh
# Asks a search endpoint by curl alone: ASKEW_URL=http://… sh examples/search.sh
set -eu
url=${ASKEW_URL:-http://127.0.0.1:8000}

# A path, and a body for a POST. Prints the answer, or the error, and fails with it.
ask() {
  curl -sS --fail-with-body --max-time 10 "$url$1" \
    ${2:+-H 'content-type: application/json' --data-raw "$2"}
}

release=$(ask /release)
printf "release: %s\n" "$release"

found=$(ask /search '{"query": "red striped mug", "k": 3, "filter": {"price": {"lt": 20}}, "fields": ["price"]}')
printf "found: %s\n" "$found"

id=$(printf "%s" "$found" | grep -o '"item_id":"[^"]*"' | head -n 1 | cut -d '"' -f 4) # jq -r '.hits[0].item_id'
like=$(ask /similar "{\"item_id\": \"$id\", \"k\": 3}")
printf "like it: %s\n" "$like"

if refused=$(ask /search '{"query": "mug", "k": 1000}' 2> /dev/null); then
  exit 1
fi
printf "refused: %s\n" "$refused" # {"error": {"code", "message", "param", "hint"}}
