// Asks a search endpoint by fetch, in Node 18 or a browser: ASKEW_URL=http://… node examples/search.mjs
const url = globalThis.process?.env.ASKEW_URL ?? "http://127.0.0.1:8000";

// A path, and a body for a POST. Tries again after a 503, when the endpoint says; throws on any other error.
async function ask(path, body, retries = 2) {
  const sent = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(url + path, { ...sent, signal: AbortSignal.timeout(10_000) });
  if (answer.status === 503 && retries > 0) {
    const after = Number(answer.headers.get("retry-after") ?? 1);
    await new Promise((wake) => setTimeout(wake, 1000 * (after + Math.random())));
    return ask(path, body, retries - 1);
  }
  const told = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(told.error.message), told.error);
  return told;
}

const release = await ask("/release");
console.log(`${release.model.name} ${release.model.version} serves ${release.items} products`);

const where = { price: { lt: 20 } };
const found = await ask("/search", { query: "red striped mug", k: 3, filter: where, fields: ["price"] });
for (const hit of found.hits) console.log(`${hit.score.toFixed(3)} ${hit.title}, ${hit.fields.price}`);
for (const hit of found.hits.slice(0, 1)) {
  const like = await ask("/similar", { item_id: hit.item_id, k: 3 });
  console.log(`like ${hit.title}: ${like.hits.map((other) => other.title).join(", ")}`);
}

try {
  await ask("/search", { query: "mug", k: 1000 });
} catch (error) {
  if (!error.hint) throw error; // nobody answered
  console.log(`refused: ${error.code} ${error.param}: ${error.message}`);
}
